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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmir_iree.tracing.capture import CaptureError

_DETAIL_CHARACTERS = 400

# A tool that has no workers after so long gets none. IREE names the threads of local-task so.
_WORKERS_S = 2.0
_WORKER_NAME = "iree-worker"
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
    if (tool := find_tool(package, name)) is not None:
        return str(tool)
    raise CaptureError(f"{name}: not in {package}; install iree-base-runtime 3.13.0 for a platform that has it")


def find_tool(package: str, name: str) -> Path | None:
    """A program among the files of an installed package."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((tool for folder in folders or () if (tool := Path(folder, name)).is_file()), None)


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
    with tempfile.TemporaryDirectory(prefix="llmir-child-") as folder:
        with running(command, {**os.environ, **(env or {})}, Path(folder) / "child") as child:
            if calls_modules:
                child.wait_behind_workers(timeout_s)
            if not child.wait(timeout_s):
                raise CaptureError(_failure(command, f"no end after {timeout_s:g} s", ""))
            code = child.end()
        if code != 0:
            raise CaptureError(_failure(command, describe_exit(code), child.stderr))
        return child.stdout


class Child:
    """A process in a group of its own, with its output in files: nobody has to read it while it runs.

    Not pipes: a grandchild that keeps one open would make the end of a killed child invisible.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, stdin: str = "") -> None:
        """Start it.

        Args:
            command: the program and its arguments.
            environment: all variables of its environment.
            log: files of this name and the suffixes .in, .out and .err hold what goes in and comes out.
            stdin: what it can read.

        Raises:
            CaptureError: it cannot start.
        """
        self._log = log
        self._path(".in").write_text(stdin, encoding="utf-8")
        with (
            self._path(".in").open("rb") as given,
            self._path(".out").open("wb") as out,
            self._path(".err").open("wb") as err,
        ):
            try:
                self._process = subprocess.Popen(
                    command, stdin=given, stdout=out, stderr=err, env=environment, start_new_session=True
                )
            except OSError as error:
                raise CaptureError(f"{command[0]}: cannot start: {error.strerror or error}") from None

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def stdout(self) -> str:
        """What it wrote so far."""
        return self._path(".out").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What it wrote so far."""
        return self._path(".err").read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float) -> bool:
        """Give it time; whether it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(timeout_s, 0.0))
        return not self.is_running

    def wait_behind_workers(self, timeout_s: float) -> None:
        """Put its main thread, and that alone, into the batch class as soon as it has its workers.

        Not before: they would inherit the class. Does nothing where there is no such class, or no worker.
        """
        if sys.platform != "linux":
            return
        deadline = time.monotonic() + min(timeout_s, _WORKERS_S)
        seen = 0
        while self.is_running and time.monotonic() < deadline:
            workers = self._count_workers()
            if workers and workers == seen:
                with suppress(PermissionError, ProcessLookupError):
                    os.sched_setscheduler(self._process.pid, os.SCHED_BATCH, os.sched_param(0))
                return
            seen = workers
            time.sleep(_POLL_S)

    def end(self) -> int:
        """Kill it and all that it started, as far as they still run; returns its exit code, negative for a signal."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _count_workers(self) -> int:
        count = 0
        for task in Path(f"/proc/{self._process.pid}/task").glob("*/comm"):
            with suppress(OSError):  # A thread that has just ended.
                count += task.read_text(encoding="utf-8", errors="replace").startswith(_WORKER_NAME)
        return count

    def _path(self, suffix: str) -> Path:
        return self._log.with_name(self._log.name + suffix)


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path, stdin: str = "") -> Iterator[Child]:
    """A child that does not outlive the block; the arguments are those of `Child`."""
    child = Child(command, environment, log, stdin)
    try:
        yield child
    finally:
        child.end()


def describe_exit(code: int) -> str:
    """How a child has ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def _failure(command: Sequence[str], reason: str, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    detail = " | ".join(lines)[:_DETAIL_CHARACTERS]
    told = f"{reason}: {detail}" if detail else reason
    return f"{Path(command[0]).name}: {told} (repeat with: {shlex.join(command)})"
