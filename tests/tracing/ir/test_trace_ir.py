"""llmir-trace ir: a list, a table, texts and diffs, of a capture, a folder and a log."""

import json
import shutil
from pathlib import Path

import pytest

from llmir_iree.tracing.capture import MANIFEST_NAME, PASSES_NAME, Capture
from llmir_iree.tracing.ir_history import IrDump
from tests.tracing.ir.conftest import MATMUL, SOFTMAX, invoke

STRATEGY = "iree-llvmcpu-select-lowering-strategy"


@pytest.mark.parametrize("kind", ["changes", "log"])
def test_all_dispatches_are_listed(kind: str, request: pytest.FixtureRequest) -> None:
    done = invoke("ir", request.getfixturevalue(kind))
    assert done.exit_code == 0, done.output
    head, *rows = [line.split("  ") for line in done.stdout.splitlines()]
    assert head[0] == "dispatch"
    assert [row[0].strip() for row in rows] == [MATMUL, SOFTMAX]
    assert all(int(row[-1]) > 30 for row in rows)


def test_a_log_and_a_folder_say_the_same(changes: Path, log: Path) -> None:
    for arguments in ((MATMUL,), ("softmax", "--pass", STRATEGY, "--diff"), ("softmax", "--json")):
        of_folder, of_log = invoke("ir", changes, *arguments), invoke("ir", log, *arguments)
        assert of_folder.exit_code == 0, of_folder.output
        assert of_folder.stdout == of_log.stdout


def test_a_table_has_a_line_for_every_pass_that_changed_it(changes: Path) -> None:
    history = IrDump.open(changes).find(MATMUL)
    done = invoke("ir", changes, "matmul")
    title, head, *rows = done.stdout.splitlines()
    assert title == f"// {MATMUL} in main_dispatch_0"
    assert head.split() == ["step", "level", "pass", "added", "removed"]
    assert [tuple(row.split()) for row in rows] == [
        (str(number), step.level, step.pass_name, f"+{step.lines[0]}", f"-{step.lines[1]}")
        for number, step in enumerate(history.steps, 1)
    ]


def test_the_ir_after_a_pass(changes: Path) -> None:
    done = invoke("ir", changes, MATMUL, "--pass", STRATEGY)
    lines = done.stdout.splitlines()
    assert lines[1].endswith(f": {STRATEGY} on builtin.module")
    assert sum("lowering_config = #" in line for line in lines) == 2
    number = lines[1].split()[2].rstrip(":")
    # By its number, and by a part of its name, the same step.
    assert invoke("ir", changes, MATMUL, "--pass", number).stdout == done.stdout
    assert invoke("ir", changes, MATMUL, "--pass", "select-lowering").stdout == done.stdout


def test_a_pass_that_ran_often_is_shown_each_time(changes: Path) -> None:
    steps = [step for step in IrDump.open(changes).find(MATMUL).steps if step.pass_name == "canonicalize"]
    assert len(steps) > 1
    done = invoke("ir", changes, MATMUL, "--pass", "canonicalize")
    assert done.stdout.count("// step ") == len(steps)


def test_a_diff_of_one_step_and_of_all(changes: Path) -> None:
    one = invoke("ir", changes, MATMUL, "--pass", STRATEGY, "--diff").stdout
    body = [line for line in one.splitlines() if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    assert sum(line.startswith("+") for line in body) == sum(line.startswith("-") for line in body) == 3
    whole = invoke("ir", changes, MATMUL, "--diff").stdout
    assert one.split("\n", 1)[1] in whole
    assert whole.count("// step ") == len(IrDump.open(changes).find(MATMUL).steps)


def test_a_pattern_shows_all_that_match(changes: Path) -> None:
    done = invoke("ir", changes, "main_dispatch_*", "--json")
    assert [entry["name"] for entry in json.loads(done.stdout)] == [MATMUL, SOFTMAX]


def test_json_has_texts_only_if_they_were_asked_for(changes: Path) -> None:
    [entry] = json.loads(invoke("ir", changes, MATMUL, "--json").stdout)
    assert entry["executable"] == "main_dispatch_0"
    assert entry["exports"] == [MATMUL]
    assert set(entry["steps"][0]) == {"step", "pass", "options", "level", "added", "removed"}
    [entry] = json.loads(invoke("ir", changes, MATMUL, "--json", "--pass", STRATEGY).stdout)
    assert f"func.func @{MATMUL}" in entry["steps"][0]["text"]
    [entry] = json.loads(invoke("ir", changes, MATMUL, "--json", "--pass", STRATEGY, "--diff").stdout)
    assert entry["steps"][0]["diff"].startswith("--- before\n+++ after ")
    listed = json.loads(invoke("ir", changes, "--json").stdout)
    assert [row["name"] for row in listed["dispatches"]] == [MATMUL, SOFTMAX]


@pytest.mark.parametrize(("stage", "told"), [("llvm", "define "), ("asm", "\n\t")])
def test_machine_code_of_a_capture(small_capture: Capture, stage: str, told: str) -> None:
    done = invoke("ir", small_capture.folder, "matmul", "--stage", stage)
    assert done.exit_code == 0, done.output
    assert "main_dispatch_0_matmul" in done.stdout.splitlines()[0]
    assert told in done.stdout
    found = json.loads(invoke("ir", small_capture.folder, "matmul", "--stage", stage, "--json").stdout)
    assert found["stage"] == stage
    assert found["text"] == done.stdout


def test_machine_code_without_ir_goes_by_the_full_name(small_capture: Capture, tmp_path: Path) -> None:
    name = IrDump.open(small_capture.folder).find("matmul").name
    shutil.copytree(small_capture.ir / "binaries", tmp_path / "binaries")
    done = invoke("ir", tmp_path, name, "--stage", "asm")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{name}:")
    done = invoke("ir", tmp_path, "matmul", "--stage", "asm")
    assert done.exit_code == 2
    assert "no .s file and no binary holds matmul" in done.stderr or "names matmul" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("main_dispatch_7",), "no dispatch matches 'main_dispatch_7'; the nearest: main_dispatch_"),
        (("main_dispatch_7", "--stage", "asm"), "no dispatch matches 'main_dispatch_7'; the nearest: main_dispatch_"),
        (("main", "--stage", "llvm"), f"'main' matches 2 dispatches: {MATMUL}, {SOFTMAX}"),
        ((MATMUL, "--stage", "llvm"), f"no .ll file defines {MATMUL}; iree-compile keeps them with --iree-hal-dump"),
        ((MATMUL, "--pass", "select-lowering-stratagem"), f"changed it; the nearest: {STRATEGY}"),
        ((MATMUL, "--pass", "999"), "no pass '999' changed it; "),
        (("--diff",), "need the name of a dispatch; without one, all are listed"),
        ((MATMUL, "--stage", "asm", "--diff"), "--pass and --diff go with --stage mlir"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(changes: Path, arguments: tuple[str, ...], told: str) -> None:
    done = invoke("ir", changes, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_capture_without_ir_is_told(small_capture: Capture, tmp_path: Path) -> None:
    copy = tmp_path / "copy.llmtrace"
    shutil.copytree(small_capture.folder, copy, ignore=shutil.ignore_patterns("ir"))
    done = invoke("ir", copy)
    assert done.exit_code == 2
    assert "was recorded without IR; record it with --with ir" in done.stderr


def test_a_capture_of_the_first_version_is_read(small_capture: Capture, changes: Path, tmp_path: Path) -> None:
    """It held the IR as a folder."""
    old = tmp_path / "old.llmtrace"
    shutil.copytree(small_capture.folder, old, ignore=shutil.ignore_patterns(PASSES_NAME))
    shutil.copytree(changes, old / "ir" / "tree")
    manifest = json.loads((old / MANIFEST_NAME).read_text())
    (old / MANIFEST_NAME).write_text(json.dumps({**manifest, "schema_version": 1}))
    assert Capture.open(old).has_passes
    assert invoke("ir", old, MATMUL).stdout == invoke("ir", changes, MATMUL).stdout


def test_a_torn_capture_is_told(small_capture: Capture, tmp_path: Path) -> None:
    copy = tmp_path / "copy.llmtrace"
    shutil.copytree(small_capture.folder, copy)
    file = copy / "ir" / PASSES_NAME
    file.write_bytes(file.read_bytes()[:-100])
    done = invoke("ir", copy)
    assert done.exit_code == 2
    assert "passes.mlir.zst: torn" in done.stderr
