"""Histories of dispatches: the same from a folder and from every kind of log."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmir_iree.tracing.capture import PASSES_NAME, CaptureError
from llmir_iree.tracing.ir_dump import pack_tree
from llmir_iree.tracing.ir_history import IrDump, IrHistory
from llmir_iree.tracing.ir_text import normalise
from tests.tracing.ir.conftest import MATMUL, SOFTMAX

LARGE_LOG_BYTES = 60_000_000
MOST_MEMORY_BYTES = 100_000_000


def outline(history: IrHistory) -> list[tuple[str, str, str, tuple[int, int]]]:
    return [(step.level, step.pass_name, step.options, step.lines) for step in history.steps]


def texts(history: IrHistory) -> list[str]:
    return [step.text for step in history.steps]


def test_a_folder_holds_all_dispatches(tree: Path) -> None:
    dump = IrDump.open(tree)
    assert [(history.name, history.executable) for history in dump.dispatches] == [
        (MATMUL, "main_dispatch_0"),
        (SOFTMAX, "main_dispatch_1"),
    ]


def test_a_history_begins_where_the_dispatch_does_and_ends_in_llvm(tree: Path) -> None:
    history = IrDump.open(tree).find(MATMUL)
    names = [step.pass_name for step in history.steps]
    assert names[0] == "iree-flow-outline-dispatch-regions"
    order = ["iree-hal-materialize-interfaces", "iree-llvmcpu-select-lowering-strategy", "iree-convert-to-llvm"]
    assert [name for name in names if name in order] == order
    last = next(step for step in history.steps if step.pass_name == "iree-convert-to-llvm")
    assert f"llvm.func @{MATMUL}" in last.text
    assert last.level == "builtin.module"


def test_a_step_changed_something(tree: Path) -> None:
    for history in IrDump.open(tree).dispatches:
        for step in history.steps:
            assert step.lines != (0, 0), step.pass_name
            assert step.diff().startswith("--- before\n+++ after ")


def test_lines_are_counted(tree: Path) -> None:
    step = next(
        step
        for step in IrDump.open(tree).find(MATMUL).steps
        if step.pass_name == "iree-llvmcpu-select-lowering-strategy"
    )
    # The function, the fill and the matmul get an attribute each.
    assert step.lines == (3, 3)
    assert step.diff().count("lowering_config = ") == 2


@pytest.mark.parametrize("threading", [(), ("--mlir-disable-threading",)], ids=["threads", "no-threads"])
def test_a_log_is_as_good_as_a_folder(tree: Path, compile_program, threading: tuple[str, ...]) -> None:
    log = IrDump.open(compile_program("--mlir-print-ir-after-all", *threading) / "log")
    folder = IrDump.open(tree)
    for ours, theirs in zip(folder.dispatches + folder.programs, log.dispatches + log.programs, strict=True):
        assert outline(ours) == outline(theirs)
        assert texts(ours) == texts(theirs)


def test_a_log_at_module_scope_is_as_good_too(tree: Path, compile_program) -> None:
    flags = ("--mlir-print-ir-after-all", "--mlir-print-ir-module-scope", "--mlir-disable-threading")
    log = IrDump.open(compile_program(*flags) / "log")
    for ours, theirs in zip(IrDump.open(tree).dispatches, log.dispatches, strict=True):
        assert outline(ours) == outline(theirs)
        assert list(map(normalise, texts(ours))) == list(map(normalise, texts(theirs)))


def test_a_log_of_changes_is_as_good_as_a_folder_of_changes(changes: Path, compile_program) -> None:
    log = IrDump.open(compile_program("--mlir-print-ir-after-all", "--mlir-print-ir-after-change") / "log")
    for ours, theirs in zip(IrDump.open(changes).dispatches, log.dispatches, strict=True):
        assert outline(ours) == outline(theirs)
        assert texts(ours) == texts(theirs)


def test_locations_do_not_count(changes: Path, compile_program) -> None:
    flags = ("--mlir-print-ir-after-all", "--mlir-print-ir-after-change", "--mlir-print-debuginfo")
    log = IrDump.open(compile_program(*flags) / "log")
    for ours, theirs in zip(IrDump.open(changes).dispatches, log.dispatches, strict=True):
        assert outline(ours) == outline(theirs)


def test_a_packed_folder_is_the_same_and_much_smaller(tree: Path, tmp_path: Path) -> None:
    packed = tmp_path / PASSES_NAME
    pack_tree(tree, packed)
    for ours, theirs in zip(IrDump.open(tree).dispatches, IrDump.open(tmp_path).dispatches, strict=True):
        assert outline(ours) == outline(theirs)
        assert texts(ours) == texts(theirs)
        assert ours.names == theirs.names
    # All passes, of which most leave most as it was.
    assert packed.stat().st_size < sum(file.stat().st_size for file in tree.rglob("*.mlir")) / 40


def test_a_folder_whose_files_are_compressed_is_the_same(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    for file in (tmp_path / "tree").rglob("*.mlir"):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes(), 1))
        file.unlink()
    for ours, theirs in zip(IrDump.open(tree).dispatches, IrDump.open(tmp_path / "tree").dispatches, strict=True):
        assert texts(ours) == texts(theirs)


def test_a_warning_between_dumps_does_no_harm(threaded_log: Path, tmp_path: Path) -> None:
    text = threaded_log.read_text()
    mark = "// -----// IR Dump After"
    noisy = tmp_path / "log"
    noisy.write_text(text.replace(mark, f"small.mlir:3:5: warning: something\n{mark}"))
    for ours, theirs in zip(IrDump.open(threaded_log).dispatches, IrDump.open(noisy).dispatches, strict=True):
        assert texts(ours) == texts(theirs)


def test_a_log_that_ends_in_a_dump_keeps_the_others(threaded_log: Path, tmp_path: Path) -> None:
    data = threaded_log.read_bytes()
    cut = tmp_path / "log"
    cut.write_bytes(data[: data.index(b"IR Dump After LLVMCPUSelectLoweringStrategyPass") + 900])
    steps = IrDump.open(cut).find(MATMUL).steps
    assert texts(IrDump.open(threaded_log).find(MATMUL))[: len(steps)] == [step.text for step in steps]
    assert steps[-1].pass_name != "iree-convert-to-llvm"


def test_a_large_log_takes_little_memory(threaded_log: Path, tmp_path: Path) -> None:
    data = threaded_log.read_bytes()
    large = tmp_path / "log"
    with large.open("wb") as stream:
        for copy in range(-(-LARGE_LOG_BYTES // len(data))):
            # Other names in each copy, so that no text is met twice.
            stream.write(data.replace(b"main", b"m%03d" % copy))
    program = (
        "import sys; from pathlib import Path; from llmir_iree.tracing.ir_history import IrDump;"
        "dispatches = IrDump.open(Path(sys.argv[1])).dispatches;"
        # Not by getrusage, which counts what the parent had when it forked.
        "status = Path('/proc/self/status').read_text().split();"
        "print(len(dispatches), status[status.index('VmHWM:') + 1])"
    )
    command = [sys.executable, "-c", program, str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    dispatches, peak_kb = map(int, done.stdout.split())
    assert dispatches > 2
    assert large.stat().st_size >= LARGE_LOG_BYTES
    assert peak_kb * 1024 < MOST_MEMORY_BYTES


def test_a_constant_as_long_as_a_file_takes_little_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    function = b"func.func @f() {\n  return\n}\n"
    with log.open("wb") as stream:
        stream.write(
            b"// -----// IR Dump After CSEPass: cse //----- //\nmodule @m {\n  func.func @f() {\n  }\n}\n{-#\n"
        )
        for _ in range(100):
            stream.write(b"0" * 1_000_000)
        stream.write(b"\n#-}\n// -----// IR Dump After XPass: x //----- //\n" + function)
    [program] = IrDump.open(log).programs
    assert [step.pass_name for step in program.steps] == ["cse", "x"]


def test_a_name_is_found_by_a_part_and_by_a_pattern(tree: Path) -> None:
    dump = IrDump.open(tree)
    for name in (MATMUL, "main_dispatch_0", "matmul", "*_0_matmul_*"):
        assert dump.find(name).name == MATMUL
    with pytest.raises(CaptureError, match=rf"'main' matches 2 dispatches: {MATMUL}, {SOFTMAX}"):
        dump.find("main")


def test_a_name_that_matches_nothing_meets_the_nearest(tree: Path) -> None:
    with pytest.raises(CaptureError, match=r"no dispatch matches 'main_dispatch_7'; the nearest: main_dispatch_"):
        IrDump.open(tree).find("main_dispatch_7")


def test_what_holds_no_ir_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such file or folder"):
        IrDump.open(tmp_path / "nothing")
    with pytest.raises(CaptureError, match="holds no IR; iree-compile writes one with --mlir-print-ir-after-all"):
        IrDump.open(tmp_path)
    log = tmp_path / "log"
    log.write_text("error: nothing was compiled\n")
    with pytest.raises(CaptureError, match="holds no IR"):
        IrDump.open(log)


def test_a_torn_compressed_log_is_refused(threaded_log: Path, tmp_path: Path) -> None:
    torn = tmp_path / "log.gz"
    torn.write_bytes(gzip.compress(threaded_log.read_bytes(), 1)[:-100])
    with pytest.raises(CaptureError, match=r"log\.gz: cannot be read"):
        IrDump.open(torn)


def test_a_file_that_became_shorter_is_refused(threaded_log: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    shutil.copy(threaded_log, log)
    step = IrDump.open(log).find(MATMUL).steps[-1]
    log.write_bytes(b"")
    with pytest.raises(CaptureError, match="has become shorter"):
        _ = step.text
