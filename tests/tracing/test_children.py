"""Children: what they print comes back, and what they do wrong is told with the command."""

import os
import sys
import time

import pytest

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.children import run_child, runtime_tool


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_returns_stdout_alone() -> None:
    assert run_child(python("import sys; print('out'); print('err', file=sys.stderr)"), timeout_s=20) == "out\n"


def test_variables_are_set_beside_others() -> None:
    text = "import os; print(os.environ['MARK'], 'PATH' in os.environ)"
    assert run_child(python(text), timeout_s=20, env={"MARK": "here"}).split() == ["here", str("PATH" in os.environ)]


@pytest.mark.parametrize(
    ("text", "timeout_s", "told"),
    [
        ("import sys; sys.exit('bad input')", 20, "exit code 1: bad input"),
        ("import os; os.kill(os.getpid(), 11)", 20, "killed by SIGSEGV"),
        ("import time; time.sleep(60)", 1, "no end after 1 s"),
    ],
)
def test_a_failure_tells_what_happened_and_how_to_repeat_it(text: str, timeout_s: float, told: str) -> None:
    with pytest.raises(CaptureError) as caught:
        run_child(python(text), timeout_s=timeout_s)
    assert told in str(caught.value)
    assert "repeat with: " in str(caught.value)


def test_what_a_child_started_ends_with_it() -> None:
    # A grandchild that slept on with the child's stdout would keep a reader of a pipe waiting.
    text = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    with pytest.raises(CaptureError, match="no end"):
        run_child(python(text), timeout_s=1)
    assert time.monotonic() - start < 10


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CaptureError, match="no-such-program: cannot start"):
        run_child(["no-such-program"], timeout_s=1)


def test_a_missing_tool_is_named() -> None:
    with pytest.raises(CaptureError, match=r"iree-no-such-tool: not in iree\._runtime_libs"):
        runtime_tool("iree-no-such-tool")
