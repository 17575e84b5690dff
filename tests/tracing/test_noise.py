"""The statistics: how seldom noise is called a change, how small a change is found, and what hides neither."""

import numpy as np
import pytest

from llmir_iree.tracing.drift import Quantities, find_baseline
from llmir_iree.tracing.noise import Differences, Floats, find_differences

# Of the quantities' noise: short times are the noisier ones.
SIZES = np.log(np.array([2e3, 3e3, 5e3, 9e3, 2e4, 4e4, 9e4, 2e5, 4e5, 1e6, 2e6, 3e6]))
NOISE = 0.003 + 20.0 / np.exp(SIZES)


def noisy(generator: np.random.Generator, processes: int, *, drift: float = 0.0) -> Floats:
    """Logarithms [processes, quantities] with heavy tails, and a slowness of each process."""
    own = NOISE * generator.standard_t(4, (processes, len(SIZES)))
    return np.asarray(SIZES + own + drift * generator.standard_normal((processes, 1)))


def beyond(a: Floats, b: Floats) -> tuple[float | None, Differences]:
    quantities = Quantities(a, b)
    baseline = find_baseline(quantities)
    return baseline.drift, baseline.find_differences(quantities, ~np.eye(len(SIZES), dtype=np.bool_))


@pytest.mark.parametrize("processes", [3, 5])
def test_noise_is_seldom_called(processes: int) -> None:
    generator = np.random.default_rng(processes)
    calls = [find_differences(noisy(generator, processes), noisy(generator, processes), SIZES) for _ in range(60)]
    assert sum(bool(found.are_called.any()) for found in calls) <= 1


def test_a_slow_machine_is_seldom_called() -> None:
    """Processes differ by 3%, one side is slower by up to 20%, and both calls and drift are right."""
    generator = np.random.default_rng(0)
    false_alarms = 0
    for _ in range(40):
        shift = generator.uniform(-0.2, 0.2)
        drift, found = beyond(noisy(generator, 5, drift=0.03), noisy(generator, 5, drift=0.03) + shift)
        assert drift == pytest.approx(shift, abs=0.08)
        false_alarms += bool(found.are_called.any())
    assert false_alarms <= 1


@pytest.mark.parametrize(("change", "processes"), [(0.03, 5), (0.08, 3), (0.5, 3)])
def test_a_change_of_one_is_found(change: float, processes: int) -> None:
    generator = np.random.default_rng(7)
    found = 0
    for _ in range(20):
        a, b = noisy(generator, processes, drift=0.02), noisy(generator, processes, drift=0.02)
        b[:, 9] += np.log(1 + change)
        differences = beyond(a, b)[1]
        found += bool(differences.are_called[9])
        assert differences.are_called.sum() <= 1
    assert found >= 16


def test_intervals_hold_what_they_say() -> None:
    generator = np.random.default_rng(3)
    inside = []
    for _ in range(60):
        a, b = noisy(generator, 4), noisy(generator, 4)
        b[:, 5] += 0.3
        found = find_differences(a, b, SIZES)
        inside.append(np.abs(found.values - np.where(np.arange(len(SIZES)) == 5, 0.3, 0.0)) <= found.margins)
    assert np.mean(inside) > 0.93


def test_without_agreement_there_is_no_drift() -> None:
    """Another target changes everything, each by a ratio of its own: that is no slow machine."""
    generator = np.random.default_rng(1)
    a, b = noisy(generator, 3), noisy(generator, 3) + np.linspace(0.2, 3.5, len(SIZES))
    drift, found = beyond(a, b)
    assert drift is None
    assert found.are_called.all()


def test_two_quantities_have_no_drift() -> None:
    generator = np.random.default_rng(1)
    a, b = noisy(generator, 3)[:, -2:], noisy(generator, 3)[:, -2:] + 0.1
    assert find_baseline(Quantities(a, b)).drift is None


def test_three_that_agree_by_chance_make_nothing_certain() -> None:
    """The processes of one quantity agree exactly, on both sides; the noise of its neighbours counts as well."""
    generator = np.random.default_rng(5)
    a, b = noisy(generator, 3), noisy(generator, 3)
    a[:, 4], b[:, 4] = SIZES[4], SIZES[4] + NOISE[4]
    assert not find_differences(a, b, SIZES).are_called[4]


def test_a_change_below_a_percent_is_not_called() -> None:
    a = np.tile(SIZES, (3, 1))
    b = a + np.array([0.009] + [0.0] * (len(SIZES) - 1))
    assert not find_differences(a, b, SIZES).are_called.any()
    assert find_differences(a, b + np.array([0.002] + [0.0] * (len(SIZES) - 1)), SIZES).are_called[0]


def test_the_same_data_give_the_same_answer() -> None:
    generator = np.random.default_rng(9)
    a, b = noisy(generator, 3), noisy(generator, 3)
    first, second = find_differences(a, b, SIZES), find_differences(a, b, SIZES)
    assert (first.critical, first.interval) == (second.critical, second.interval)
