"""Tells apart the runs of dispatches in a Tracy file, by when threads turned to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmir_iree.tracing.tracy_zones import TracyFile, Zones

# Zones by which IREE's CPU devices tell of dispatches: a worker of local-task that runs some of its workgroups, named
# by the export; on local-sync what encloses a zone for every workgroup.
_WORKER_FUNCTION = "iree_hal_cmd_execute_dispatch_tiles"
_INLINE_FUNCTION = "iree_hal_local_executable_issue_dispatch_inline"
# Where there are several workers, each of them that takes part has such a zone around all that it does between two
# barriers; a worker that is alone has none, and runs every dispatch from its first workgroup to its last in one zone.
_REGION_FUNCTION = "iree_hal_cmd_block_processor_process_region"
_RUNTIME_PREFIX = "iree_"


@dataclass(frozen=True)
class TracyDispatch:
    """One run of a dispatch.

    Attributes:
        key: name of the executable's export.
        start_ns, end_ns: of its first and its last zone.
        tile_ns: time of its zones together, over all threads.
        zones: how many there are: on local-sync one for each workgroup, on local-task for each share of workgroups that
            a worker took.
    """

    key: str
    start_ns: int
    end_ns: int
    tile_ns: int
    zones: int

    @property
    def duration_ns(self) -> int:
        """Wall time."""
        return self.end_ns - self.start_ns


def find_dispatches(trace: TracyFile) -> list[TracyDispatch]:
    """Runs of dispatches, by their start; those on GPUs have a zone each.

    A run on the CPU is made of the zones of one name between the same two barriers. A worker stays until no workgroup
    is left to take, so that whoever takes one came before any of the others left; and the next barrier opens when all
    that took any have left. A dispatch that runs twice between two barriers is seen as one run.
    """
    found = [*_runs(trace), *_gpu_dispatches(trace)]
    return sorted(found, key=lambda dispatch: dispatch.start_ns)


def _dispatch_zones(trace: TracyFile) -> Zones:
    """Zones of dispatches on the CPU, by their start."""
    functions = [location.function for location in trace.locations]
    is_worker = np.array([function == _WORKER_FUNCTION for function in functions], bool)
    is_inline = np.array([function == _INLINE_FUNCTION for function in functions], bool)
    is_compiled = np.array([not function.startswith(_RUNTIME_PREFIX) for function in functions], bool)
    zones = trace.cpu_zones
    if not len(zones):
        return zones
    # Row -1, that of no parent, is the last zone's: masked below.
    parent_is_inline = is_inline[zones.location[zones.parent]] & (zones.parent >= 0)
    chosen = is_worker[zones.location] | (parent_is_inline & is_compiled[zones.location])
    rows = np.flatnonzero(chosen & zones.has_ended)
    return zones.take(rows[np.argsort(zones.start[rows], kind="stable")])


def _runs(trace: TracyFile) -> Iterator[TracyDispatch]:
    zones, parents = _dispatch_zones(trace), trace.cpu_zones
    if not len(zones):
        return
    functions = [location.function for location in trace.locations]
    is_worker = np.array([function == _WORKER_FUNCTION for function in functions], bool)[zones.location]
    is_region = np.array([function == _REGION_FUNCTION for function in functions], bool)
    # Row -1, that of no parent, is the last zone's: masked here and below.
    in_region = (zones.parent >= 0) & is_region[parents.location[zones.parent]]
    entered_at = np.where(in_region, parents.start[zones.parent], zones.start)
    # Where the program ended first, nobody has left.
    left_at = np.where(parents.has_ended[zones.parent], parents.end[zones.parent], np.iinfo(np.int64).max)
    runs: list[_Run] = []
    latest: dict[int, _Run] = {}
    by_parent: dict[tuple[int, int], _Run] = {}
    columns = (zones.name, zones.start, zones.end, zones.thread, zones.parent, entered_at, left_at)
    rows = zip(*(column.tolist() for column in (*columns, in_region, is_worker & ~in_region)), strict=True)
    for name, start, end, thread, parent, entered, left, is_shared, is_whole in rows:
        run = None if is_whole else by_parent.get((name, parent))
        if run is None and is_shared:
            last = latest.get(name)
            # A thread that took part has left: it came for the next run, even if clocks of cores say otherwise.
            run = last if last is not None and entered < last.left_at and thread not in last.threads else None
        if run is None:
            run = _Run(name, start)
            runs.append(run)
        if is_shared:
            latest[name] = run
            run.threads.add(thread)
            run.left_at = max(run.left_at, left)
        if not is_whole:
            by_parent[name, parent] = run
        run.add(end, end - start)
    for run in runs:
        yield TracyDispatch(trace.names[run.name], run.start, run.end, run.tile_ns, run.zones)


def _gpu_dispatches(trace: TracyFile) -> Iterator[TracyDispatch]:
    zones = trace.gpu_zones
    is_compiled = np.array([not it.function.startswith(_RUNTIME_PREFIX) for it in trace.locations], bool)
    zones = zones.take(np.flatnonzero(is_compiled[zones.location] & zones.has_ended)) if len(zones) else zones
    for name, start, end in zip(zones.name.tolist(), zones.start.tolist(), zones.end.tolist(), strict=True):
        yield TracyDispatch(trace.names[name], start, end, end - start, 1)


class _Run:
    """A run of a dispatch that may go on: until `left_at`, for threads that are not among its own."""

    def __init__(self, name: int, start: int) -> None:
        self.name = name
        self.start = start
        self.end = start
        self.tile_ns = 0
        self.zones = 0
        self.threads: set[int] = set()
        self.left_at = start

    def add(self, end: int, tile_ns: int) -> None:
        """Add a zone."""
        self.end = max(self.end, end)
        self.tile_ns += tile_ns
        self.zones += 1
