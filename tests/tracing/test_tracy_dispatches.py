"""Runs of dispatches, put together from the zones of several threads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmir_iree.tracing.tracy_dispatches import TracyDispatch, find_dispatches
from llmir_iree.tracing.tracy_zones import SourceLocation, Thread, TracyFile, Zones

TILES = "iree_hal_cmd_execute_dispatch_tiles"
REGION = "iree_hal_cmd_block_processor_process_region"
DRAIN = "iree_hal_task_queue_trace_compute_drain_event"
INLINE = "iree_hal_local_executable_issue_dispatch_inline"
FUNCTIONS = (TILES, REGION, DRAIN, INLINE, "compiled")

# What encloses them: function, start, end; and inside of it: function, name, start, end.
Inner = tuple[str, str, int, int]
Outer = tuple[str, int, int, Sequence[Inner]]


def trace(*threads: Sequence[Outer]) -> TracyFile:
    """A file of zones, thread by thread."""
    rows: list[tuple[int, int, int, str, str, int]] = []
    for thread, outers in enumerate(threads):
        for function, start, end, inside in outers:
            parent = len(rows)
            rows.append((start, end, thread, function, function, -1))
            rows += [(begin, stop, thread, inner, name, parent) for inner, name, begin, stop in inside]
    names = sorted({row[4] for row in rows})
    columns = {
        "start": [row[0] for row in rows],
        "end": [row[1] for row in rows],
        "self_ns": [0 for _ in rows],
        "thread": [row[2] for row in rows],
        "location": [FUNCTIONS.index(row[3]) for row in rows],
        "name": [names.index(row[4]) for row in rows],
        "parent": [row[5] for row in rows],
    }
    none = np.zeros(0, np.int64)
    return TracyFile(
        path=Path("made"),
        program="made",
        pid=1,
        host={},
        threads=tuple(Thread(number, "worker") for number in range(len(threads))),
        locations=tuple(SourceLocation(function, function, "a.c", 1) for function in FUNCTIONS),
        names=tuple(names),
        cpu_zones=Zones(**{name: np.array(values) for name, values in columns.items()}),
        gpu_zones=Zones(**dict.fromkeys(columns, none)),
        gpu_contexts=(),
        messages=(),
        frames={},
    )


def tiles(*bounds: tuple[int, int], name: str = "matmul") -> list[Inner]:
    return [(TILES, name, *bound) for bound in bounds]


def test_shares_of_several_workers_are_one_run() -> None:
    made = trace([(REGION, 0, 50, tiles((1, 20), (21, 48)))], [(REGION, 10, 60, tiles((11, 55)))])
    assert find_dispatches(made) == [TracyDispatch("matmul", 1, 55, 19 + 27 + 44, 3)]


@pytest.mark.parametrize("others", [((1, 20),), ((1, 20), (24, 28))])
def test_a_worker_that_comes_between_two_shares_of_another_belongs_to_the_run(
    others: tuple[tuple[int, int], ...],
) -> None:
    """No zone of the first worker is open as the second one comes, but it has not left yet."""
    made = trace([(REGION, 0, 30, tiles(*others))], [(REGION, 21, 60, tiles((22, 55)))])
    [run] = find_dispatches(made)
    assert (run.start_ns, run.end_ns, run.zones) == (1, 55, len(others) + 1)


def test_the_same_export_behind_a_barrier_is_another_run() -> None:
    first, second = (REGION, 0, 30, tiles((1, 29))), (REGION, 31, 60, tiles((32, 59)))
    assert [run.zones for run in find_dispatches(trace([first, second]))] == [1, 1]
    assert [run.zones for run in find_dispatches(trace([first], [second]))] == [1, 1]


def test_clocks_that_differ_between_cores_join_no_runs_of_one_thread() -> None:
    """The second worker's clock is behind, so that it seems to have come before the first one left."""
    made = trace(
        [(REGION, 0, 30, tiles((1, 29))), (REGION, 32, 60, tiles((33, 59)))],
        [(REGION, 0, 20, tiles((1, 19))), (REGION, 28, 60, tiles((29, 59)))],
    )
    assert [run.zones for run in find_dispatches(made)] == [2, 2]


def test_dispatches_without_a_barrier_between_them_are_told_apart_by_name() -> None:
    inside = tiles((1, 10)) + tiles((11, 20), name="softmax")
    runs = find_dispatches(trace([(REGION, 0, 30, inside)], [(REGION, 5, 30, tiles((6, 25), name="softmax"))]))
    assert [(run.key, run.zones) for run in runs] == [("matmul", 1), ("softmax", 2)]


def test_a_worker_that_is_alone_runs_every_dispatch_in_one_zone() -> None:
    """All of them in one zone, as it need not wait for others."""
    inside = [*tiles((1, 10), (11, 20)), *tiles((21, 30), name="softmax"), *tiles((31, 40))]
    runs = find_dispatches(trace([(DRAIN, 0, 50, inside)]))
    assert [(run.key, run.start_ns, run.end_ns) for run in runs] == [
        ("matmul", 1, 10),
        ("matmul", 11, 20),
        ("softmax", 21, 30),
        ("matmul", 31, 40),
    ]


def test_a_worker_that_a_crash_kept_from_leaving_is_still_there() -> None:
    made = trace([(REGION, 0, -1, tiles((1, 20)))], [(REGION, 30, -1, tiles((31, 40)))])
    assert [run.zones for run in find_dispatches(made)] == [2]


def test_a_zone_for_every_workgroup_on_the_calling_thread() -> None:
    first, second = [("compiled", "matmul", 1, 10), ("compiled", "matmul", 11, 20)], [("compiled", "matmul", 31, 40)]
    runs = find_dispatches(trace([(INLINE, 0, 25, first), (INLINE, 30, 45, second)]))
    assert [(run.start_ns, run.end_ns, run.tile_ns) for run in runs] == [(1, 20, 18), (31, 40, 9)]
