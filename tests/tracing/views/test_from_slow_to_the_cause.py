"""docs/from-slow-to-the-cause.md: its commands are run, and what they say has to be what the page says.

With LLMIR_WRITE_DOCS=1, as `make docs` sets it, outputs and pictures of the page are replaced by those of this run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timed

WRITE_VARIABLE = "LLMIR_WRITE_DOCS"
ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "from-slow-to-the-cause.md"
SAMPLES = ROOT / "samples" / "tracing"
COMMAND_S = 150
WIDTH = 1280
LARGEST_PICTURE_BYTES = 300_000

IS_WRITTEN = os.environ.get(WRITE_VARIABLE) == "1"

# A command of the page, and what stands below it of its output.
STEP = re.compile(
    r"^```sh\n(?P<command>.*?)^```\n(?:\n```(?P<kind>text|asm)\n(?P<shown>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
# What another machine measures otherwise, or chooses.
MEASURED = re.compile(r"[-+]?(?:\d[\d,]*\.\d+|inf)(?:x|%)?|[-+]?\d+%")
BETWEEN_ITEMS = re.compile(r", (?![\d])|: | \(|\)")
SAME_ON_BOTH_SIDES = re.compile(r"^  A, B  (.*)$", re.MULTILINE)
CHOSEN_IN_A = re.compile(r"(?:\[[\d, ]+\]|\d+x\d+x\d+)(?= ->)|(?<=^  A  ).*")


@dataclass(frozen=True)
class Step:
    """A command of the page, what the page shows of its output (None if nothing), and what it wrote just now."""

    command: str
    kind: str | None
    shown: str | None
    output: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    for file in SAMPLES.glob("*.mlir"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def steps(folder: Path) -> list[Step]:
    """All commands of the page, run in their order."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    steps = []
    for match in STEP.finditer(PAGE.read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c", match["command"]]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        assert done.returncode == 0, f"{match['command']}{done.stderr}"
        steps.append(Step(match["command"], match["kind"], match["shown"], done.stdout))
    if IS_WRITTEN:
        outputs = iter(steps)
        PAGE.write_text(STEP.sub(lambda match: rewritten(match, next(outputs)), PAGE.read_text(encoding="utf-8")))
    return steps


def rewritten(match: re.Match[str], step: Step) -> str:
    if step.kind is None:
        return match[0]
    return f"```sh\n{step.command}```\n\n```{step.kind}\n{step.output.rstrip()}\n```\n"


def items(text: str) -> Iterator[str]:
    """What the lines of an output say on every machine, item by item; whether noise marks another row with * is not a
    part of it, nor are tile sizes that only A has.
    """
    text = SAME_ON_BOTH_SIDES.sub(r"  A  \1\n  B  \1", text.split("; besides, everything moved alike")[0])
    for line in text.splitlines():
        # Which passes have something left to change depends on the tiles.
        if line.strip() and not line.startswith(("passes that changed it", "Everything moved alike")):
            plain = CHOSEN_IN_A.sub("chosen", MEASURED.sub("#", line.replace(" * ", " ")))
            plain = re.sub(r"(# )+", "# ", " ".join(plain.split()))
            yield from (item for item in BETWEEN_ITEMS.split(plain) if item and not item.endswith(" -> unset"))


@pytest.mark.skipif(IS_WRITTEN, reason=f"the page is being written: unset {WRITE_VARIABLE}")
def test_outputs_say_what_the_page_says(steps: list[Step]) -> None:
    compared = [step for step in steps if step.kind == "text"]
    assert len(compared) == 4
    for step in compared:
        assert sorted(items(step.shown or "")) == sorted(items(step.output)), step.command


def test_the_cause_is_the_one_that_the_page_names(steps: list[Step], folder: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition("**The cause:**")
    assert len(STEP.findall(before)) == 5
    named = set(re.findall(r"`([^`]+)`", after.partition("\n\n")[0]))
    *_, gate = steps
    command = [str(Path(sys.executable).parent / "llmir-trace"), "diff", "good.llmtrace", "slow.llmtrace"]
    done = subprocess.run(
        [*command, "--explain", "--json"], cwd=folder, capture_output=True, text=True, timeout=COMMAND_S, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    row, found = result["functions"][0]["rows"][0], result["explanations"][0]
    flag = result["notes"][0].rpartition("only in B: ")[2]
    tile = found["reason"].partition("vector_common_parallel [")[2].partition(" -> ")[2].partition("]")[0] + "]"
    assert named == {flag, found["pass"], row["label"], "vector_common_parallel", tile}
    assert found["label"] == row["label"]
    assert row["share"] > 0.5
    assert gate.output == "exit code 1\n"


def test_the_machine_code_is_as_told(steps: list[Step], folder: Path) -> None:
    """One multiply-add into one accumulator, where the fast side has many."""
    multiply_add = re.compile(r"\sv?fm(?:add|la)\w*\s.*")
    [slow] = multiply_add.findall(next(step.output for step in steps if step.kind == "asm"))
    command = [str(Path(sys.executable).parent / "llmir-trace"), "ir", "good.llmtrace", "feed_forward_dispatch_1"]
    fast = subprocess.run(
        [*command, "--stage", "asm"], cwd=folder, capture_output=True, text=True, timeout=COMMAND_S, check=True
    ).stdout
    assert len(multiply_add.findall(fast)) >= 8
    assert slow


def test_the_other_matmul_is_the_same(steps: list[Step], folder: Path) -> None:
    command = [str(Path(sys.executable).parent / "llmir-trace"), "ir-diff", "good.llmtrace", "slow.llmtrace"]
    done = subprocess.run(
        [*command, "feed_forward_dispatch_0"], cwd=folder, capture_output=True, text=True, timeout=COMMAND_S, check=True
    )
    assert done.stdout.splitlines()[1] == "the same IR after every pass"


def test_versions_are_those_that_the_page_names() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert version("iree-base-compiler") == version("iree-base-runtime")
    assert f"iree-base-compiler and iree-base-runtime {version('iree-base-compiler')};" in text


def test_pictures_are_of_the_pages_that_the_commands_made(steps: list[Step], folder: Path, browser) -> None:
    taken = PAGE.parent / "pictures" if IS_WRITTEN else folder
    assert any("diff.html" in step.command for step in steps)
    browser.open(folder / "diff.html", width=WIDTH)
    browser.wait("document.querySelector('article .code')")
    browser.picture(taken / "diff.png", "header", ".waterfall")
    browser.open(folder / "slow.html", width=WIDTH)
    browser.wait("document.querySelectorAll('tbody tr').length === 3")
    browser.picture(taken / "step.png", "header", "[aria-label='Table of dispatches']")
    browser.run("document.querySelector('tbody button').click()")
    browser.wait("document.querySelector('.passes [role=option]')")
    browser.run(
        "[...document.querySelectorAll('.passes [role=option]')]"
        ".find((option) => option.textContent.includes('iree-codegen-generic-vectorization')).click()"
    )
    browser.wait("document.querySelector('.code').textContent.includes('vector.contract')")
    browser.run("document.querySelector('.code').lastElementChild.scrollIntoView({ block: 'end' })")
    browser.picture(taken / "passes.png", "dialog")
    shown = re.findall(r"!\[[^\]]+\]\(pictures/([\w-]+\.png)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(file.name for file in taken.glob("*.png"))
    for name in shown:
        size, committed = (taken / name).stat().st_size, (PAGE.parent / "pictures" / name).stat().st_size
        assert max(size, committed) < LARGEST_PICTURE_BYTES
