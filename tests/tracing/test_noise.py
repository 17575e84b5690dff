"""The statistics: how seldom noise is called a change, how small a change is found, and what hides neither."""

import numpy as np
import pytest

from llmir_iree.tracing.drift import Quantities, find_baseline
from llmir_iree.tracing.noise import FALSE_ALARMS, Differences, Floats, find_differences

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


CHANGED = 9


def fewest_found(change: float, processes: int, of: int) -> int:
    """How many changes a plain test finds but once in a thousand times, by simulation of what should be no better.

    Each quantity has a t-test with the variance of its own few processes, at the largest of all where nothing
    changed, and with errors that grow with the middle of all. Processes that share a slowness make it no easier.
    """
    generator = np.random.default_rng(11)
    noise = NOISE * generator.standard_t(4, (2, 20_000, processes, len(SIZES)))
    errors = np.sqrt(noise.var(axis=2, ddof=1).sum(axis=0) / processes)
    differences = noise.mean(axis=2)[1] - noise.mean(axis=2)[0]
    critical = np.quantile(np.abs(differences / errors).max(axis=1), 1 - FALSE_ALARMS)
    excess = np.maximum(1.0, np.median(np.abs(differences / errors), axis=1) / 0.6745)
    power = np.mean(np.abs(differences + np.log(1 + change))[:, CHANGED] > critical * excess * errors[:, CHANGED])
    return int(np.quantile(generator.binomial(of, power, 100_000), 0.001))


@pytest.mark.parametrize(("change", "processes"), [(0.03, 5), (0.08, 3), (0.5, 3)])
def test_a_change_of_one_is_found(change: float, processes: int) -> None:
    generator = np.random.default_rng(7)
    found = 0
    for _ in range(20):
        a, b = noisy(generator, processes, drift=0.02), noisy(generator, processes, drift=0.02)
        b[:, CHANGED] += np.log(1 + change)
        differences = beyond(a, b)[1]
        found += bool(differences.are_called[CHANGED])
        assert differences.are_called.sum() <= 1
    assert found >= fewest_found(change, processes, 20)


@pytest.mark.parametrize("processes", [3, 5])
def test_a_machine_that_wanders_is_seldom_called_in_turns(processes: int) -> None:
    """Of 120 answers, two for each, 2% may be wrong: ten of them would come twice in 10,000."""
    generator = np.random.default_rng(processes)
    alarms = 0
    for _ in range(60):
        a, b = (noisy(generator, processes, drift=0.05) for _ in range(2))
        quantities = Quantities(a, b, are_paired=True)
        baseline = find_baseline(quantities)
        found = baseline.find_differences(quantities, ~np.eye(len(SIZES), dtype=np.bool_))
        alarms += baseline.uniform is not None
        alarms += bool(found.are_called.any())
    assert alarms < 10


def test_pairs_share_the_machine() -> None:
    """What moves both sides of a turn by a half hides nothing: 5% of all quantities are called, and as 5%."""
    generator = np.random.default_rng(4)
    a, b = noisy(generator, 5), noisy(generator, 5) + np.log(1.05)
    turns = 0.5 * generator.standard_normal((5, 1))
    baseline = find_baseline(Quantities(a + turns, b + turns, are_paired=True))
    assert baseline.uniform == pytest.approx(np.log(1.05), abs=0.01)
    assert baseline.drift is None


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
