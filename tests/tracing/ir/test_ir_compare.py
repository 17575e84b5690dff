"""Differences planted in a compilation, and the pass that they are found at."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmir_iree.tracing.ir_compare import compare, compare_programs, match_dispatches
from llmir_iree.tracing.ir_history import IrDump
from tests.tracing.ir.conftest import MATMUL, SOFTMAX
from tests.tracing.tuning import TUNING_PASS

# With threads, iree-compile 3.13 was seen to hang while it writes a folder.
FLAGS = (
    "--mlir-disable-threading",
    "--mlir-print-ir-after-all",
    "--mlir-print-ir-after-change",
    "--mlir-print-ir-tree-dir={}/tree",
)


@pytest.fixture(scope="module")
def base(changes: Path) -> IrDump:
    return IrDump.open(changes)


def test_the_same_compilation_does_not_part(base: IrDump, tree: Path, compile_program) -> None:
    again = IrDump.open(compile_program(*FLAGS) / "tree")
    # A folder of all passes as well: those that changed nothing are left out.
    for other in (again, IrDump.open(tree)):
        assert [compare(ours, theirs) for ours, theirs in match_dispatches(base, other).pairs] == [None, None]
        assert compare_programs(base, other) is None


def test_another_processor_parts_at_the_choice_of_tiles(base: IrDump, compile_program) -> None:
    other = IrDump.open(compile_program(*FLAGS, cpu="--iree-llvmcpu-target-cpu=generic") / "tree")
    found = compare(base.find(MATMUL), other.find(MATMUL))
    assert found is not None
    assert (found.pass_name, found.level, found.ran) == (
        "iree-llvmcpu-select-lowering-strategy",
        "builtin.module",
        "both",
    )
    assert found.summary().startswith(
        "first parts at iree-llvmcpu-select-lowering-strategy: tile sizes of linalg.matmul: "
    )
    assert "-  %" in found.hunk
    assert "+  %" in found.hunk
    assert "iree-llvmcpu-peel" in found.only_b
    ours, theirs = (
        next(config for config in configs if config.op == "linalg.matmul")
        for configs in (found.configs_a, found.configs_b)
    )
    assert ours.fields["vector_common_parallel"] != theirs.fields["vector_common_parallel"]


def test_a_bad_tile_parts_where_it_was_asked_for(base: IrDump, badly_tiled: Path) -> None:
    other = IrDump.open(badly_tiled)
    found = compare(base.find(MATMUL), other.find(MATMUL))
    assert found is not None
    assert (found.pass_name, found.ran) == (TUNING_PASS, "b")
    assert "tile sizes of linalg.matmul: distribution [8, 64, 0] -> [2, 4, 0]" in found.summary()
    assert max(map(len, found.hunk.splitlines())) < 500
    assert compare(base.find(SOFTMAX), other.find(SOFTMAX)) is None


def test_what_a_pass_of_the_program_did_is_found_there(base: IrDump, compile_program) -> None:
    other = IrDump.open(compile_program(*FLAGS, "--iree-opt-generalize-matmul") / "tree")
    matching = match_dispatches(base, other)
    # The dispatch has another name now; the executable still has the same.
    assert [(ours.name, theirs.name) for ours, theirs in matching.pairs] == [
        (MATMUL, "main_dispatch_0_matmul_like_8x64x64_f32"),
        (SOFTMAX, SOFTMAX),
    ]
    found = compare(*matching.pairs[0])
    assert found is not None
    assert found.is_before_dispatch
    assert (found.level, found.pass_name, found.ran) == (
        "program",
        "iree-global-opt-generalize-linalg-named-ops",
        "b",
    )
    assert " = linalg.generic" in found.hunk
    assert compare(*matching.pairs[1]) is None


def test_the_same_ir_for_another_processor_is_told(base: IrDump, compile_program) -> None:
    other = IrDump.open(compile_program(*FLAGS, cpu="--iree-llvmcpu-target-cpu=skylake-avx512") / "tree")
    found = compare(base.find(MATMUL), other.find(MATMUL))
    assert found is not None
    assert found.level == "target"
    assert found.summary() == (
        "the same IR after every pass; LLVM is told of another processor: cpu: x86-64-v4 -> skylake-avx512"
    )


def test_another_program_parts_before_the_first_pass(base: IrDump, tmp_path: Path, changes: Path) -> None:
    root = tmp_path / "tree"
    for file in changes.rglob("*.mlir"):
        copy = root / file.relative_to(changes)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace("f32", "f64"))
    found = compare(base.find("main_dispatch_1"), IrDump.open(root).find("main_dispatch_1"))
    assert found is not None
    assert found.is_input
    assert found.summary().startswith("part before the first pass: what iree-compile was given differs, +")
