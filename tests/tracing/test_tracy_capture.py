"""Recording with Tracy: programs that end well, badly and not at all, and all that may be in the way."""

import importlib.util
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llmir_iree.tracing import tracy_capture
from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.tracy_capture import find_tracy_tool, record_tracy
from llmir_iree.tracing.tracy_file import read_tracy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("iree._runtime_libs_tracy") is None,
    reason="IREE's tracer is missing: install a wheel of iree-base-runtime for Linux",
)

# Loads the runtime, and leaves two zones and a message.
PROGRAM = """
import os, sys, time
from llmir_iree.zones import message, zone
with zone("outer"), zone("inner"):
    message("said")
"""
PATIENCE_S = 60


def program(more: str = "") -> list[str]:
    return [sys.executable, "-c", PROGRAM + more]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where to record; at the end nothing else stands beside it."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    yield folder / "x.tracy"
    assert {file.name for file in folder.iterdir()} <= {"x.tracy"}


def names(file: Path) -> set[str]:
    read = read_tracy(file)
    return {read.names[name] for name in read.zones().name}


def test_a_program_that_ends_well(output: Path) -> None:
    output.write_text("an older one")
    done = record_tracy(program("print(sys.stdin.read(), os.environ['MORE'])"), output, timeout_s=PATIENCE_S,
                        env={"MORE": "more"}, stdin="given é")  # fmt: skip
    assert (done.problem, done.stdout) == (None, "given é more\n")
    assert {"outer", "inner"} <= names(output)
    assert [message.text for message in read_tracy(output).messages] == ["said"]


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("sys.exit(3)", "exit code 3"),
        # Time for the client to send what it has, which SIGKILL does not leave.
        ("time.sleep(0.5)\nos.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_a_program_that_crashes_leaves_what_it_did_until_then(output: Path, end: str, told: str) -> None:
    done = record_tracy(program(end), output, timeout_s=PATIENCE_S)
    assert done.problem == f"the program did not end well ({told}); what it did until then is recorded"
    assert {"outer", "inner"} <= names(output)


def test_a_program_that_hangs_is_ended_with_all_that_it_started(output: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    hang = f"""
import subprocess
child = subprocess.Popen(["sleep", "1000"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(1000)
"""
    start = time.monotonic()
    with pytest.raises(CaptureError, match="no end after 3 s"):
        record_tracy(program(hang), output, timeout_s=3)
    assert time.monotonic() - start < 15
    assert not output.exists()
    for pid in pids.read_text().split():
        with suppress(psutil.NoSuchProcess):
            # Whether it has been reaped, too, is not ours to say.
            assert psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_taken_port_is_left_to_its_owner(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_port = tracy_capture._free_port
    with socket.create_server(("127.0.0.1", 0)) as owner:
        taken: int = owner.getsockname()[1]
        ports = iter((taken, free_port()))
        monkeypatch.setattr(tracy_capture, "_free_port", lambda: next(ports))
        assert record_tracy(program(), output, timeout_s=PATIENCE_S).problem is None
        assert next(ports, None) is None
    assert "outer" in names(output)


def test_ports_that_are_always_taken(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        monkeypatch.setattr(tracy_capture, "_free_port", lambda: owner.getsockname()[1])
        with pytest.raises(CaptureError, match="3 times another program took the port"):
            record_tracy(program(), output, timeout_s=PATIENCE_S)


def test_an_installation_without_tracer(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracy_capture, "_TOOLS_PACKAGE", "iree._runtime_libs_elsewhere")
    with pytest.raises(CaptureError, match="iree-tracy-capture is missing: this iree-base-runtime was built without"):
        record_tracy(program(), output, timeout_s=PATIENCE_S)


def test_a_tool_that_does_not_exist() -> None:
    with pytest.raises(CaptureError, match="iree-nonsense is missing"):
        find_tracy_tool("iree-nonsense")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo no luck >&2; exit 1", "iree-tracy-capture: no luck"),
        ("echo Instrumentation failure: why; exit 0", "iree-tracy-capture: Instrumentation failure: why"),
        ("echo Saving trace... failed; exit 0", "iree-tracy-capture: wrote no file: Saving trace... failed"),
    ],
)
def test_a_tracer_that_fails_ends_the_program(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    tool = tmp_path / "iree-tracy-capture"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(tracy_capture, "find_tracy_tool", lambda: tool)
    monkeypatch.setattr(tracy_capture, "_EXIT_S", 0.5)
    with pytest.raises(CaptureError, match=re.escape(told)):
        record_tracy(["sleep", "1000"], output, timeout_s=PATIENCE_S)


@pytest.mark.parametrize(
    ("code", "told"),
    [("pass", r"exit code 0 .* did not load IREE's instrumented runtime$"), ("import nonsense", "No module named")],
)
def test_a_program_that_does_not_load_the_runtime(
    output: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    monkeypatch.setattr(tracy_capture, "_NOTICE_S", 0.5)
    with pytest.raises(CaptureError, match=told):
        record_tracy([sys.executable, "-c", code], output, timeout_s=PATIENCE_S)


def test_a_program_that_does_not_exist(output: Path) -> None:
    with pytest.raises(CaptureError, match="nonsense: cannot start: No such file"):
        record_tracy(["nonsense"], output, timeout_s=PATIENCE_S)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"cannot write .*No such file"):
        record_tracy(program(), tmp_path / "nowhere" / "x.tracy", timeout_s=PATIENCE_S)
