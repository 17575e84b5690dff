"""Runs tools as children that cannot outlive their deadline."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llmir_iree.tracing.capture import CaptureError

_DETAIL_CHARACTERS = 400

# A tool that has no workers after so long gets none.
_WORKERS_S = 2.0
_POLL_S = 0.002


def runtime_tool(name: str, *, traced: bool = False) -> str:
    """Path of one of the tools that come with IREE's runtime.

    The scripts that pip installs start another process, which would outlive them; this is the tool itself.

    Args:
        name: such as "iree-benchmark-module".
        traced: whether to take it from the runtime that sends its zones to Tracy.

    Raises:
        CaptureError: this installation has no such tool.
    """
    package = "iree._runtime_libs_tracy" if traced else "iree._runtime_libs"
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (tool := Path(folder) / name).is_file():
            return str(tool)
    raise CaptureError(f"{name}: not in {package}; install iree-base-runtime 3.13.0 for a platform that has it")


def run_child(
    command: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    calls_modules: bool = False,
) -> str:
    """Run a command to its end and return what it wrote to stdout.

    Args:
        command: the program and its arguments.
        timeout_s: after so many seconds it is killed, with all that it started.
        env: variables to set beside those of this process.
        calls_modules: whether its main thread calls modules that run on workers of IREE's: it then waits for them as a
            session's caller does, see `llmir_iree.scheduling`.

    Raises:
        CaptureError: it could not start, failed, crashed, or did not end in time; the message tells how to repeat it.
    """
    # Files, not pipes: a grandchild that keeps a pipe open would make the end of a killed child invisible.
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise CaptureError(f"{command[0]}: cannot start: {error.strerror or error}") from None
        try:
            if calls_modules:
                _wait_behind_workers(child, timeout_s)
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CaptureError(_failure(command, f"no end after {timeout_s:g} s", "")) from None
        finally:
            _kill(child)
        if code != 0:
            err.seek(0)
            raise CaptureError(_failure(command, _describe(code), err.read()))
        out.seek(0)
        return out.read()


def _wait_behind_workers(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Put a child's main thread, and it alone, into the batch class as soon as it has its workers.

    Not before: they would inherit the class. Does nothing where there is no such class.
    """
    if sys.platform != "linux":
        return
    tasks, deadline = Path(f"/proc/{child.pid}/task"), time.monotonic() + min(timeout_s, _WORKERS_S)
    seen = 1
    while child.poll() is None and time.monotonic() < deadline:
        threads = sum(1 for _ in tasks.iterdir())
        if threads > 1 and threads == seen:
            with suppress(PermissionError, ProcessLookupError):
                os.sched_setscheduler(child.pid, os.SCHED_BATCH, os.sched_param(0))
            return
        seen = threads
        time.sleep(_POLL_S)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a child and what it started; nothing if it ended by itself."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"crashed with {signal.Signals(-code).name}"
    return f"crashed with signal {-code}"


def _failure(command: Sequence[str], reason: str, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    detail = " | ".join(lines)[:_DETAIL_CHARACTERS]
    told = f"{reason}: {detail}" if detail else reason
    return f"{Path(command[0]).name}: {told} (repeat with: {shlex.join(command)})"
