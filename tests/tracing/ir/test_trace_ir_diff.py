"""llmir-trace ir-diff: the pass, the hunk, and how each side is lowered."""

import json
from pathlib import Path

import pytest

from tests.tracing.ir.conftest import MATMUL, SOFTMAX, Compile, invoke
from tests.tracing.tuning import TUNING_PASS


def test_one_dispatch(changes: Path, badly_tiled: Path) -> None:
    done = invoke("ir-diff", changes, badly_tiled, "matmul")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == MATMUL
    assert lines[1].startswith(f"first parts at {TUNING_PASS}, which only B ran: tile sizes of linalg.matmul: ")
    assert "distribution [8, 64, 0] -> [2, 4, 0]" in lines[1]
    assert lines[3].startswith("@@ -")
    # Of the bytes of the spec, which hangs on the module, only the first are shown.
    assert any(line.startswith("+module attributes {iree_codegen.tuning_spec_mlirbc = dense<") for line in lines)
    assert max(map(len, lines[3:])) < 400
    assert any(line.startswith("passes that changed it in B only: ") and TUNING_PASS in line for line in lines)


def test_decisions_of_an_op_stand_side_by_side(changes: Path, badly_tiled: Path) -> None:
    """Also where one side has decided about an op that the other has not, such as the fill."""
    lines = invoke("ir-diff", changes, badly_tiled, MATMUL).stdout.splitlines()
    fill, matmul = lines.index("linalg.fill"), lines.index("linalg.matmul")
    assert lines[fill + 1].startswith("  A  #iree_cpu.lowering_config<")
    assert lines[fill + 2] == "  B  nothing"
    assert "distribution = [8, 64, 0]" in lines[matmul + 1]
    assert "distribution = [2, 4, 0]" in lines[matmul + 2]
    common = lines.index("func.func")
    assert lines[common + 1].startswith("  A, B  #iree_codegen.translation_info")


def test_all_dispatches(changes: Path, badly_tiled: Path) -> None:
    done = invoke("ir-diff", changes, badly_tiled)
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{MATMUL}: first parts at {TUNING_PASS}")
    assert second == f"{SOFTMAX}: the same"


def test_a_log_beside_a_folder(log: Path, changes: Path) -> None:
    done = invoke("ir-diff", log, changes, MATMUL)
    assert done.exit_code == 0
    assert done.stdout == f"{MATMUL}\nthe same IR after every pass\n"


def test_json(changes: Path, badly_tiled: Path) -> None:
    one = json.loads(invoke("ir-diff", changes, badly_tiled, MATMUL, "--json").stdout)
    assert (one["dispatch"], one["only_in"], one["modules"]) == (MATMUL, None, [])
    found = one["divergence"]
    assert (found["pass_name"], found["ran"], found["level"]) == (TUNING_PASS, "b", "builtin.module")
    assert TUNING_PASS in found["only_b"]
    assert {config["op"] for config in found["configs_b"]} == {"func.func", "linalg.matmul"}
    every = json.loads(invoke("ir-diff", changes, badly_tiled, "--json").stdout)
    assert [entry["dispatch"] for entry in every["dispatches"]] == [MATMUL, SOFTMAX]
    assert every["dispatches"][0]["divergence"] == found
    assert every["dispatches"][1]["divergence"] is None
    assert (every["only_a"], every["only_b"], every["program"]) == ([], [], None)


def test_a_dispatch_of_another_name(changes: Path, compile_program: Compile) -> None:
    flags = ("--mlir-disable-threading", "--mlir-print-ir-after-all", "--mlir-print-ir-tree-dir={}/tree")
    other = compile_program(*flags, "--iree-opt-generalize-matmul") / "tree"
    like = MATMUL.replace("matmul", "matmul_like")
    done = invoke("ir-diff", changes, other, MATMUL, "--dispatch-b", like)
    assert done.exit_code == 0, done.output
    assert "differs as soon as it is cut out of its program, which first parts at " in done.stdout
    # Without its other name it seems to be on one side alone; the program tells why.
    done = invoke("ir-diff", changes, other, MATMUL)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{MATMUL}: only in A\n")
    assert f"no dispatch matches '{MATMUL}'; the nearest: {like}" in done.stdout
    assert "first parts at iree-global-opt-generalize-linalg-named-ops, which only B ran" in done.stdout
    found = json.loads(invoke("ir-diff", changes, other, MATMUL, "--json").stdout)
    assert (found["dispatch"], found["only_in"]) == (MATMUL, "A")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("relu",), "no dispatch matches 'relu'; the nearest: "),
        (("main",), f"'main' matches 2 dispatches: {MATMUL}, {SOFTMAX}"),
        (("--dispatch-b", MATMUL), "--dispatch-b needs DISPATCH"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(changes: Path, arguments: tuple[str, ...], told: str) -> None:
    done = invoke("ir-diff", changes, changes, *arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
