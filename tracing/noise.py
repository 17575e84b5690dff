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

Where the processes of the sides took turns, those of one turn are compared with each other: what is observed is then
the difference of a pair, and all of the above holds for these differences, which share no slowness of the machine.

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
    return _judge([a, b], b.mean(axis=0) - a.mean(axis=0), sizes, excess)


def find_paired_differences(differences: Floats, sizes: Floats, excess: float = 1.0) -> Differences:
    """Compare two sides whose processes took turns.

    Args:
        differences: logarithms [pairs, quantities] of the ratio of B to A in each turn, at least `MIN_PROCESSES`.
        sizes: as in `find_differences`.
        excess: as in `find_differences`.
    """
    return _judge([differences], differences.mean(axis=0), sizes, excess)


def _judge(samples: Sequence[Floats], values: Floats, sizes: Floats, excess: float) -> Differences:
    """Find out how sure values [quantities] are, which are the mean of one sample, or the difference of two means."""
    counts = [len(sample) for sample in samples]
    order = np.argsort(sizes, kind="stable")
    ordered = [np.asarray(sample[:, order], np.float64) for sample in samples]
    variances = _pooled_variances(ordered)
    common = _smooth(variances)
    errors = np.empty_like(variances)
    errors[order] = np.sqrt(_moderate(variances, common, counts)) * _spread(counts) * excess
    # Residuals about a mean of few are smaller than about the true one.
    residuals = [
        (sample - sample.mean(axis=0)) * np.sqrt(count / (count - 1))
        for sample, count in zip(ordered, counts, strict=True)
    ]
    return Differences(values, errors, *_resample(np.concatenate(residuals) / np.sqrt(common), counts))


def _spread(counts: Sequence[int]) -> float:
    """Standard error of a mean, or of a difference of means, in standard deviations of one process or pair."""
    return float(np.sqrt(sum(1 / count for count in counts)))


def _pooled_variances(samples: Sequence[Floats]) -> Floats:
    """Of each quantity, from all samples [..., processes, quantities] about their own means."""
    squares = [((sample - sample.mean(axis=-2, keepdims=True)) ** 2).sum(axis=-2) for sample in samples]
    degrees = _degrees([sample.shape[-2] for sample in samples])
    # A clock of whole nanoseconds may show no variance at all.
    return np.asarray(np.maximum(sum(squares, np.zeros(())) / degrees, np.finfo(np.float64).eps))


def _smooth(variances: Floats) -> Floats:
    """For every quantity [..., quantities], in order of size, the median variance of those next to it."""
    count = variances.shape[-1]
    window = min(_NEIGHBOURS, count)
    first = np.clip(np.arange(count) - window // 2, 0, count - window)
    return np.asarray(np.median(variances[..., first[:, None] + np.arange(window)], axis=-1))


def _moderate(variances: Floats, common: Floats, counts: Sequence[int]) -> Floats:
    degrees = _degrees(counts)
    return np.asarray((degrees * variances + _PRIOR_DEGREES * common) / (degrees + _PRIOR_DEGREES))


def _degrees(counts: Sequence[int]) -> int:
    return sum(counts) - len(counts)


def _resample(residuals: Floats, counts: Sequence[int]) -> tuple[float, float, float]:
    """Quantiles of studentised values where nothing changed, in the order of `Differences`.

    Args:
        residuals: [processes or pairs, quantities] in units of the common deviation of each quantity.
        counts: processes of each side, or pairs.
    """
    generator = np.random.default_rng(_SEED)
    observations, quantities = residuals.shape
    deviations = np.sqrt((residuals**2).mean(axis=0))
    one: list[Floats] = []
    largest: list[Floats] = []
    for _ in range(_RESAMPLES // _BATCH):
        # Noisy quantities stay noisy: all draws for one are from one. A side of few would too often be drawn all equal,
        # and certain of itself, so that draws are smoothed.
        drawn = generator.integers(quantities, size=(_BATCH, 1, quantities))
        samples = [
            residuals[generator.integers(observations, size=(_BATCH, count, quantities)), drawn]
            + _SMOOTHING * deviations[drawn] * generator.standard_normal((_BATCH, count, quantities))
            for count in counts
        ]
        if len(samples) == 1:  # Where nothing changed, a pair may as well be the other way round.
            samples[0] *= generator.choice((-1.0, 1.0), samples[0].shape)
        variances = _pooled_variances(samples)
        errors = np.sqrt(_moderate(variances, _smooth(variances), counts)) * _spread(counts)
        means = [sample.mean(axis=1) for sample in samples]
        studentised = np.abs(means[-1] - (means[0] if len(means) > 1 else 0.0)) / errors
        one.append(studentised[:, 0])
        largest.append(studentised.max(axis=1))
    return (
        float(np.quantile(np.concatenate(one), CONFIDENCE)),
        float(np.quantile(np.concatenate(largest), 1 - FALSE_ALARMS)),
        float(np.quantile(np.concatenate(one), 1 - FALSE_ALARMS)),
    )
