"""Matching of dispatches: what is recognised by what, that order is kept, and that nothing is dropped."""

from collections.abc import Sequence

import pytest

from llmir_iree.tracing.capture import DispatchRun, Site
from llmir_iree.tracing.match import Match, Place, find_places, match_places

LAYERS = 22


def site(ordinal: int, key: str, kind: str = "matmul", function: str = "decode", **facts: object) -> Site:
    return Site(function=function, site=ordinal, key=key, executable=key.partition(".")[0], kind=kind, **facts)


def place(ordinal: int, key: str, facts: Site | None = None, function: str = "decode") -> Place:
    return Place(function, ordinal, key, (1, 1, 1), facts)


def known(ordinal: int, key: str, kind: str = "matmul", **facts: object) -> Place:
    return place(ordinal, key, site(ordinal, key, kind, **facts))


def pairs(matches: Sequence[Match]) -> list[tuple[int | None, int | None]]:
    return [(match.a.site if match.a else None, match.b.site if match.b else None) for match in matches]


def test_the_same_places_match_one_to_one() -> None:
    places = [known(n, f"k{n % 5}", layer=n // 5, weight=f"w{n}") for n in range(5 * LAYERS)]
    matches = match_places(places, places)
    assert pairs(matches) == [(n, n) for n in range(5 * LAYERS)]
    assert {match.basis for match in matches} == {"export"}


def test_ordinals_that_shift_do_not_part_places() -> None:
    a = [place(n, f"decode$async_dispatch_{n}_{op}_2048") for n, op in enumerate(["norm", "add", "matmul", "softmax"])]
    b = [place(n, f"decode$async_dispatch_{n}_{op}_2048") for n, op in enumerate(["norm", "matmul", "softmax"])]
    assert pairs(match_places(a, b)) == [(0, 0), (1, None), (2, 1), (3, 2)]


def test_a_layer_that_is_different_shifts_no_other_layer() -> None:
    """All layers share exports here, and no facts tell them apart: order has to."""
    ops = [("norm", "matmul", "add", "attend")] * LAYERS
    fused = [*ops[:3], ("norm", "matmul_add", "attend"), *ops[4:]]
    sides = [
        [place(n, op) for n, op in enumerate(["embed", *(op for layer in layers for op in layer), "head"])]
        for layers in (ops, fused)
    ]
    matches = match_places(*sides)
    expected = [(n, n) for n in range(14)] + [(14, None), (15, None), (None, 14)]
    expected += [(n, n - 1) for n in range(16, 4 * LAYERS + 2)]
    assert sorted(pairs(matches), key=str) == sorted(expected, key=str)


def test_layers_that_share_an_export_match_by_layer() -> None:
    """B has lost the first layer: its other layers are not taken for their neighbours."""
    a = [known(n, "k", layer=n, weight=f"blk.{n}.down") for n in range(LAYERS)]
    b = [known(n - 1, "k", layer=n, weight=f"blk.{n}.down") for n in range(1, LAYERS)]
    assert pairs(match_places(a, b)) == [(0, None)] + [(n, n - 1) for n in range(1, LAYERS)]


def test_another_export_matches_by_operation() -> None:
    a, b = known(3, "x", shape="1x2048x5632", op="torch.mm"), known(4, "y", shape="1x2048x5632", op="torch.mm")
    assert [(m.a, m.b, m.basis) for m in match_places([a], [b])] == [(a, b, "operation")]


def test_another_kernel_of_the_same_weight_matches() -> None:
    a = known(3, "x", "quantized_matmul", shape="1x2048x5632", weight="blk.0.up")
    b = known(9, "y", "matmul_like", shape="5632", weight="blk.0.up")
    assert [match.basis for match in match_places([a], [b])] == ["operation"]


def test_the_source_line_comes_last() -> None:
    a = known(0, "x", "softmax", shape="32x1x64", op="torch.softmax", line=12)
    b = known(0, "y", "reduction", shape="32x64", op="torch.softmax", line=12)
    assert [match.basis for match in match_places([a], [b])] == ["line"]
    better = known(1, "z", "softmax", shape="32x1x64", op="torch.softmax", line=14)
    assert pairs(match_places([a], [b, better])) == [(None, 0), (0, 1)]


@pytest.mark.parametrize("other", [{"layer": 1}, {"weight": "blk.1.up"}])
def test_one_export_at_another_call_site_is_another_place(other: dict[str, object]) -> None:
    facts = {"layer": 0, "weight": "blk.0.up"}
    matches = match_places([known(0, "k", **facts)], [known(0, "k", **(facts | other))])
    assert sorted(pairs(matches), key=str) == [(0, None), (None, 0)]


def test_nothing_in_common_drops_nothing() -> None:
    matches = match_places([place(0, "x"), place(1, "y")], [place(0, "z")])
    assert sorted(pairs(matches), key=str) == [(0, None), (1, None), (None, 0)]
    assert {match.basis for match in matches} == {None}


def test_what_is_unknown_on_both_sides_is_not_alike() -> None:
    assert match_places([known(0, "x", "other")], [known(0, "y", "other")])[0].basis is None


def test_functions_are_kept_apart() -> None:
    a = [place(0, "k", function="decode"), place(0, "k", function="prefill")]
    matches = match_places(a, [place(0, "k", function="prefill")])
    assert [(match.function, match.basis) for match in matches] == [("decode", None), ("prefill", "export")]


def test_places_are_found_with_and_without_facts() -> None:
    def run(call: int, ordinal: int, key: str, workgroups: tuple[int, int, int]) -> DispatchRun:
        return DispatchRun(
            process=0,
            call=call,
            function="decode",
            site=ordinal,
            key=key,
            start_ns=0,
            duration_ns=1,
            tile_ns=1,
            tiles=1,
            workgroups=workgroups,
        )

    runs = [run(0, 0, "x", (4, 1, 1)), run(1, 0, "x", (8, 1, 1)), run(1, 1, "y", (1, 1, 1))]
    facts = site(0, "x", shape="64")
    assert find_places(runs, [facts]) == [
        Place("decode", 0, "x", (4, 1, 1), facts),
        Place("decode", 1, "y", (1, 1, 1), None),
    ]
