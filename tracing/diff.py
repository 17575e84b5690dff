"""Compares two captures: what changed for certain, by how much, and how much of the whole that is.

Of each process the fastest quarter of its calls counts: what disturbs a call, such as another program on its core, only
ever adds to it, and a busy machine disturbs more than half of them. The cost of a place in a function is what it takes
of these calls on average, so that the costs of all places and the time between dispatches add up to the call. A change
that leaves a quarter of the calls as fast as before is therefore not seen here; means over all calls, which
`llmir_iree.tracing.table` gives, show it.

Changes are told from noise by what the processes of one side differ, see `llmir_iree.tracing.noise`; a machine that is
slower for a while is taken out, see `llmir_iree.tracing.drift`. Captures that were recorded one after the other leave
two things open: whether everything slowed down alike or the machine did, of which the machine is taken for the cause;
and whether such a machine slows all dispatches alike, which is assumed, though it may slow those that wait for memory
more than those that compute. Captures of one session leave neither open: their processes took turns, and those of one
turn are compared with each other. Nothing is taken out of a call then; its rows are measured against each other as
before, so that a machine that wanders hides no change of one of them, unless all of them moved alike for certain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Literal

import numpy as np

from llmir_iree.tracing.capture import Call, Capture, CaptureError, CaptureManifest, DispatchRun, Site
from llmir_iree.tracing.drift import Baseline, Quantities, find_baseline
from llmir_iree.tracing.match import Match, Place, find_places, match_places
from llmir_iree.tracing.noise import MIN_CHANGE, MIN_PROCESSES, Differences, Floats

Grouping = Literal["dispatch", "site", "kind", "layer"]

BETWEEN = "between dispatches"

# A smaller drift is taken out as well, but not worth a word.
_NOTABLE_DRIFT = 0.01

_UNDISTURBED = 0.25

_NAMED_ROWS = 3
_NAMED_SHARE = 0.05


@dataclass(frozen=True)
class Change:
    """By what a time changed, the drift taken out where `FunctionDiff` says so.

    Attributes:
        ratio: of B to A.
        low, high: its interval, at 95%.
        floor: the noise floor, a share: a smaller change of this time is not called.
        is_called: whether it is a change, and not noise.
    """

    ratio: float
    low: float
    high: float
    floor: float
    is_called: bool


@dataclass(frozen=True)
class DiffRow:
    """Places that are looked at together, on both sides or on one.

    Attributes:
        label: in words, such as "22 x quantized_matmul 2048x5632".
        detail: what else is different about it, in words; empty if nothing is.
        matches: the places; none for the time between dispatches.
        a_ns, b_ns: time a call, None on the side that does not have them.
        delta_ns: what they add to a call in B, the drift taken out unless processes took turns.
        share: of `delta_ns` in the function's; None where that is no change.
        change: None where it cannot be known: on one side only, or too few processes.
    """

    label: str
    detail: str
    matches: tuple[Match, ...]
    a_ns: float | None
    b_ns: float | None
    delta_ns: float
    share: float | None
    change: Change | None

    @property
    def side(self) -> Literal["both", "a", "b"]:
        """Where it is."""
        return "b" if self.a_ns is None else "a" if self.b_ns is None else "both"

    @property
    def is_called(self) -> bool:
        """Whether it is a change that is certain."""
        return self.change is not None and self.change.is_called


@dataclass(frozen=True)
class FunctionDiff:
    """One function that both captures call.

    Attributes:
        function: its name.
        processes: of A and of B.
        a_ns, b_ns: wall time of a call that nothing disturbs.
        took_turns: whether the captures are of one session, so that each process has a neighbour in time.
        drift: ratio of B to A by which most dispatches moved alike, taken out of the rows' changes; None if they did
            not, and nothing is taken out.
        uniform: the same where it is a change, as only processes that took turns can tell: it is in all changes then.
        change: of the whole call, the drift taken out unless processes took turns; None if there are too few of them.
        rows: largest `delta_ns` first, up or down; they add up to the call.
    """

    function: str
    processes: tuple[int, int]
    a_ns: float
    b_ns: float
    took_turns: bool
    drift: float | None
    uniform: float | None
    change: Change | None
    rows: tuple[DiffRow, ...]

    def summary(self) -> str:
        """The result in a sentence."""
        if self.change is None:
            few = f"{self.processes[0]} and {self.processes[1]} processes"
            tendency = _percent(self.b_ns / self.a_ns)
            return f"{self.function} {tendency}, but nothing can be called: {few}, it takes {MIN_PROCESSES} a side"
        sentence = self._total(self.change)
        if self.drift is not None and not self.took_turns and abs(self.drift - 1) >= _NOTABLE_DRIFT:
            sentence += (
                f"; besides, everything moved alike and got {_percent(self.drift)}: the machine, or something "
                "that all dispatches share"
            )
        return sentence

    def _total(self, change: Change) -> str:
        if change.is_called:
            named = [(share, what) for share, what in self._causes() if share >= _NAMED_SHARE][:_NAMED_ROWS]
            parts = [f"{share:.0%}{' of it' * (not n)} in {what}" for n, (share, what) in enumerate(named)]
            if self.uniform is not None:
                others = "other" if parts else "most"
                parts.append(f"{others} dispatches alike got {_percent(self.uniform)}")
            return f"{self.function} {_percent(change.ratio)}" + (f": {', '.join(parts)}" if parts else "")
        called = [row for row in self.rows if row.is_called]
        sentence = f"{self.function}: no change of the whole is called, {_interval(change)}"
        if called:
            parts = [f"{_describe(row)} {_percent(row.change.ratio)}" for row in called[:_NAMED_ROWS] if row.change]
            more = f" and {len(called) - _NAMED_ROWS} more" if len(called) > _NAMED_ROWS else ""
            sentence += f"; changed: {', '.join(parts)}{more}"
        return sentence

    def _causes(self) -> list[tuple[float, str]]:
        """What stands out, with its share of the change, largest first.

        Where both sides have rows of their own, one replaces the other, and only together do they cost something.
        """
        rows = [row for row in self.rows if self._stands_out(row)]
        gone, new = ([row for row in rows if row.side == side] for side in ("a", "b"))
        causes = []
        if gone and new:
            share = sum(row.share or 0 for row in (*gone, *new))
            causes.append((share, f"{_describe_all(new)} in place of {_describe_all(gone)}"))
            rows = [row for row in rows if row.side == "both"]
        causes.extend((row.share or 0, _describe(row)) for row in rows)
        return sorted(causes, reverse=True)

    def _stands_out(self, row: DiffRow) -> bool:
        """Whether a row is certain to have changed, and otherwise than all others."""
        if row.change is None:
            return row.side != "both"
        moved_alike = self.uniform is not None and row.change.low <= self.uniform <= row.change.high
        return row.is_called and not moved_alike


@dataclass(frozen=True)
class CaptureDiff:
    """The comparison of two captures.

    Attributes:
        a, b: manifests.
        functions: those that both call, in the order of names.
        notes: what the reader has to know of how they were recorded, in sentences.
    """

    a: CaptureManifest
    b: CaptureManifest
    functions: tuple[FunctionDiff, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """A sentence for every function."""
        return "\n".join(function.summary() for function in self.functions)


@dataclass(frozen=True)
class _Side:
    """One function in one capture: wall time of a call [processes], and each place's cost in it [processes], in ns.

    `processes` are their numbers.
    """

    processes: tuple[int, ...]
    walls: Floats
    costs: Mapping[tuple[int, str], Floats]

    def take(self, processes: Collection[int]) -> _Side:
        """Some of its processes, in the order of their numbers."""
        rows = [row for row, number in enumerate(self.processes) if number in processes]
        rows.sort(key=self.processes.__getitem__)
        numbers = tuple(self.processes[row] for row in rows)
        return _Side(numbers, self.walls[rows], {place: costs[rows] for place, costs in self.costs.items()})


@dataclass(frozen=True, eq=False)
class _Row:
    """A row before it is judged: cost in each process of each side, None on the side that does not have it."""

    matches: tuple[Match, ...]
    a: Floats | None
    b: Floats | None

    @property
    def is_on_both_sides(self) -> bool:
        return self.a is not None and self.b is not None

    def has_part_in(self, other: _Row) -> bool:
        """Whether they share a place, or are one."""
        return self.matches == other.matches or not set(self.matches).isdisjoint(other.matches)


def compare_captures(a: Capture, b: Capture, by: Grouping = "dispatch") -> CaptureDiff:
    """Compare two captures, best ones that were recorded side by side.

    Args:
        a: a capture; with fewer than three processes a side, times are given but nothing is called.
        b: another one of the same functions.
        by: what a row is: all places of one export and shape, one place, all of one kind or all of one layer of the
            model. What has no kind or no layer is told apart by export.

    Raises:
        CaptureError: a capture is damaged, has no calls or no dispatches, or the two have no function in common.
    """
    runs = [capture.read(DispatchRun) for capture in (a, b)]
    sides = [_read_sides(capture, its_runs) for capture, its_runs in zip((a, b), runs, strict=True)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        names = [", ".join(sorted(side)) for side in sides]
        raise CaptureError(f"no function is in both captures: {a.folder} calls {names[0]}, {b.folder} calls {names[1]}")
    places = [find_places(its_runs, capture.read(Site)) for capture, its_runs in zip((a, b), runs, strict=True)]
    matches: dict[str, list[Match]] = defaultdict(list)
    for match in match_places(*places):
        matches[match.function].append(match)
    took_turns = a.manifest.session is not None and a.manifest.session == b.manifest.session
    functions = tuple(
        _compare(name, sides[0][name], sides[1][name], matches[name], by, took_turns=took_turns) for name in common
    )
    lonely = sorted(sides[0].keys() ^ sides[1].keys())
    return CaptureDiff(a.manifest, b.manifest, functions, tuple(_notes(a.manifest, b.manifest, lonely)))


def _read_sides(capture: Capture, runs: Iterable[DispatchRun]) -> dict[str, _Side]:
    calls: dict[str, dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for call in capture.read(Call):
        calls[call.function][call.process].append(call)
    kept = {
        function: {process: _undisturbed(made) for process, made in by_process.items()}
        for function, by_process in calls.items()
    }
    sums: dict[str, dict[tuple[int, str], Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for run in runs:
        if run.function in kept:
            # A place that did not run in a process, or not in these calls, took nothing of them.
            is_kept = run.call in kept[run.function].get(run.process, ())
            sums[run.function][run.site, run.key][run.process] += run.duration_ns if is_kept else 0
    sides = {
        function: _Side(
            tuple(kept[function]),
            np.array([np.mean(list(walls.values())) for walls in kept[function].values()]),
            {place: _costs(of, kept[function]) for place, of in sums[function].items()},
        )
        for function in kept.keys() & sums.keys()
    }
    if not sides:
        raise CaptureError(f"{capture.folder}: no calls with dispatches in them were recorded; nothing to compare")
    return sides


def _undisturbed(calls: Sequence[Call]) -> dict[int, int]:
    """Wall times of the fastest calls of one process, by number."""
    ordered = sorted(calls, key=lambda call: call.wall_ns)
    return {call.call: call.wall_ns for call in ordered[: ceil(_UNDISTURBED * len(ordered))]}


def _costs(sums: Mapping[int, int], calls: Mapping[int, Mapping[int, int]]) -> Floats:
    """What a place takes of a call, process by process."""
    # Of what took no time there is no ratio.
    return np.maximum(1.0, [sums.get(process, 0) / len(made) for process, made in calls.items()])


def _compare(
    function: str, a: _Side, b: _Side, matches: Sequence[Match], by: Grouping, *, took_turns: bool
) -> FunctionDiff:
    if took_turns:  # A process whose neighbour failed has none to be compared with.
        a, b = a.take(b.processes), b.take(a.processes)
    rows = _make_rows(a, b, matches, by)
    processes = len(a.walls), len(b.walls)
    totals = _typical(a.walls), _typical(b.walls)
    if min(processes) < MIN_PROCESSES:
        finished = _finish(rows, totals, None, {}, None, by)
        return FunctionDiff(function, processes, *totals, took_turns, None, None, None, finished)
    exports = _make_rows(a, b, matches, "dispatch")
    references = [row for row in exports if row.is_on_both_sides]
    baseline = find_baseline(_logarithms(references, are_paired=took_turns))
    noise = _measure(references, references, baseline, "dispatch")
    total = _judge_call(a, b, exports, noise, baseline)
    both = [row for row in rows if row.is_on_both_sides]
    changes = dict(zip(both, _changes(_measure(both, references, baseline, by)), strict=True))
    finished = _finish(rows, totals, None if took_turns else baseline.drift, changes, total, by)
    drift, uniform = (None if moved is None else float(np.exp(moved)) for moved in (baseline.drift, baseline.uniform))
    return FunctionDiff(function, processes, *totals, took_turns, drift, uniform, total, finished)


def _measure(rows: Sequence[_Row], references: Sequence[_Row], baseline: Baseline, by: Grouping) -> Differences:
    # A layer has a part in nearly all exports, and a small one in each.
    others = [[by == "layer" or not row.has_part_in(other) for other in references] for row in rows]
    are_paired = baseline.references.are_paired
    return baseline.find_differences(_logarithms(rows, are_paired=are_paired), np.array(others))


def _make_rows(a: _Side, b: _Side, matches: Sequence[Match], by: Grouping) -> list[_Row]:
    """All rows, the time between dispatches last."""
    groups: dict[Hashable, list[Match]] = defaultdict(list)
    for match in matches:
        groups[match.a is None, match.b is None, _GROUPS[by](match)].append(match)
    rows = [
        _Row(tuple(members), _sum(a, [match.a for match in members]), _sum(b, [match.b for match in members]))
        for members in groups.values()
    ]
    # Dispatches that overlap may together take longer than the call.
    between = [np.maximum(1.0, side.walls - sum(side.costs.values())) for side in (a, b)]
    return [*rows, _Row((), between[0], between[1])]


def _sum(side: _Side, places: Sequence[Place | None]) -> Floats | None:
    costs = [side.costs[place.site, place.key] for place in places if place is not None]
    return np.asarray(np.sum(costs, axis=0)) if costs else None


def _by_export(match: Match) -> Hashable:
    # A kernel of ours has one export for all shapes.
    facts = _facts(match)
    return match.a and match.a.key, match.b and match.b.key, facts and facts.shape


def _by_kind(match: Match) -> Hashable:
    facts = _facts(match)
    return facts.kind if facts else _by_export(match)


def _by_layer(match: Match) -> Hashable:
    facts = _facts(match)
    return facts.layer if facts and facts.layer is not None else _by_export(match)


_GROUPS: Mapping[Grouping, Callable[[Match], Hashable]] = {
    "dispatch": _by_export,
    "site": lambda match: (match.a and match.a.site, match.b and match.b.site),
    "kind": _by_kind,
    "layer": _by_layer,
}


def _facts(match: Match) -> Site | None:
    place = match.a or match.b
    return place.facts if place else None


def _logarithms(rows: Sequence[_Row], *, are_paired: bool) -> Quantities:
    """Of rows on both sides."""
    a, b = [row.a for row in rows if row.a is not None], [row.b for row in rows if row.b is not None]
    return Quantities(np.log(np.stack(a, axis=1)), np.log(np.stack(b, axis=1)), are_paired)


def _changes(noise: Differences) -> list[Change]:
    columns = zip(noise.values, noise.margins, noise.floors, noise.are_called, strict=True)
    return [
        _change(float(value), float(margin), float(floor), is_called=bool(is_called))
        for value, margin, floor, is_called in columns
    ]


def _change(value: float, margin: float, floor: float, *, is_called: bool) -> Change:
    """From logarithms."""
    ratio, low, high, limit = np.exp([value, value - margin, value + margin, floor]).tolist()
    return Change(ratio, low, high, limit - 1, is_called)


def _judge_call(a: _Side, b: _Side, rows: Sequence[_Row], noise: Differences, baseline: Baseline) -> Change:
    """The change of a whole call.

    With a drift its parts were each measured against the others, and their noise adds up as that of independent ones.
    """
    drift, references = baseline.drift, baseline.references
    if drift is None or references.are_paired:
        walls = Quantities(np.log(a.walls)[:, None], np.log(b.walls)[:, None], references.are_paired)
        [change] = _changes(Baseline(references, None).find_differences(walls, np.ones((1, 1), np.bool_)))
    else:
        errors = iter(noise.errors)
        squares = [
            (_typical(row.a) * float(next(errors))) ** 2
            if row.a is not None and row.b is not None
            else _squared_error(row)
            for row in rows
        ]
        error = float(np.sqrt(sum(squares))) / _typical(a.walls)
        value = float(np.log(_typical(b.walls) / _typical(a.walls))) - drift
        floor = max(noise.critical_for_one * error, MIN_CHANGE)
        change = _change(value, noise.interval * error, floor, is_called=abs(value) > floor)
    if references.are_paired:  # A call that was measured beside its neighbour needs no other witness.
        return change
    is_noise = not noise.are_called.any() and all(row.is_on_both_sides for row in rows)
    return replace(change, is_called=False) if is_noise else change


def _squared_error(row: _Row) -> float:
    """Of what a row on one side takes, in ns."""
    [costs] = [side for side in (row.a, row.b) if side is not None]
    return _typical(costs) ** 2 * float(np.var(np.log(costs), ddof=1)) / len(costs)


def _typical(costs: Floats) -> float:
    """Of all processes: the geometric mean, as ratios are what is compared."""
    return float(np.exp(np.log(costs).mean()))


def _finish(
    rows: Sequence[_Row],
    totals: tuple[float, float],
    drift: float | None,
    changes: Mapping[_Row, Change],
    total: Change | None,
    by: Grouping,
) -> tuple[DiffRow, ...]:
    scale = float(np.exp(-(drift or 0.0)))
    whole = totals[1] * scale - totals[0]
    has_shares = total is not None and total.is_called
    sums = [0.0, 0.0]
    finished = []
    for row in rows:
        a, b = (None if side is None else _typical(side) for side in (row.a, row.b))
        if not row.matches:  # The last row: what is left, so that the rows add up.
            a, b = totals[0] - sums[0], totals[1] - sums[1]
        delta = (b or 0.0) * scale - (a or 0.0)
        sums = [sums[0] + (a or 0.0), sums[1] + (b or 0.0)]
        share = delta / whole if has_shares else None
        label, detail = _name(row.matches, by), _find_detail(row.matches)
        finished.append(DiffRow(label, detail, row.matches, a, b, delta, share, changes.get(row)))
    return tuple(sorted(finished, key=lambda row: -abs(row.delta_ns)))


def _name(matches: Sequence[Match], by: Grouping) -> str:
    if not matches:
        return BETWEEN
    facts = _facts(matches[0])
    place = matches[0].a or matches[0].b
    name = _place_name(place) if place else ""
    if facts and by == "kind":
        name = facts.kind
    elif facts and by == "layer" and facts.layer is not None:
        name = f"dispatches of layer {facts.layer}"
    return f"{len(matches)} x {name}" if len(matches) > 1 else name


def _place_name(place: Place) -> str:
    if place.facts is None:
        return place.key
    return f"{place.facts.kind} {place.facts.shape or place.key}"


def _find_detail(matches: Sequence[Match]) -> str:
    """What is different about the first pair, which stands for all."""
    pair = next(((match.a, match.b) for match in matches if match.a and match.b), None)
    if pair is None:
        return ""
    a, b = pair
    parts = []
    if a.facts and b.facts and (a.facts.kind, a.facts.shape) != (b.facts.kind, b.facts.shape):
        parts.append(f"now {_place_name(b)}")
    if a.workgroups != b.workgroups:
        counts = ["x".join(str(count) for count in place.workgroups) for place in pair]
        parts.append(f"workgroups {counts[0]} -> {counts[1]}")
    return ", ".join(parts)


def only_in(a: Sequence[str], b: Sequence[str]) -> tuple[list[str], list[str]]:
    """What only the one holds, and what only the other."""
    return [name for name in a if name not in b], [name for name in b if name not in a]


def _notes(a: CaptureManifest, b: CaptureManifest, lonely: Sequence[str]) -> Iterator[str]:
    if lonely:
        yield f"in one of the captures only: {', '.join(lonely)}"
    if a.session is not None and a.session == b.session and a.process_ns and b.process_ns:
        apart = median(abs(x[0] - y[0]) for x, y in zip(a.process_ns, b.process_ns, strict=False))
        yield f"their processes took turns, {apart / 1e9:.1f} s apart, and are compared with their neighbours in time"
    for field in ("phase", "batch_size", "context", "device"):
        x, y = getattr(a, field), getattr(b, field)
        if x != y:
            yield f"they were not recorded alike: {field.replace('_', ' ')} {x} and {y}"
    machines = [f"{machine.cpu} with {machine.cores} cores" for machine in (a.machine, b.machine)]
    if machines[0] != machines[1]:
        yield f"they were not recorded alike: on {machines[0]} and on {machines[1]}"
    if a.modules and set(a.modules.values()) == set(b.modules.values()):
        yield "both ran the same modules, so that no change comes from the compiler"
    for field, what in (("flags", "flags"), ("passes", "passes of the plugin")):
        dropped, added = only_in(getattr(a, field), getattr(b, field))
        if dropped or added:
            yield f"{what} only in A: {' '.join(dropped) or 'none'}; only in B: {' '.join(added) or 'none'}"
    versions = {
        name: (a.versions.get(name, "none"), b.versions.get(name, "none")) for name in {**a.versions, **b.versions}
    }
    changed = [f"{name} {x} and {y}" for name, (x, y) in versions.items() if x != y]
    if changed:
        yield f"versions differ: {', '.join(changed)}"


def _describe(row: DiffRow) -> str:
    only = {"both": "", "a": " only in A", "b": " only in B"}[row.side]
    return f"{row.label}{only}" + (f" ({row.detail})" if row.detail else "")


def _describe_all(rows: Sequence[DiffRow]) -> str:
    """Rows of one side: the one that takes most of a call, and how many there are besides."""
    most = max(rows, key=lambda row: abs(row.delta_ns))
    return most.label + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")


def _percent(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} {'slower' if ratio >= 1 else 'faster'}" if ratio < 2 else f"{ratio:.1f}x slower"


def _interval(change: Change) -> str:
    return f"{change.ratio - 1:+.1%} [{change.low - 1:+.1%}, {change.high - 1:+.1%}], noise floor {change.floor:.1%}"
