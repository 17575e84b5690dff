"""The programs that run the kernels for tests: they end when a kernel does what it must not."""

import numpy as np
import pytest

FAILED = pytest.raises(pytest.fail.Exception, match=r"faulty_\w+: .*driver ended with ")


def fill(program, first, last):
    x = np.zeros(6, np.int32)
    program.call("faulty_fill", (x,), [(first % 2**64, last % 2**64)])
    return x.tolist()


def test_all_of_a_buffer_may_be_written(faulty):
    assert fill(faulty, 0, 6) == [7] * 6
    assert fill(faulty, 2, 4) == [0, 0, 7, 7, 0, 0]


@pytest.mark.parametrize(("first", "last"), [(6, 7), (-20000, -19999)])
def test_a_guard_page_ends_the_program_and_the_next_call_starts_another(faulty, first, last):
    with FAILED:
        fill(faulty, first, last)
    assert fill(faulty, 0, 6) == [7] * 6


def test_sanitizers_notice_what_no_guard_page_does(faulty_sanitized):
    with FAILED:
        fill(faulty_sanitized, -1, 0)


def test_sanitizers_notice_arithmetic_that_is_undefined(faulty_sanitized):
    with FAILED:
        faulty_sanitized.call("faulty_add", (np.int32([2**31 - 1, 1]),), [(2,)])


def test_a_kernel_that_is_not_there_is_an_error(faulty):
    with FAILED:
        faulty.call("faulty_name", (np.zeros(1, np.int32),), [()])
