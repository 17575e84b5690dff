"""Takes out of a comparison what slows a whole machine: in a single process, and between the two sides.

A machine that others use is slower for minutes at a time. Each quantity is therefore measured against all others, the
references: by how much a process was slower than the others of its side is the weighted median over the references,
and what remains of a quantity is its own noise. A quantity is never a reference of its own, or its noise would look
smaller than it is. Between the sides this takes that most references moved by one ratio, the drift.

Where the processes of the sides took turns, the same is done with the differences of each pair, and the drift is put to
the test first: a ratio that holds pair after pair is no doing of a machine that both sides shared. It is a change then,
and nothing is taken out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmir_iree.tracing.noise import MIN_CHANGE, Differences, Floats, find_differences, find_paired_differences

Mask = npt.NDArray[np.bool_]

# No reference decides alone, and these many of them, by their time, have to agree within so much.
_MOST_WEIGHT = 0.2
_MIN_REFERENCES = 3
_AGREEMENT = 0.6
_ALIKE = float(np.log(1.02))
# A drift beyond this has to show: where noise is wide enough to agree with anything, it also agrees with a drift.
_LARGE_DRIFT = float(np.log(1.1))


@dataclass(frozen=True)
class Quantities:
    """Logarithms of times that were measured on both sides: `a` and `b` are [processes, quantities].

    Where they are paired, the n-th processes of both sides ran in one turn, and there are as many of each.
    """

    a: Floats
    b: Floats
    are_paired: bool = False

    @property
    def sizes(self) -> Floats:
        """Mean of both sides."""
        return np.asarray((self.a.mean(axis=0) + self.b.mean(axis=0)) / 2)

    @property
    def weights(self) -> Floats:
        """What each counts for as a reference: its part of all time, and no more than a fifth."""
        times = np.exp(self.sizes)
        return np.asarray(np.minimum(times / times.sum(), _MOST_WEIGHT))


@dataclass(frozen=True)
class Baseline:
    """What quantities are measured against.

    Attributes:
        references: quantities most of which did not change, if there is a drift.
        drift: logarithm of the ratio of B to A by which most references moved, None if there is no such ratio, or if it
            is a change: nothing is taken out then.
        excess: by how much the sides differ more than their processes tell, see `Differences.excess`.
        uniform: logarithm of that ratio if it is a change, None if it is not or cannot be told from a drift.
    """

    references: Quantities
    drift: float | None
    excess: float = 1.0
    uniform: float | None = None

    def find_differences(self, quantities: Quantities, others: Mask) -> Differences:
        """Compare the two sides, the drift and each process's own slowness taken out if there is a drift.

        Args:
            quantities: what to compare.
            others: [quantities, references], which references have no part in a quantity; at least one for each.
        """
        if self.drift is None:
            return _compare(quantities.a, quantities.b, quantities)
        weights, references = self.references.weights * others, self.references
        if quantities.are_paired:
            slowness = _slowness(references.b - references.a, weights)
            return _compare(quantities.a + slowness, quantities.b - self.drift, quantities, self.excess)
        a = quantities.a - _slowness(references.a, weights)
        b = quantities.b - _slowness(references.b, weights) - self.drift
        return _compare(a, b, quantities, self.excess)


def find_baseline(references: Quantities) -> Baseline:
    """Find the drift, or that it is a change, and how noisy the sides were beyond their processes."""
    count = references.a.shape[1]
    if count < _MIN_REFERENCES:
        return Baseline(references, None)
    weights = references.weights
    drift = _weighted_median(references.b.mean(axis=0) - references.a.mean(axis=0), weights)
    noise = Baseline(references, drift).find_differences(references, ~np.eye(count, dtype=np.bool_))
    limits = np.maximum(noise.floors, _ALIKE)
    if abs(drift) > _LARGE_DRIFT:
        limits = np.minimum(limits, abs(drift) / 2)
    agree = np.abs(noise.values) <= limits
    if agree.sum() < _MIN_REFERENCES or weights[agree].sum() < _AGREEMENT * weights.sum():
        return Baseline(references, None)
    if references.are_paired and _is_change(references, weights):
        return Baseline(references, None, uniform=drift)
    return Baseline(references, drift, noise.excess)


def _compare(a: Floats, b: Floats, quantities: Quantities, excess: float = 1.0) -> Differences:
    if quantities.are_paired:
        return find_paired_differences(b - a, quantities.sizes, excess)
    return find_differences(a, b, quantities.sizes, excess)


def _is_change(references: Quantities, weights: Floats) -> bool:
    """Whether the middle of all references moves by one ratio from pair to pair, and not by chance."""
    middles = np.array([[_weighted_median(pair, weights)] for pair in references.b - references.a])
    found = find_paired_differences(middles, np.zeros(1))
    return bool(np.abs(found.values[0]) > max(found.critical_for_one * found.errors[0], MIN_CHANGE))


def _slowness(references: Floats, weights: Floats) -> Floats:
    """By how much [processes, quantities] each process was slower than its side, by the references' weights."""
    residuals = references - references.mean(axis=0)
    slowness = np.array([[_weighted_median(process, row) for row in weights] for process in residuals])
    return np.asarray(slowness - slowness.mean(axis=0))


def _weighted_median(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(sums, sums[-1] / 2)])
