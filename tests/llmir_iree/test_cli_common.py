from __future__ import annotations

import errno

import click
import pytest
from click.testing import CliRunner, Result

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.params.errors import CompileError


def run(error: BaseException, **env: str) -> Result:
    @click.command("llmir-try", cls=LlmirCommand)
    def command() -> None:
        raise error

    return CliRunner(env=env).invoke(command, prog_name="llmir-try")


def test_an_error_is_one_line_on_stderr() -> None:
    result = run(CompileError("it failed:\n  line one\n\n  line two\n"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "llmir-try: error: it failed: line one line two\n"


def test_a_full_disk_is_one_line_too() -> None:
    result = run(OSError(errno.ENOSPC, "No space left on device", "/big/params.irpa"))
    assert result.exit_code == 2
    assert result.stderr == "llmir-try: error: [Errno 28] No space left on device: '/big/params.irpa'\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError(errno.EIO, "Input/output error")])
def test_an_error_of_the_program_keeps_its_traceback(error: Exception) -> None:
    assert run(error).exception is error


def test_debugging_keeps_the_traceback() -> None:
    error = CompileError("it failed")
    assert run(error, LLMIR_DEBUG="1").exception is error


def test_an_interrupt_ends_with_130() -> None:
    result = run(KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\n")
