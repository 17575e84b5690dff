"""Takes out of a comparison what slows a whole machine: in a single process, and between the two sides.

A machine that others use is slower for minutes at a time. Each quantity is therefore measured against all others, the
references: by how much a process was slower than the others of its side is the weighted median over the references,
and what remains of a quantity is its own noise. A quantity is never a reference of its own, or its noise would look
smaller than it is. Between the sides this takes that most references moved by one ratio, the drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmir_iree.tracing.noise import Differences, Floats, find_differences

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
    """Logarithms of times that were measured on both sides: `a` and `b` are [processes, quantities]."""

    a: Floats
    b: Floats

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
        drift: logarithm of the ratio of B to A by which most references moved, None if there is no such ratio: nothing
            is taken out then.
        excess: by how much the sides differ more than their processes tell, see `Differences.excess`.
    """

    references: Quantities
    drift: float | None
    excess: float = 1.0

    def find_differences(self, quantities: Quantities, others: Mask) -> Differences:
        """Compare the two sides, the drift and each process's own slowness taken out.

        Args:
            quantities: what to compare.
            others: [quantities, references], which references have no part in a quantity; at least one for each.
        """
        if self.drift is None:
            return find_differences(quantities.a, quantities.b, quantities.sizes)
        weights = self.references.weights * others
        a = quantities.a - _slowness(self.references.a, weights)
        b = quantities.b - _slowness(self.references.b, weights) - self.drift
        return find_differences(a, b, quantities.sizes, self.excess)


def find_baseline(references: Quantities) -> Baseline:
    """Find the drift, and how noisy the sides were beyond their processes."""
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
    return Baseline(references, drift, noise.excess)


def _slowness(references: Floats, weights: Floats) -> Floats:
    """By how much [processes, quantities] each process was slower than its side, by the references' weights."""
    residuals = references - references.mean(axis=0)
    slowness = np.array([[_weighted_median(process, row) for row in weights] for process in residuals])
    return np.asarray(slowness - slowness.mean(axis=0))


def _weighted_median(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(sums, sums[-1] / 2)])
