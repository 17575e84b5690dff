"""Recording with Tracy: IREE's capture tool beside a program that runs IREE's instrumented runtime."""

from __future__ import annotations

import os
import shlex
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.children import Child, describe_exit, find_tool, running

_TOOLS_PACKAGE = "iree._runtime_libs_tracy"
_CAPTURE_TOOL = "iree-tracy-capture"
_ADDRESS = "127.0.0.1"

_FAILURE = "Instrumentation failure"
_SAVING = "Saving trace"
_ATTEMPTS = 3
_POLL_S = 0.02
# Until the capture has noticed that the program is gone, until it has written its file, and until a program whose
# client has told all has ended.
_NOTICE_S = 5.0
_SAVE_S = 60.0
_EXIT_S = 30.0

_CLIENT_ENVIRONMENT = {
    "IREE_PY_RUNTIME": "tracy",
    # Sampling of the whole system costs more than it tells, and lets programs crash when they end.
    "TRACY_NO_SYS_TRACE": "1",
    # A short program would end before its data is taken.
    "TRACY_NO_EXIT": "1",
    "TRACY_ONLY_LOCALHOST": "1",
    "TRACY_ONLY_IPV4": "1",
}


@dataclass(frozen=True)
class TracedProgram:
    """How a program that was recorded has ended.

    Attributes:
        exit_code: negative for the signal that killed it.
        stdout, stderr: what it wrote.
    """

    exit_code: int
    stdout: str
    stderr: str

    @property
    def problem(self) -> str | None:
        """What went wrong, None if nothing did."""
        if self.exit_code == 0:
            return None
        return f"the program did not end well ({describe_exit(self.exit_code)}); what it did until then is recorded"


def find_tracy_tool(name: str = _CAPTURE_TOOL) -> Path:
    """One of IREE's instrumented tools, such as iree-benchmark-module, or its capture tool.

    Raises:
        CaptureError: this installation has none.
    """
    if (tool := find_tool(_TOOLS_PACKAGE, name)) is not None:
        return tool
    raise CaptureError(
        f"{name} is missing: this iree-base-runtime was built without Tracy, its wheels for Linux have it; record "
        f"without tracy, or install another one"
    )


def record_tracy(
    command: Sequence[str],
    output: Path,
    *,
    timeout_s: float,
    env: Mapping[str, str] = {},
    stdin: str = "",
    calls_modules: bool = False,
) -> TracedProgram:
    """Run a program and save what its instrumented runtime tells.

    A program that crashes, or ends with an error, leaves a file of what it did until then: `TracedProgram.problem` says
    so. The file appears when it is whole.

    Args:
        command: the program, which has to load IREE's runtime: a Python program, or one of the tools that
            `find_tracy_tool` finds.
        output: the file to write, or to replace.
        timeout_s: seconds after which the program is ended.
        env: variables to add to the environment.
        stdin: what the program can read.
        calls_modules: as in `run_child`.

    Raises:
        CaptureError: no capture tool, no such program; the program did not load the instrumented runtime; it or the
            capture did not end in time; or the file cannot be written.
    """
    tool = find_tracy_tool()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.touch()  # A folder that is missing or closed shows now, not after the run.
        for _ in range(_ATTEMPTS):
            attempt = _Attempt(tool, command, partial, _free_port(), timeout_s, calls_modules)
            program = attempt.run({**os.environ, **env}, stdin)
            if program is not None:
                partial.replace(output)
                return program
    except OSError as error:
        raise CaptureError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    raise CaptureError(f"{_ATTEMPTS} times another program took the port before {command[0]} could listen there")


@dataclass(frozen=True)
class _Attempt:
    """One run of the program, on one port.

    The capture must not end before the program: it would write while data still comes, which gives a torn file.
    """

    tool: Path
    command: Sequence[str]
    output: Path
    port: int
    timeout_s: float
    calls_modules: bool

    def run(self, environment: Mapping[str, str], stdin: str) -> TracedProgram | None:
        """Run and record.

        Returns:
            None if another program listens on the port.
        """
        capture_command = (str(self.tool), "-f", "-o", str(self.output), "-a", _ADDRESS, "-p", str(self.port))
        client = {**environment, **_CLIENT_ENVIRONMENT, "TRACY_PORT": str(self.port)}
        with tempfile.TemporaryDirectory(prefix="llmir-tracy-") as folder:
            logs = Path(folder)
            with (
                running(capture_command, environment, logs / "capture", "") as capture,
                running(self.command, client, logs / "program", stdin) as program,
            ):
                self._follow(program, capture)
                exit_code = program.end()
                if _is_taken(self.port):
                    return None
                is_saving = capture.wait(_NOTICE_S) or _SAVING in capture.stdout
                saved = capture.wait(_SAVE_S) if is_saving else False
                capture_code = capture.end()
                done = TracedProgram(exit_code, program.stdout, program.stderr)
                said = capture.stdout + capture.stderr
        if not is_saving or capture_code > 0:
            raise CaptureError(self._nothing(done, said if capture_code > 0 else ""))
        if _FAILURE in said:
            raise CaptureError(f"{self.tool.name}: {_one_line(said[said.index(_FAILURE) :])}")
        if not saved or self.output.stat().st_size == 0:
            raise CaptureError(f"{self.tool.name}: wrote no file: {_one_line(said)}")
        return done

    def _follow(self, program: Child, capture: Child) -> None:
        """Wait until the program has ended, or has to be ended as there is nothing more to record.

        Raises:
            CaptureError: it does not end.
        """
        deadline = time.monotonic() + self.timeout_s
        if self.calls_modules:
            program.wait_behind_workers(self.timeout_s)
        while program.is_running and capture.is_running and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not program.is_running:
            return
        # A capture that ends well has been told all: the program is about to end, too.
        if not capture.is_running and capture.end() == 0 and _FAILURE not in capture.stdout:
            program.wait(min(_EXIT_S, deadline - time.monotonic()))
        elif capture.is_running:
            program.end()
            raise CaptureError(f"no end after {self.timeout_s:g} s: {shlex.join(self.command)}")

    def _nothing(self, program: TracedProgram, said: str) -> str:
        """Why there is no recording."""
        text = f"{self.command[0]}: ended with exit code {program.exit_code} and nothing was recorded"
        if said:
            return f"{text}; {self.tool.name}: {_one_line(said)}"
        *_, last = ["", *program.stderr.strip().splitlines()]
        return f"{text}: it did not load IREE's instrumented runtime" + (f" ({last.strip()})" if last else "")


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((_ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_taken(port: int) -> bool:
    """Whether a program listens on a port; connections that are being closed do not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_ADDRESS, port))
        except OSError:
            return True
        return False


def _one_line(text: str) -> str:
    return " ".join(text.split())
