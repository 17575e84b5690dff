"""Measures the measurer: what recording adds to a call, with each profiler and without, in turns.

A process calls the function again and again, and tells the time of each call by its own clock. Processes without a
profiler, with `.ireeprof` and with Tracy's runtime take turns, in an order that rotates, and those of one round are
compared with each other. What is written when a process ends is no part of a call, and is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmir_iree.tracing.capture import CaptureError, Source
from llmir_iree.tracing.children import run_child
from llmir_iree.tracing.tracy_capture import record_tracy
from llmir_iree.tracing.workload import Workload, read_call_times

PROFILERS: tuple[Source, ...] = ("ireeprof", "tracy")

# The first call of a process meets cold caches and memory that was never touched.
_WARM_UP_CALLS = 1
_MIN_ROUNDS = 3
_RESAMPLES = 10_000
_INTERVAL = (0.025, 0.975)
_SEED = 0


@dataclass(frozen=True)
class OverheadOptions:
    """How to measure.

    Attributes:
        calls: that are timed in a process.
        rounds: processes of each kind.
        timeout_s: deadline of each process.
    """

    calls: int = 30
    rounds: int = 12
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.calls < 1 or self.rounds < _MIN_ROUNDS or self.timeout_s <= 0:
            raise CaptureError(
                f"calls {self.calls}, rounds {self.rounds}, timeout {self.timeout_s:g} s: expected at least 1, "
                f"{_MIN_ROUNDS} and more than 0"
            )


@dataclass(frozen=True)
class Ratio:
    """Of times with a profiler to those without: the median of all rounds, and its interval at 95% by bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ProfilerCost:
    """What one profiler costs: of the median call of each process, and of the mean one, in which slow calls count."""

    source: Source
    median: Ratio
    mean: Ratio


@dataclass(frozen=True)
class Overhead:
    """What profilers cost.

    Attributes:
        call_ns: a call without any, the median of all processes' medians.
        costs: of each profiler that ran.
        missing: those that did not, each with the reason.
    """

    call_ns: float
    costs: tuple[ProfilerCost, ...]
    missing: dict[str, str]


def measure_overhead(
    workload: Workload, options: OverheadOptions | None = None, report: Callable[[str], None] = lambda _: None
) -> Overhead:
    """Measure what each profiler adds to a call.

    Args:
        workload: what to call.
        options: how.
        report: told of every round as it begins.

    Raises:
        CaptureError: the workload fails without a profiler, too.
    """
    options = options or OverheadOptions()
    kinds: list[Source | None] = [None, *PROFILERS]
    times: dict[Source | None, list[npt.NDArray[np.float64]]] = {kind: [] for kind in kinds}
    missing: dict[str, str] = {}
    for number in range(options.rounds):
        report(f"round {number + 1} of {options.rounds}")
        first = number % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            try:
                times[kind].append(_time_calls(workload, kind, options))
            except CaptureError as error:
                if kind is None:
                    raise
                missing[kind] = str(error)
        # A profiler that failed once has no pairs to be compared in.
        kinds = [kind for kind in kinds if kind not in missing]
    alone = times[None]
    costs = [
        ProfilerCost(
            source, compare_rounds(alone, times[source], np.median), compare_rounds(alone, times[source], np.mean)
        )
        for source in PROFILERS
        if source not in missing
    ]
    return Overhead(float(np.median([np.median(calls) for calls in alone])), tuple(costs), missing)


def compare_rounds(
    alone: Sequence[npt.NDArray[np.float64]],
    profiled: Sequence[npt.NDArray[np.float64]],
    middle: Callable[[npt.NDArray[np.float64]], np.floating],
) -> Ratio:
    """The ratio of processes' times, round by round.

    Args:
        alone: times of all calls, an array for each process.
        profiled: the same with a profiler, in the same rounds.
        middle: what stands for a process, such as `numpy.median`.
    """
    ratios = np.array([middle(with_it) / middle(without) for without, with_it in zip(alone, profiled, strict=True)])
    drawn = np.random.default_rng(_SEED).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), _INTERVAL).tolist()
    return Ratio(float(np.median(ratios)), low, high)


def _time_calls(workload: Workload, source: Source | None, options: OverheadOptions) -> npt.NDArray[np.float64]:
    """Times of the calls of one process [calls], in ns."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"process.{source}"
        command = workload.command(
            options.calls + _WARM_UP_CALLS,
            profile=file if source == "ireeprof" else None,
            traced=source == "tracy",
            is_each_timed=True,
        )
        if source == "tracy":
            program = record_tracy(command, file, timeout_s=options.timeout_s, calls_modules=workload.is_local)
            if program.problem is not None:
                raise CaptureError(program.problem)
            told = program.stdout
        else:
            told = run_child(command, timeout_s=options.timeout_s, calls_modules=workload.is_local)
    return np.array(read_call_times(told)[_WARM_UP_CALLS:], np.float64)
