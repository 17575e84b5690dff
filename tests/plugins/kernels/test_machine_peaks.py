"""What is measured is really done: every byte is read, every product added; and the module runs on this machine."""

import numpy as np
import pytest

from llmir_iree.plugins.kernels.peaks import MACS_PER_ROUND, OPERAND_SHAPE, peaks_module
from llmir_iree.targets import Target, resolve_target


@pytest.mark.parametrize("vectors", [1, 3, 7, 40, 41])
def test_every_byte_is_read_by_its_workgroup(kernels, vectors):
    share = 7
    workgroups = -(-vectors // share)
    for position in range(0, vectors * 64, 31):
        memory = np.zeros((vectors, 64), np.uint8)
        memory.flat[position] = 1
        seen = np.full(workgroups, -1, np.int32)
        kernels.dispatch("llmir_read_memory", (memory, seen), range(workgroups), lambda w: (vectors, w, share))
        assert seen.tolist() == [int(position // 64 // share == workgroup) for workgroup in range(workgroups)]


def test_every_pair_of_vectors_is_multiplied_in_every_round(kernels):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, OPERAND_SHAPE, np.uint8)
    b = rng.integers(-128, 128, OPERAND_SHAPE, np.int8)
    sums = np.full((2, 16), -1, np.int32)
    rounds = 5
    kernels.dispatch("llmir_multiply_bytes", (a, b, sums), range(2), lambda w: (rounds, w))
    products = np.einsum("ilk,jlk->l", a.reshape(-1, 16, 4).astype(np.int64), b.reshape(-1, 16, 4).astype(np.int64))
    assert sums.tolist() == [(rounds * products).tolist()] * 2
    assert OPERAND_SHAPE[0] ** 2 * OPERAND_SHAPE[1] == MACS_PER_ROUND


def test_a_processor_without_kernels_has_no_module():
    flags = ("--iree-llvmcpu-target-cpu=", "--iree-llvmcpu-target-triple=riscv64-linux-gnu")
    target = resolve_target("llvm-cpu")
    assert peaks_module(Target("riscv", target.family, target.driver, (*target.flags, *flags))) is None
