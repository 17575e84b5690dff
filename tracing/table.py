"""The table of a capture: its dispatches in groups, with what lies between them, so that the rows add up to a step."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from statistics import mean, median
from typing import Literal, TypeVar

from llmir_iree.tracing.capture import Call, Capture, CaptureError, DispatchRun, MachineInfo, Site
from llmir_iree.tracing.sites import sites_of_binary

GroupBy = Literal["dispatch", "kind", "layer", "phase", "site"]
GROUPINGS: tuple[GroupBy, ...] = ("dispatch", "kind", "layer", "phase", "site")

BETWEEN = "between dispatches"
"""Name and kind of the row of all time in which no dispatch ran: the host, the interpreter, copies, waits."""

SORT_COLUMNS = (
    *("total", "share", "count", "median", "min", "cpu", "parallelism", "workgroups"),
    *("bytes", "flops", "bandwidth", "throughput", "name", "layer", "site"),
)

_NEAREST = 3

T = TypeVar("T")


@dataclass(frozen=True)
class TableRow:
    """Some dispatches of a capture together. Means and sums are over the calls that `steady_calls` gives.

    Attributes:
        name: what the group has in common; behind the function's name if the capture has several functions.
        function: the exported function whose calls made them.
        count: dispatches in one call, on average; 1 for the time between dispatches.
        median_ns, min_ns: wall time of one dispatch; of one call's sum for the time between dispatches.
        total_ns: wall time in one call, on average.
        share: of `total_ns` in the wall time of the step, 0 to 1.
        cpu_ns: time of all workgroups in one call, over all threads; None for the time between dispatches.
        parallelism: threads that were busy at a time, on average: `cpu_ns / total_ns`.
        workgroups: of each dispatch, None if they differ.
        nbytes: read and written in one call; None if that is not known of every dispatch. So it is for `flops`.
        flops: operations in one call; a product and its sum count as two.
        bandwidth: bytes a second. bandwidth_share: of what the machine's memory gives to a plain read, 1 is all of it;
            more means that caches served.
        throughput: operations a second. throughput_share: of what the machine's cores give at best, which is in
            products of bytes; floats cannot reach it.
        kind, op, line, weight, layer, shape: as in `Site`, None where the group's dispatches differ.
        sites: which places of the function the dispatches come from.
    """

    name: str
    function: str
    count: float
    median_ns: float
    min_ns: float
    total_ns: float
    share: float
    cpu_ns: float | None = None
    parallelism: float | None = None
    workgroups: tuple[int, int, int] | None = None
    nbytes: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    bandwidth_share: float | None = None
    throughput: float | None = None
    throughput_share: float | None = None
    kind: str | None = None
    op: str | None = None
    line: int | None = None
    weight: str | None = None
    layer: int | None = None
    shape: str | None = None
    sites: tuple[int, ...] = ()

    @property
    def is_between(self) -> bool:
        """Whether it is the time in which no dispatch ran."""
        return self.kind == BETWEEN


@dataclass(frozen=True)
class Balance:
    """How far the rows of all dispatches, and the time between them, add up to what the calls took.

    Attributes:
        rows_ns: what the rows add up to, a call on average, warm-up included.
        clock_ns: what a call took by the clock of the program that made it, which is another one than the profile's;
            by the profile's where the capture has no other.
    """

    rows_ns: float
    clock_ns: float

    @property
    def difference(self) -> float:
        """`rows_ns / clock_ns - 1`: negative where rows miss something.

        Dispatches that ran side by side count twice, and make it positive.
        """
        return self.rows_ns / self.clock_ns - 1


@dataclass(frozen=True)
class Step:
    """One call: its dispatches, and how long it was from its beginning to that of the next one, in ns."""

    call: Call
    runs: tuple[DispatchRun, ...]
    wall_ns: float

    @property
    def between_ns(self) -> float:
        """Time in which no dispatch ran; dispatches that overlap cover their time once."""
        covered, end = 0, 0
        for run in sorted(self.runs, key=lambda run: run.start_ns):
            start = max(run.start_ns, end)
            end = max(end, run.start_ns + run.duration_ns)
            covered += max(end - start, 0)
        return max(self.wall_ns - covered, 0.0)


def aggregate(capture: Capture, by: GroupBy = "dispatch") -> list[TableRow]:
    """The rows of a capture, the longest first; of each function, the time between dispatches comes last.

    Args:
        capture: one with dispatches in it.
        by: "dispatch" puts together what runs the same code on the same shape, "site" nothing, "kind", "layer" and
            "phase" (which is a function) what their names say.

    Raises:
        CaptureError: a damaged capture, or one without dispatches.
    """
    steps = steady_steps(capture)
    sites = {(site.function, site.site, site.key): site for site in known_sites(capture)}
    all_ns = sum(step.wall_ns for step in steps)
    by_function: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        by_function[step.call.function].append(step)
    rows: list[TableRow] = []
    for function, called in by_function.items():
        groups: dict[str, list[DispatchRun]] = defaultdict(list)
        names = _names(by, function, called, sites)
        for step in called:
            for run in step.runs:
                groups[names[run.site, run.key]].append(run)
        filled = [
            _row(name, runs, sites, len(called), all_ns, capture.manifest.machine) for name, runs in groups.items()
        ]
        rows += sorted(filled, key=lambda row: row.total_ns, reverse=True)
        rows.append(_between(function, called, all_ns))
    return rows if len(by_function) == 1 else [_with_function(row) for row in rows]


def balance(capture: Capture) -> Balance:
    """How far the table adds up, over all calls that were made.

    Raises:
        CaptureError: as `aggregate`.
    """
    steps = _steps(capture)
    rows = sum(step.between_ns for step in steps) + sum(run.duration_ns for step in steps for run in step.runs)
    clock: float = sum(capture.manifest.clock_ns) or sum(step.wall_ns for step in steps)
    return Balance(rows / len(steps), clock / len(steps))


def steady_steps(capture: Capture) -> list[Step]:
    """The steps that tables are made of: all but the first ones of each process, which met cold caches.

    Raises:
        CaptureError: a damaged capture, or one without calls.
    """
    return _steady(_steps(capture), capture.manifest.warm_up_calls)


def steady_calls(capture: Capture) -> list[Call]:
    """The calls of `steady_steps`."""
    return [step.call for step in steady_steps(capture)]


def known_sites(capture: Capture) -> list[Site]:
    """The sites of a capture; if it has none, what the names in the binary tell of them."""
    return capture.read(Site) or sites_of_binary(capture.read(DispatchRun))


def sort_rows(rows: Iterable[TableRow], column: str) -> list[TableRow]:
    """Rows in the order of a column: names, layers and sites rise, all else falls; what is not known comes last.

    Raises:
        CaptureError: no such column.
    """
    if column not in SORT_COLUMNS:
        raise CaptureError(f"cannot sort by {column!r}; columns: {', '.join(SORT_COLUMNS)}")

    def key(row: TableRow) -> tuple[bool, bool, float, str]:
        value = _sort_value(row, column)
        if isinstance(value, str):
            return row.is_between, False, 0.0, value
        rising = column in ("layer", "site")
        return row.is_between, value is None, (1 if rising else -1) * (value or 0), row.name

    return sorted(rows, key=key)


def filter_rows(rows: Sequence[TableRow], pattern: str) -> list[TableRow]:
    """Rows whose name, kind or weight matches a glob.

    Raises:
        CaptureError: none does; the message tells the nearest names.
    """
    chosen = [row for row in rows if any(fnmatchcase(text, pattern) for text in _texts(row))]
    if chosen:
        return chosen
    known = {text: None for row in rows for text in _texts(row)}
    bare = pattern.strip("*")
    near = difflib.get_close_matches(bare, known, _NEAREST, cutoff=0.0)
    raise CaptureError(f"no row matches {pattern!r}; nearest: {', '.join(near)}")


def top_rows(rows: Sequence[TableRow], count: int) -> list[TableRow]:
    """The first rows and the time between dispatches; the others as one row, so that the table still adds up."""
    if count < 1:
        raise CaptureError(f"--top {count}: expected 1 or more")
    dispatched = [row for row in rows if not row.is_between]
    shown, others = dispatched[:count], dispatched[count:]
    if len(others) > 1:
        shown.append(_sum_of(f"({len(others)} others)", others))
    else:
        shown += others
    return [*shown, *(row for row in rows if row.is_between)]


def _steps(capture: Capture) -> list[Step]:
    calls = capture.read(Call)
    if not calls:
        reason = capture.manifest.missing.get("ireeprof", "it was not asked for; record --with ireeprof")
        raise CaptureError(f"{capture.folder}: it holds no dispatches: {reason}")
    runs: dict[tuple[int, int, str], list[DispatchRun]] = defaultdict(list)
    for run in capture.read(DispatchRun):
        runs[run.process, run.call, run.function].append(run)
    by_process: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        by_process[call.process].append(call)
    return [
        Step(call, tuple(runs[call.process, call.call, call.function]), wall)
        for process in by_process.values()
        for call, wall in _walls(sorted(process, key=lambda call: call.start_ns))
    ]


def _walls(calls: Sequence[Call]) -> Iterator[tuple[Call, float]]:
    """Calls, and how long each was with what the host did behind it: for the last one, what it did on average."""
    gaps = [later.start_ns - call.start_ns - call.wall_ns for call, later in pairwise(calls)]
    gaps.append(round(mean(gaps)) if gaps else 0)
    for call, gap in zip(calls, gaps, strict=True):
        yield call, call.wall_ns + max(gap, 0)


def _steady(steps: Sequence[Step], warm_up_calls: int) -> list[Step]:
    seen: Counter[int] = Counter()
    kept = []
    for step in steps:
        seen[step.call.process] += 1
        if seen[step.call.process] > warm_up_calls:
            kept.append(step)
    return kept or list(steps)


def _names(
    by: GroupBy, function: str, steps: Sequence[Step], sites: Mapping[tuple[str, int, str], Site]
) -> dict[tuple[int, str], str]:
    """The group of every site of a function, and of every export that it dispatched."""
    places = dict.fromkeys((run.site, run.key) for step in steps for run in step.runs)
    known = {(number, key): sites.get((function, number, key)) for number, key in places}
    shapes: dict[str, set[str | None]] = defaultdict(set)
    for (_, key), site in known.items():
        shapes[key].add(site.shape if site else None)
    names = {}
    for (number, key), site in known.items():
        if by == "site":
            name = f"{number} {key}"
        elif by == "phase":
            name = function
        elif by == "kind":
            name = site.kind if site else key
        elif by == "layer":
            name = "outside layers" if site is None or site.layer is None else f"layer {site.layer}"
        else:
            name = f"{key} {site.shape}" if site and site.shape and len(shapes[key]) > 1 else key
        names[number, key] = name
    return names


def _row(
    name: str,
    runs: Sequence[DispatchRun],
    sites: Mapping[tuple[str, int, str], Site],
    calls: int,
    all_ns: float,
    machine: MachineInfo,
) -> TableRow:
    described = [sites.get((run.function, run.site, run.key)) for run in runs]
    wall, cpu = sum(run.duration_ns for run in runs), sum(run.tile_ns for run in runs)
    moved = _known_sum(
        None
        if site is None or site.bytes_read is None or site.bytes_written is None
        else site.bytes_read + site.bytes_written
        for site in described
    )
    flops = _known_sum(None if site is None else site.flops for site in described)
    known = [site for site in described if site is not None]
    row = TableRow(
        name=name,
        function=runs[0].function,
        count=len(runs) / calls,
        median_ns=median(run.duration_ns for run in runs),
        min_ns=min(run.duration_ns for run in runs),
        total_ns=wall / calls,
        share=wall / all_ns if all_ns else 0.0,
        cpu_ns=cpu / calls,
        parallelism=cpu / wall if wall else None,
        workgroups=_same(run.workgroups if any(run.workgroups) else None for run in runs),
        nbytes=None if moved is None else moved / calls,
        flops=None if flops is None else flops / calls,
        kind=_same(site.kind for site in known),
        op=_same(site.op for site in known),
        line=_same(site.line for site in known),
        weight=_same(site.weight for site in known),
        layer=_same(site.layer for site in known),
        shape=_same(site.shape for site in known),
        sites=tuple(sorted({run.site for run in runs})),
    )
    return _with_rates(row, machine)


def _with_function(row: TableRow) -> TableRow:
    """The row under a name that tells it from another function's."""
    return row if row.name == row.function else replace(row, name=f"{row.function}: {row.name}")


def _with_rates(row: TableRow, machine: MachineInfo) -> TableRow:
    seconds = row.total_ns / 1e9
    if not seconds:
        return row
    bandwidth = None if row.nbytes is None else row.nbytes / seconds
    throughput = None if row.flops is None else row.flops / seconds
    peak_flops = None if machine.peak_macs_s is None else 2 * machine.peak_macs_s
    return replace(
        row,
        bandwidth=bandwidth,
        bandwidth_share=_ratio(bandwidth, machine.bandwidth_bytes_s),
        throughput=throughput,
        throughput_share=_ratio(throughput, peak_flops),
    )


def _between(function: str, steps: Sequence[Step], all_ns: float) -> TableRow:
    times = [step.between_ns for step in steps]
    return TableRow(
        name=BETWEEN,
        function=function,
        count=1,
        median_ns=median(times),
        min_ns=min(times),
        total_ns=mean(times),
        share=sum(times) / all_ns if all_ns else 0.0,
        kind=BETWEEN,
    )


def _sum_of(name: str, rows: Sequence[TableRow]) -> TableRow:
    total, cpu = sum(row.total_ns for row in rows), sum(row.cpu_ns or 0 for row in rows)
    return TableRow(
        name=name,
        function=rows[0].function,
        count=sum(row.count for row in rows),
        median_ns=median(row.median_ns for row in rows),
        min_ns=min(row.min_ns for row in rows),
        total_ns=total,
        share=sum(row.share for row in rows),
        cpu_ns=cpu,
        parallelism=cpu / total if total else None,
        sites=tuple(sorted(site for row in rows for site in row.sites)),
    )


def _same(values: Iterable[T]) -> T | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _known_sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _ratio(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def _texts(row: TableRow) -> list[str]:
    return [text for text in (row.name, row.kind, row.weight) if text]


def _sort_value(row: TableRow, column: str) -> float | str | None:
    if column == "workgroups":
        return None if row.workgroups is None else float(row.workgroups[0] * row.workgroups[1] * row.workgroups[2])
    if column == "site":
        return float(row.sites[0]) if row.sites else None
    fields = {"total": "total_ns", "median": "median_ns", "min": "min_ns", "cpu": "cpu_ns", "bytes": "nbytes"}
    value: float | str | None = getattr(row, fields.get(column, column))
    return value
