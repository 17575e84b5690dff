"""The cost of recording: how it is computed, and that it is measured of a real function."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llmir_iree.cli.trace import main
from llmir_iree.tracing import overhead
from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.overhead import OverheadOptions, compare_rounds, measure_overhead
from llmir_iree.tracing.workload import Workload, read_call_times
from tests.tracing.conftest import INPUTS


def test_a_known_cost_is_found_on_a_machine_that_wanders() -> None:
    """Rounds differ by a factor of two, processes by 2%: the error of the median of 12 is 1%."""
    generator = np.random.default_rng(0)
    speeds = np.exp(generator.uniform(0, np.log(2), 12))
    rounds = [[speed * ratio * np.exp(0.02 * generator.standard_normal()) for ratio in (1, 1.1)] for speed in speeds]
    alone, profiled = ([np.full(5, 1e6 * one) for one in side] for side in zip(*rounds, strict=True))
    found = compare_rounds(alone, profiled, np.median)
    assert found.value == pytest.approx(1.1, rel=0.05)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.1


def test_slow_calls_count_in_means_only() -> None:
    alone = [np.full(10, 1e6)] * 3
    profiled = [np.array([1e6] * 9 + [6e6])] * 3
    assert compare_rounds(alone, profiled, np.median).value == 1.0
    assert compare_rounds(alone, profiled, np.mean).value == pytest.approx(1.5)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["overhead", *map(str, arguments)])


def test_a_real_function(small_text: Path) -> None:
    done = run(small_text, *INPUTS, "--calls", "3", "--rounds", "3", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["call_ns"] > 0
    assert found["missing"] == {}
    assert [cost["source"] for cost in found["costs"]] == ["ireeprof", "tracy"]
    assert all(cost["median"]["low"] <= cost["median"]["value"] <= cost["median"]["high"] for cost in found["costs"])
    assert [line for line in done.stderr.splitlines() if "round" in line] == [f"round {n} of 3 ..." for n in (1, 2, 3)]


def test_a_profiler_that_is_missing_is_told(small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_arguments: object, **_options: object) -> None:
        raise CaptureError("no tracer here")

    monkeypatch.setattr(overhead, "record_tracy", lack)
    done = run(small_text, *INPUTS, "--calls", "1", "--rounds", "3", "--quiet")
    assert done.exit_code == 0, done.output
    assert "missing: tracy: no tracer here" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("ireeprof ")]
    assert done.stderr == ""


def test_a_workload_that_fails_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    monkeypatch.setattr(Workload, "command", lambda *_arguments, **_options: crash)
    with pytest.raises(CaptureError, match="killed by SIGSEGV"):
        measure_overhead(Workload(Path("m.vmfb"), "main"))


@pytest.mark.parametrize(("calls", "rounds", "timeout"), [(0, 3, 1.0), (1, 2, 1.0), (1, 3, 0.0)])
def test_counts_that_make_no_sense_are_refused(calls: int, rounds: int, timeout: float) -> None:
    with pytest.raises(CaptureError, match="expected at least 1, 3 and more than 0"):
        OverheadOptions(calls, rounds, timeout)


def test_times_of_each_call_are_read() -> None:
    rows = [{"run_type": "iteration", "iterations": 1, "real_time": time, "time_unit": "us"} for time in (2.5, 3.0)]
    rows.append({**rows[0], "run_type": "aggregate", "real_time": 99.0})
    assert read_call_times(json.dumps({"benchmarks": rows})) == (2500, 3000)
