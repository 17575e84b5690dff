"""What counts as a difference between texts, and what does not."""

from __future__ import annotations

from llmir_iree.tracing.ir_configs import describe_changes, find_configs
from llmir_iree.tracing.ir_scopes import find_scopes
from llmir_iree.tracing.ir_text import (
    count_changes,
    inline_aliases,
    normalise,
    parse_aliases,
    strip_locations,
    unified_diff,
)


def test_values_are_numbered_in_order() -> None:
    assert normalise("%c0 = f\n%7 = g %c0, %c0\n^bb2:") == normalise("%a = f\n%b_1 = g %a, %a\n^bb9:")
    assert normalise("g %a, %b") == normalise("g %b, %a")
    assert normalise("%a = f\n%b = f\ng %a, %b") != normalise("%a = f\n%b = f\ng %b, %a")


def test_the_processor_is_masked() -> None:
    text = '#hal.executable.target<"llvm-cpu", "elf", {cpu = "CPU", cpu_features = "+FEATURE", native = 16 : i64}>'
    assert normalise(text.replace("CPU", "a")) == normalise(text.replace("CPU", "b").replace("16", "64"))
    assert normalise(text) != normalise(text.replace("llvm-cpu", "cuda"))


def test_locations_are_dropped() -> None:
    text = 'f(%a) : i32 loc(callsite("a(b".mlir":1:2 at fused<"x">["c"("d":3:4), #loc7]))'
    assert strip_locations("g loc(#loc3)\nh loc(unknown)") == "g\nh"
    assert strip_locations(text.replace('"a(b".mlir"', '"a(b.mlir"')) == "f(%a) : i32"
    assert strip_locations("memref.alloc(%a)") == "memref.alloc(%a)"


def test_aliases_are_replaced_through_each_other() -> None:
    aliases = parse_aliases("#map = affine_map<(d0) -> (d0)>\n#two = [#map, #map1]\n#loc = loc(unknown)\n")
    assert inline_aliases("f #two, #map", aliases) == ("f [affine_map<(d0) -> (d0)>, #map1], affine_map<(d0) -> (d0)>")
    assert "#loc" not in aliases


def test_a_diff_ignores_numbers_but_not_operands() -> None:
    before = "%0 = f\n%1 = g %0\n%2 = h %1"
    assert unified_diff(before, "%1 = f\n%2 = g %1\n%3 = h %2") == ""
    shifted = unified_diff(before, "%0 = f\n%1 = new\n%2 = g %0\n%3 = h %2", context=0)
    assert shifted.splitlines()[3:] == ["+%1 = new"]
    swapped = unified_diff("%0 = f\n%1 = f\ng %0, %1", "%0 = f\n%1 = f\ng %1, %0")
    assert count_changes(swapped) == (1, 1)


def test_far_changes_stand_in_hunks_of_their_own() -> None:
    lines = [f"op{index}" for index in range(40)]
    changed = ["x", *lines[1:20], "y", *lines[21:39], "z"]
    diff = unified_diff("\n".join(lines), "\n".join(changed), context=2)
    assert [line for line in diff.splitlines() if line.startswith("@@")] == [
        "@@ -1,3 +1,3 @@",
        "@@ -19,5 +19,5 @@",
        "@@ -38,3 +38,3 @@",
    ]
    assert count_changes(diff) == (3, 3)


def test_scopes_are_found_and_torn_ones_are_not() -> None:
    text = (
        b"#map = x\nmodule @m {\n  hal.executable private @e {\n    builtin.module {\n      func.func @f() {\n      }\n"
    )
    assert find_scopes(text) == []
    [module] = find_scopes(text + b"    }\n  }\n  func.func private @declared()\n}\n")
    assert [(scope.op, scope.symbol) for scope in module.walk()] == [
        ("builtin.module", "m"),
        ("hal.executable", "e"),
        ("builtin.module", None),
        ("func.func", "f"),
    ]


def test_decisions_are_told_by_what_changed() -> None:
    line = "%3 = linalg.matmul {lowering_config = #iree_cpu.lowering_config<distribution = [64, 64, 0]>} ins(%0)"
    before = find_configs(line)
    assert [config.op for config in before] == ["linalg.matmul"]
    after = find_configs(line.replace("64, 64", "16, 16"))
    assert describe_changes(before, after) == ("tile sizes of linalg.matmul: distribution [64, 64, 0] -> [16, 16, 0]")
    assert describe_changes(before, before) == ""
    nested = find_configs("%1 = linalg.generic {lowering_config = #x.c<tile_sizes = [[64, 64, 0], [8]]>, a = 1}")
    assert nested[0].fields == {"tile_sizes": "[[64, 64, 0], [8]]"}
