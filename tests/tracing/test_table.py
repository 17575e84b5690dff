"""The table: rows add up to the step, and each grouping adds up to the same."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from llmir_iree.tracing.capture import Call, Capture, CaptureError, CaptureManifest, DispatchRun, Site, write_rows
from llmir_iree.tracing.table import (
    BETWEEN,
    GROUPINGS,
    GroupBy,
    TableRow,
    aggregate,
    balance,
    filter_rows,
    sort_rows,
    steady_calls,
    top_rows,
)

# Of each call: (site, key, start, duration, workgroup time), in nanoseconds from its beginning. Two overlap.
CALL_NS, GAP_NS = 1000, 100
DISPATCHES = (
    (0, "norm", 50, 50, 50),
    (1, "matmul", 100, 400, 800),
    (2, "matmul", 450, 150, 300),
    (3, "head", 700, 200, 400),
)
SITES = (("norm", "norm", 0, "8", 10), ("matmul", "matmul", 0, "8x8", 4000), ("matmul", "matmul", 1, "8x4", 1000))
BETWEEN_NS = CALL_NS + GAP_NS - (50 + 500 + 200)
DISPATCHED_NS = 50 + 400 + 150 + 200

Make = Callable[..., Capture]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a capture of two processes with calls that are all alike, but for a slow first one."""

    def write(calls: int = 4, warm_up: int = 1, with_sites: bool = True, clock_ns: int | None = None) -> Capture:
        folder = tmp_path / "made.llmtrace"
        folder.mkdir()
        rows, runs = [], []
        for process in range(2):
            for call in range(calls):
                start = call * (CALL_NS + GAP_NS)
                rows.append(Call(process=process, call=call, function="decode", start_ns=start, wall_ns=CALL_NS))
                for site, key, begin, duration, tile in DISPATCHES:
                    slow = 3 if call < warm_up and site == 0 else 0
                    runs.append(
                        DispatchRun(
                            process=process,
                            call=call,
                            function="decode",
                            site=site,
                            key=key,
                            start_ns=start + begin - slow,
                            duration_ns=duration + slow,
                            tile_ns=tile,
                            tiles=4,
                            workgroups=(4, 1, 1),
                        )
                    )
        write_rows(folder, Call, rows)
        write_rows(folder, DispatchRun, runs)
        if with_sites:
            known = [
                Site(
                    function="decode",
                    site=number,
                    key=key,
                    executable=key,
                    kind=kind,
                    layer=layer,
                    shape=shape,
                    weight=f"layers.{layer}.{kind}.weight",
                    bytes_read=nbytes,
                    bytes_written=0,
                    flops=2 * nbytes,
                )
                for number, (key, kind, layer, shape, nbytes) in enumerate(SITES)
            ]
            head = Site(function="decode", site=3, key="head", executable="head", kind="head")
            write_rows(folder, Site, [*known, head])
        each = (CALL_NS + GAP_NS) * calls
        manifest = CaptureManifest.model_validate(
            {
                "created": "2026-01-01T00:00:00+00:00",
                "subject": "made",
                "phase": None,
                "functions": ("decode",),
                "processes": 2,
                "warm_up_calls": warm_up,
                "clock_ns": (clock_ns or each,) * 2,
                "device": "local-task",
                "versions": {},
                "modules": {},
                "machine": {"cpu": "test", "cores": 2, "bandwidth_bytes_s": 20e9, "peak_macs_s": 10e9},
                "sources": ("ireeprof",),
            }
        )
        return Capture.create(folder, manifest)

    return write


def test_rows_of_a_dispatch(make: Make) -> None:
    large, *_ = rows = aggregate(make(), "dispatch")
    assert [row.name for row in rows] == ["matmul 8x8", "head", "matmul 8x4", "norm", BETWEEN]
    assert (large.count, large.median_ns, large.min_ns, large.total_ns) == (1, 400, 400, 400)
    assert large.share == pytest.approx(400 / (CALL_NS + GAP_NS))
    assert (large.cpu_ns, large.parallelism, large.workgroups) == (800, 2, (4, 1, 1))
    assert large.bandwidth == pytest.approx(4000 / 400e-9)
    assert large.bandwidth_share == pytest.approx(0.5)
    assert large.throughput_share == pytest.approx(8000 / 400e-9 / 20e9)
    assert (large.layer, large.weight, large.sites) == (0, "layers.0.matmul.weight", (1,))


def test_time_between_covers_what_overlaps_once(make: Make) -> None:
    between = aggregate(make())[-1]
    assert between.is_between
    assert (between.total_ns, between.median_ns, between.min_ns) == (BETWEEN_NS, BETWEEN_NS, BETWEEN_NS)


@pytest.mark.parametrize("by", GROUPINGS)
def test_every_grouping_adds_up_to_the_same(make: Make, by: GroupBy) -> None:
    rows = aggregate(make(), by)
    assert sum(row.total_ns for row in rows) == pytest.approx(DISPATCHED_NS + BETWEEN_NS)
    assert sorted(site for row in rows for site in row.sites) == [0, 1, 2, 3]


def test_groupings_are_all_listed() -> None:
    assert get_args(GroupBy) == GROUPINGS


def test_kinds_add_what_is_known_of_all(make: Make) -> None:
    rows = {row.name: row for row in aggregate(make(), "kind")}
    assert rows["matmul"].nbytes == 5000
    assert rows["matmul"].count == 2
    assert rows["matmul"].layer is None
    assert rows["head"].nbytes is None


def test_layers_stand_in_their_order(make: Make) -> None:
    rows = sort_rows(aggregate(make(), "layer"), "layer")
    assert [row.name for row in rows] == ["layer 0", "layer 1", "outside layers", BETWEEN]


def test_first_calls_are_left_out(make: Make) -> None:
    capture = make()
    assert [call.call for call in steady_calls(capture)] == [1, 2, 3] * 2
    assert next(row for row in aggregate(capture) if row.name == "norm").total_ns == 50


def test_a_capture_of_one_call_shows_it(make: Make) -> None:
    rows = aggregate(make(calls=1))
    assert next(row for row in rows if row.name == "norm").total_ns == 53


def test_without_sites_names_are_those_of_the_binary(make: Make) -> None:
    assert [row.name for row in aggregate(make(with_sites=False))] == ["matmul", "head", "norm", BETWEEN]


def test_the_balance_counts_what_overlapped(make: Make) -> None:
    # 50 ns of two dispatches lie side by side.
    told = balance(make())
    assert told.rows_ns == pytest.approx(CALL_NS + GAP_NS + 50)
    assert told.difference == pytest.approx(50 / (CALL_NS + GAP_NS))


def test_the_balance_is_against_the_clock_of_the_program(make: Make) -> None:
    told = balance(make(clock_ns=4 * 2 * (CALL_NS + GAP_NS)))
    assert told.difference == pytest.approx(0.5 + 25 / (CALL_NS + GAP_NS) - 1)


def test_rows_of_two_functions_are_told_apart(make: Make) -> None:
    capture = make(warm_up=0)
    calls, runs = capture.read(Call), capture.read(DispatchRun)
    first = [call.model_copy(update={"function": "prefill"}) if call.call == 0 else call for call in calls]
    write_rows(capture.folder, Call, first)
    moved = [run.model_copy(update={"function": "prefill"}) if run.call == 0 else run for run in runs]
    write_rows(capture.folder, DispatchRun, moved)
    rows = aggregate(capture)
    assert {row.name for row in rows if row.is_between} == {f"decode: {BETWEEN}", f"prefill: {BETWEEN}"}
    assert sum(row.share for row in rows) == pytest.approx(1 + 50 / (CALL_NS + GAP_NS))
    assert {row.name for row in aggregate(capture, "phase") if not row.is_between} == {"decode", "prefill"}


def test_workgroups_that_are_not_known_are_none(make: Make) -> None:
    capture = make()
    runs = [run.model_copy(update={"workgroups": (0, 0, 0)}) for run in capture.read(DispatchRun)]
    write_rows(capture.folder, DispatchRun, runs)
    assert {row.workgroups for row in aggregate(capture)} == {None}


def test_top_keeps_the_sum(make: Make) -> None:
    rows = aggregate(make(), "site")
    shown = top_rows(rows, 1)
    assert [row.name for row in shown] == ["1 matmul", "(3 others)", BETWEEN]
    assert sum(row.total_ns for row in shown) == pytest.approx(sum(row.total_ns for row in rows))
    assert sum(row.share for row in shown) == pytest.approx(sum(row.share for row in rows))


@pytest.mark.parametrize(("pattern", "names"), [("matmul*", {"matmul 8x8", "matmul 8x4"}), ("*.1.*", {"matmul 8x4"})])
def test_a_filter_matches_names_and_weights(make: Make, pattern: str, names: set[str]) -> None:
    assert {row.name for row in filter_rows(aggregate(make()), pattern)} == names


def test_a_filter_without_match_names_the_nearest(make: Make) -> None:
    with pytest.raises(CaptureError, match=r"no row matches 'matmulx'; nearest: matmul"):
        filter_rows(aggregate(make()), "matmulx")


@pytest.mark.parametrize(
    ("column", "first"), [("min", "matmul 8x8"), ("name", "head"), ("site", "norm"), ("bandwidth", "matmul 8x8")]
)
def test_sorting_keeps_what_lies_between_last(make: Make, column: str, first: str) -> None:
    rows = sort_rows(aggregate(make()), column)
    assert rows[0].name == first
    assert rows[-1].is_between


def test_an_unknown_column_lists_the_known(make: Make) -> None:
    with pytest.raises(CaptureError, match="cannot sort by 'speed'; columns: total, share"):
        sort_rows(aggregate(make()), "speed")


def test_a_capture_without_dispatches_says_why(make: Make, tmp_path: Path) -> None:
    capture = make()
    (capture.folder / "calls.jsonl").unlink()
    with pytest.raises(CaptureError, match="it holds no dispatches: it was not asked for; record --with ireeprof"):
        aggregate(capture)


@pytest.mark.timed
def test_the_small_module_adds_up(small_capture: Capture) -> None:
    rows = aggregate(small_capture)
    assert sum(row.share for row in rows) == pytest.approx(1, abs=0.001)
    assert abs(balance(small_capture).difference) < 0.03
    matmul = max(rows, key=lambda row: row.total_ns if not row.is_between else 0)
    assert isinstance(matmul, TableRow)
    assert str(matmul.kind).startswith("matmul")
    assert matmul.throughput is not None
    assert matmul.bandwidth_share is not None


def test_a_site_of_two_exports_has_a_row_for_each(make: Make) -> None:
    """A function that branches dispatches another export at one place: neither takes the other's name or facts."""
    capture = make()
    runs = capture.read(DispatchRun)
    other = [run.model_copy(update={"key": "other"}) if run.site == 3 and run.call % 2 else run for run in runs]
    write_rows(capture.folder, DispatchRun, other)
    rows = {row.name: row for row in aggregate(capture)}
    steady = len(steady_calls(capture))
    assert rows["other"].count + rows["head"].count == 1
    odd = sum(run.key == "other" and run.call >= 1 for run in other)
    assert rows["other"].count == odd / steady
    assert rows["other"].kind is None
    by_site = {row.name for row in aggregate(capture, "site")}
    assert {"3 other", "3 head"} <= by_site
    write_rows(capture.folder, Site, [])
    assert {"other", "head"} <= {row.name for row in aggregate(capture, "kind")}
