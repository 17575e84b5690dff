"""What is taken for a machine that was slow, and what is not."""

import numpy as np

from llmir_iree.tracing.drift import Quantities, find_baseline


def measure(times, moved, noise, processes=5, seed=0):
    """Logarithms of times [quantities] in each process, moved by ratios, with noise of its own in each."""
    generator = np.random.default_rng(seed)
    values = np.log(np.asarray(times) * np.asarray(moved))
    return values + noise * generator.standard_normal((processes, len(times)))


def test_a_slow_machine_is_recognised():
    times = np.linspace(10e3, 100e3, 12)
    for drift in (0.8, 1.05, 1.4):
        a, b = (measure(times, ratio, 0.01, seed=seed) for seed, ratio in enumerate((1.0, drift)))
        found = find_baseline(Quantities(a, b)).drift
        assert found is not None
        assert abs(np.exp(found) / drift - 1) < 0.02


def test_what_noise_hides_is_not_taken_for_drift():
    """Half of the time did not move, half moved by two thirds, and the noise is wide enough for any of it."""
    times = np.full(12, 50e3)
    moved = np.where(np.arange(12) % 2 == 0, 1.0, 1.67)
    for seed in range(5):
        a = measure(times, 1.0, 0.3, processes=3, seed=seed)
        b = measure(times, moved, 0.3, processes=3, seed=seed + 100)
        # The noise of a side cancels out, so that the ratios are those above.
        a -= a.mean(axis=0) - np.log(times)
        b -= b.mean(axis=0) - np.log(times * moved)
        assert find_baseline(Quantities(a, b)).drift is None or abs(find_baseline(Quantities(a, b)).drift) < 0.01
