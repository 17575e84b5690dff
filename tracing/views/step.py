"""Picks the call of a function that stands for all of them, and says what stood where in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llmir_iree.tracing.capture import Capture, DispatchRun, Site
from llmir_iree.tracing.table import Step, known_sites, steady_steps

# Of a dispatch whose site the capture does not describe.
UNKNOWN_KIND = "unknown"


@dataclass(frozen=True)
class TypicalStep:
    """One function of a capture.

    Attributes:
        function: its name.
        steps: all that tables are made of, over all processes.
        typical: the one of median wall time, the shorter one of an even number.
        runs: its dispatches, by start.
        sites: what is known of the function's dispatches, by number.
    """

    function: str
    steps: tuple[Step, ...]
    typical: Step
    runs: tuple[DispatchRun, ...]
    sites: dict[int, Site]

    @property
    def wall_ns(self) -> int:
        """From the beginning of the typical step to that of the next one."""
        return round(self.typical.wall_ns)

    @property
    def between_ns(self) -> int:
        """Time of it in which no dispatch ran."""
        return round(self.typical.between_ns)

    def site(self, run: DispatchRun) -> Site:
        """What is known of a dispatch's place; a bare `Site` of unknown kind if the capture does not describe it."""
        known = self.sites.get(run.site)
        if known is not None and known.key == run.key:
            return known
        return Site(function=run.function, site=run.site, key=run.key, executable=run.key, kind=UNKNOWN_KIND)


def typical_steps(capture: Capture) -> list[TypicalStep]:
    """One for each function that was called, in the manifest's order.

    Raises:
        CaptureError: a table is damaged, or it has no calls at all.
    """
    steps: defaultdict[str, list[Step]] = defaultdict(list)
    for step in steady_steps(capture):
        steps[step.call.function].append(step)
    sites: defaultdict[str, dict[int, Site]] = defaultdict(dict)
    for site in known_sites(capture):
        sites[site.function][site.site] = site
    order = {name: position for position, name in enumerate(capture.manifest.functions)}
    found = []
    for function in sorted(steps, key=lambda name: (order.get(name, len(order)), name)):
        typical = _median([step for step in steps[function] if step.runs] or steps[function])
        runs = sorted(typical.runs, key=lambda run: (run.start_ns, run.site))
        found.append(TypicalStep(function, tuple(steps[function]), typical, tuple(runs), sites[function]))
    return found


def _median(steps: Sequence[Step]) -> Step:
    ordered = sorted(steps, key=lambda step: (step.wall_ns, step.call.process, step.call.call))
    return ordered[(len(ordered) - 1) // 2]
