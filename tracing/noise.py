"""Tells changes from noise: the statistics of quantities that a few processes of two sides have measured.

What one process measures is one observation, however often it calls: its events share a heap, a placement in memory
and the minute in which they ran. A side has a handful of processes, too few to know the noise of any one quantity, but
there are many quantities, and their noise is learnt from all of them together:

1. The process means of each side leave residuals, which hold no difference between the sides.
2. The variance of a quantity is moderated: pulled towards that of the quantities of similar size (Smyth, Linear models
   and empirical Bayes methods, 2004), so that three processes which agree by chance do not make a change certain.
3. The residuals of all quantities, in units of that common variance, are resampled under the hypothesis that nothing
   changed, smoothed, and studentised as the real ones are. The largest of all quantities in each resample gives the
   critical value for all of them at once (Westfall and Young, Resampling-based multiple testing, 1993).
4. If even the middle of all quantities differs by more than the processes explain, the two sides were noisier than each
   of them, and all errors grow by as much (Efron, Large-scale simultaneous hypothesis testing, 2004).

All quantities here are logarithms of times, so that differences are ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MIN_PROCESSES = 3

# How sure an interval of one quantity is, and how seldom any of all quantities may be called where nothing changed.
CONFIDENCE = 0.95
FALSE_ALARMS = 0.02

# Below this a difference is not called, however sure it is: placement in memory alone moves times by as much.
MIN_CHANGE = float(np.log(1.01))

_RESAMPLES = 4000
_BATCH = 250
_SEED = 0

# Weight of the common variance, in degrees of freedom, and over how many quantities of similar size it is taken.
_PRIOR_DEGREES = 4.0
_NEIGHBOURS = 9
# Width of the noise that smooths what is resampled, in standard deviations.
_SMOOTHING = 0.5
# The median of a standard normal's absolute value.
_NORMAL_MEDIAN = 0.6745
# From so many quantities on, their middle says something of the noise.
_MIN_QUANTITIES = 5


@dataclass(frozen=True)
class Differences:
    """Differences between two sides, one a quantity.

    Attributes:
        values: mean of B less mean of A.
        errors: their standard errors.
        interval: half the width of the intervals, in standard errors, at `CONFIDENCE` each.
        critical: the same at `FALSE_ALARMS` for all quantities together.
        critical_for_one: the same at `FALSE_ALARMS` for one.
    """

    values: Floats
    errors: Floats
    interval: float
    critical: float
    critical_for_one: float

    @property
    def margins(self) -> Floats:
        """Half the width of each quantity's interval."""
        return self.interval * self.errors

    @property
    def floors(self) -> Floats:
        """The noise floor of each quantity: smaller differences are not called."""
        return np.maximum(self.critical * self.errors, MIN_CHANGE)

    @property
    def excess(self) -> float:
        """By how much the sides differ more than their processes tell, 1 or more, if most quantities did not change."""
        if len(self.values) < _MIN_QUANTITIES:
            return 1.0
        return max(1.0, float(np.median(np.abs(self.values / self.errors))) / _NORMAL_MEDIAN)

    @property
    def are_called(self) -> npt.NDArray[np.bool_]:
        """Which of them are changes."""
        return np.abs(self.values) > self.floors


def find_differences(a: Floats, b: Floats, sizes: Floats, excess: float = 1.0) -> Differences:
    """Compare two sides.

    Args:
        a: logarithms [processes, quantities] of one side, at least `MIN_PROCESSES` processes.
        b: the same of the other side.
        sizes: [quantities], by which quantities are similar; longer times are measured more exactly.
        excess: by how much larger than the processes tell the errors are, see `Differences.excess`.
    """
    counts = (len(a), len(b))
    order = np.argsort(sizes, kind="stable")
    sides = [np.asarray(side[:, order], np.float64) for side in (a, b)]
    variances = _pooled_variances(sides)
    common = _smooth(variances)
    spread = float(np.sqrt(1 / counts[0] + 1 / counts[1]))
    errors, values = np.empty_like(variances), np.empty_like(variances)
    errors[order] = np.sqrt(_moderate(variances, common, counts)) * spread * excess
    values[order] = sides[1].mean(axis=0) - sides[0].mean(axis=0)
    # Residuals about a mean of few are smaller than about the true one.
    residuals = [
        (side - side.mean(axis=0)) * np.sqrt(count / (count - 1)) for side, count in zip(sides, counts, strict=True)
    ]
    quantiles = _resample(np.concatenate(residuals) / np.sqrt(common), counts, spread)
    return Differences(values, errors, *quantiles)


def _pooled_variances(sides: Sequence[Floats]) -> Floats:
    """Of each quantity, from the processes [..., processes, quantities] of both sides about their own means."""
    squares = [((side - side.mean(axis=-2, keepdims=True)) ** 2).sum(axis=-2) for side in sides]
    degrees = sum(side.shape[-2] for side in sides) - len(sides)
    # A clock of whole nanoseconds may show no variance at all.
    return np.asarray(np.maximum(sum(squares, np.zeros(())) / degrees, np.finfo(np.float64).eps))


def _smooth(variances: Floats) -> Floats:
    """For every quantity [..., quantities], in order of size, the median variance of those next to it."""
    count = variances.shape[-1]
    window = min(_NEIGHBOURS, count)
    first = np.clip(np.arange(count) - window // 2, 0, count - window)
    return np.asarray(np.median(variances[..., first[:, None] + np.arange(window)], axis=-1))


def _moderate(variances: Floats, common: Floats, counts: tuple[int, int]) -> Floats:
    degrees = sum(counts) - 2
    return np.asarray((degrees * variances + _PRIOR_DEGREES * common) / (degrees + _PRIOR_DEGREES))


def _resample(residuals: Floats, counts: tuple[int, int], spread: float) -> tuple[float, float, float]:
    """Quantiles of studentised differences where nothing changed, in the order of `Differences`.

    Args:
        residuals: [processes, quantities] in units of the common deviation of each quantity.
        counts: processes of each side.
        spread: standard error of a difference of means, in standard deviations of one process.
    """
    generator = np.random.default_rng(_SEED)
    processes, quantities = residuals.shape
    deviations = np.sqrt((residuals**2).mean(axis=0))
    one: list[Floats] = []
    largest: list[Floats] = []
    for _ in range(_RESAMPLES // _BATCH):
        # Noisy quantities stay noisy: all draws for one are from one. A side of few would too often be drawn all equal,
        # and certain of itself, so that draws are smoothed.
        drawn = generator.integers(quantities, size=(_BATCH, 1, quantities))
        a, b = (
            (
                residuals[generator.integers(processes, size=(_BATCH, count, quantities)), drawn]
                + _SMOOTHING * deviations[drawn] * generator.standard_normal((_BATCH, count, quantities))
            )
            for count in counts
        )
        variances = _pooled_variances((a, b))
        errors = np.sqrt(_moderate(variances, _smooth(variances), counts)) * spread
        studentised = np.abs(b.mean(axis=1) - a.mean(axis=1)) / errors
        one.append(studentised[:, 0])
        largest.append(studentised.max(axis=1))
    return (
        float(np.quantile(np.concatenate(one), CONFIDENCE)),
        float(np.quantile(np.concatenate(largest), 1 - FALSE_ALARMS)),
        float(np.quantile(np.concatenate(one), 1 - FALSE_ALARMS)),
    )
