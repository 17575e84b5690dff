"""The benchmark's arithmetic, its order of runs and its renderings; no model is timed."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llmir_iree import bench
from llmir_iree.bench import BenchOptions, Case, compare_logits, cosine_similarity, parse_test, plan_cases, time_tokens
from llmir_iree.bench_engines import Engine
from llmir_iree.bench_report import RENDERERS, Header, Report, compare_rates
from llmir_iree.bundle import Bundle
from llmir_iree.cli.bench import main
from llmir_iree.params.errors import BundleError, RequestError

VOCAB = 50


class FakeEngine(Engine):
    """Logits are a function of the tokens so far; calls are noted down."""

    versions = {"fake": "1"}  # noqa: RUF012
    vocab_size = VOCAB

    def __init__(self, name: str, log: list[str] | None = None, forgets: bool = False) -> None:
        self.name = name
        self.log = [] if log is None else log
        self.forgets = forgets
        self.seen = np.zeros((0, 0), np.int32)

    def start(self, batch: int, length: int) -> None:
        self.log.append(f"{self.name} start {batch}x{length}")
        self.seen = np.zeros((batch, 0), np.int32)

    def step(self, tokens: Any) -> None:
        self.log.append(f"{self.name} step {tokens.shape[0]}x{tokens.shape[1]}")
        self.seen = tokens if self.forgets else np.concatenate([self.seen, tokens], axis=1)

    def logits(self) -> np.ndarray:
        return np.stack([np.random.default_rng(row.tolist()).normal(size=VOCAB) for row in self.seen])


# Names and options


@pytest.mark.parametrize(("name", "expected"), [("pp128", ("pp", 128)), ("tg1", ("tg", 1))])
def test_parse_test(name: str, expected: tuple[str, int]) -> None:
    assert parse_test(name) == expected


@pytest.mark.parametrize("name", ["", "pp", "pp0", "pp-1", "pp1.5", "tg 4", "tg064", "PP128", "pp128x", "128", "pg8"])
def test_parse_test_refuses(name: str) -> None:
    with pytest.raises(RequestError, match=r"a test is pp<n> .* or tg<n>"):
        parse_test(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tests": ()}, "no test"),
        ({"tests": ("pp4", "xx")}, "unknown test 'xx'"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"batches": (1, 0)}, "batch is 0"),
        ({"peers": ("ollama",)}, r"unknown peer 'ollama'; valid are llama\.cpp, transformers"),
        ({"peers": ("llama.cpp",)}, r"llama\.cpp needs a checkpoint .*--gguf"),
        ({"gguf": Path("nowhere.gguf")}, r"nowhere\.gguf: no such file"),
    ],
)
def test_options_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BenchOptions(Path("bundle"), **options)


def test_a_peer_named_twice_runs_once() -> None:
    options = BenchOptions(Path("bundle"), peers=("llama.cpp", "llama.cpp"), gguf=Path(__file__))
    assert options.peers == ("llama.cpp",)


def test_plan_cases_takes_the_batch_sizes_that_both_phases_have(tiny: Any) -> None:
    options = BenchOptions(tiny.folder, tests=("pp4", "tg2"))
    assert plan_cases(options, Bundle.open(tiny.folder)) == [Case("pp", 4, 1), Case("tg", 2, 1)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tests": ("pp4",), "batches": (4,)}, BundleError, "no prefill for batch size 4; it was exported for 1"),
        ({"tests": ("pp65",)}, RequestError, "pp65: .* 64 tokens at most"),
        ({"tests": ("tg64",)}, RequestError, "tg64: .* 64 tokens at most"),
    ],
)
def test_plan_cases_refuses(tiny: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_cases(BenchOptions(tiny.folder, **options), Bundle.open(tiny.folder))


# Arithmetic


def test_a_decode_reads_the_weights_once_a_step_and_each_cache_as_long_as_it_is() -> None:
    # Steps at 2, 3 and 4 tokens, the new one included.
    assert Case("tg", 3, 4).read_bytes(weight_bytes=1000, cache_token_bytes=10) == 3 * 1000 + 4 * (2 + 3 + 4) * 10


def test_rates_are_compared_repetition_by_repetition() -> None:
    (row,) = compare_rates("tg4", 2, [10.0, 20.0, 30.0], 0.5, {"llama.cpp": [20.0, 20.0, 20.0]})
    assert (row.mean, row.stdev, row.bandwidth_share) == (20.0, 10.0, 0.5)
    assert (row.peer, row.peer_mean, row.peer_stdev) == ("llama.cpp", 20.0, 0.0)
    assert (row.ratio, row.ratio_spread) == (1.0, (0.5, 1.5))


def test_noise_that_hits_both_engines_alike_leaves_the_ratio_alone() -> None:
    (row,) = compare_rates("tg4", 1, [10.0, 40.0], None, {"llama.cpp": [20.0, 80.0]})
    assert row.stdev is not None
    assert row.stdev > 20
    assert (row.ratio, row.ratio_spread) == (0.5, (0.5, 0.5))


def test_every_peer_has_a_row_and_no_peer_has_one_too() -> None:
    peers = {"llama.cpp": [1.0], "transformers": [2.0]}
    assert [row.peer for row in compare_rates("pp4", 1, [1.0], None, peers)] == ["llama.cpp", "transformers"]
    (alone,) = compare_rates("pp4", 1, [1.0], None, {})
    assert (alone.mean, alone.stdev, alone.peer, alone.ratio, alone.ratio_spread) == (1.0, None, None, None, None)


def test_cosine_similarity_is_by_row_and_low_for_what_is_not_finite() -> None:
    left = np.array([[1, 0], [1, 1], [1, np.nan], [0, 0]], np.float32)
    right = np.array([[2, 0], [1, -1], [1, 1], [1, 1]], np.float32)
    assert cosine_similarity(left, right).tolist() == [1, 0, -1, -1]


# Order of runs


def test_a_prompt_is_one_step_and_a_decode_does_not_time_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a")
    monkeypatch.setattr(bench.time, "perf_counter", lambda: engine.log.append("clock") or 0.0)
    time_tokens(engine, Case("pp", 5, 2), np.zeros((2, 5), np.int32), 5)
    assert engine.log == ["a start 2x5", "clock", "a step 2x5", "clock"]
    engine.log.clear()
    time_tokens(engine, Case("tg", 2, 2), np.zeros((2, 3), np.int32), 3)
    assert engine.log == ["a start 2x3", "a step 2x1", "clock", "a step 2x1", "a step 2x1", "clock"]


def test_engines_warm_up_and_then_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SETTLE_S", 0)
    log: list[str] = []
    engines = [FakeEngine(name, log) for name in "abc"]
    notes: list[str] = []
    rates = bench._time_case(Case("pp", 4, 1), engines, 2, notes.append)
    assert [line[0] for line in log if "start" in line] == list("abc" * 3)
    assert [len(taken) for taken in rates] == [2, 2, 2]
    assert len(notes) == 2


def test_what_others_take_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 1000.0), (103.0, 1012.0)])
    monkeypatch.setattr(bench, "_cpu_seconds", lambda: next(readings))
    assert bench.OtherLoad().share() == 0.25


# Validation


def test_engines_that_agree_pass() -> None:
    assert compare_logits(FakeEngine("a"), FakeEngine("b"), [1, 3]) == pytest.approx(1)


def test_an_engine_that_forgets_its_cache_is_not_timed() -> None:
    # Right after the prompt of 9, wrong from the first decode on.
    with pytest.raises(BundleError, match=r"nothing was timed: a and b disagree .* after 10 \(batch size 1, row 0\)"):
        compare_logits(FakeEngine("a", forgets=True), FakeEngine("b"), [1])


def test_engines_of_other_vocabularies_are_not_compared() -> None:
    other = FakeEngine("b")
    other.vocab_size = VOCAB + 1
    with pytest.raises(BundleError, match="a has 50 tokens, b 51"):
        compare_logits(FakeEngine("a"), other, [1])


# Renderings


def report() -> Report:
    header = Header(
        cpu="Some, CPU",
        cores=2,
        threads=2,
        bandwidth_gb_s=40.04,
        model="tiny",
        target="cpu on local-task",
        validation="nothing",
        repetitions=3,
        other_load=0.25,
        versions={"llmir-iree": "1", "llama-cpp-python": "2"},
    )
    rows = compare_rates("pp8", 1, [100.0, 110.0], None, {})
    rows += compare_rates("tg4", 4, [10.0, 20.0], 0.125, {"llama.cpp": [20.0, 20.0]})
    return Report(header, tuple(rows))


def test_markdown() -> None:
    text = RENDERERS["markdown"](report())
    assert "- machine: Some, CPU, 2 cores (2 threads), 40.0 GB/s\n" in text
    assert "- versions: llmir-iree 1, llama-cpp-python 2\n" in text
    assert "- other processes: 25% of the cores while the tests ran\n" in text
    assert text.endswith(
        "\n\n| test | batch | tok/s | of bandwidth | peer | peer tok/s | ours / peer |\n"
        "|---|---:|---:|---:|---|---:|---:|\n"
        "| pp8 | 1 | 105.0 ± 7.1 |  |  |  |  |\n"
        "| tg4 | 4 | 15.0 ± 7.1 | 12% | llama.cpp | 20.0 ± 0.0 | 0.75 (0.50 to 1.00) |\n"
    )


def test_json_holds_all_and_rounds_nothing() -> None:
    data = json.loads(RENDERERS["json"](report()))
    assert data == json.loads(json.dumps(asdict(report())))
    assert data["rows"][0]["peer"] is None
    assert data["rows"][1]["ratio_spread"] == [0.5, 1.0]


def test_csv_repeats_the_header_in_every_line() -> None:
    first, second = csv.DictReader(io.StringIO(RENDERERS["csv"](report())))
    assert (first["test"], first["peer"], first["ratio_min"], first["cpu"]) == ("pp8", "", "", "Some, CPU")
    assert (second["ratio_min"], second["ratio_max"], second["bandwidth_share"]) == ("0.5", "1.0", "0.125")
    assert second["versions"] == "llmir-iree 1, llama-cpp-python 2"


# The command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_results_on_stdout_and_progress_on_stderr(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_bandwidth", lambda _: 1e9)
    result = run(tiny.folder, "--tests", "pp4,tg2", "--repetitions", 1, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [(row["test"], row["batch"]) for row in data["rows"]] == [("pp4", 1), ("tg2", 1)]
    assert [row["bandwidth_share"] is None for row in data["rows"]] == [True, False]
    assert "against its own prefill alone" in data["header"]["validation"]
    assert "tg2 batch 1, 1 of 1: llmir-iree" in result.stderr


def test_results_in_a_file(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda _options, _note: report())
    result = run(tiny.folder, "--quiet", "--format", "csv", "--output", tmp_path / "out.csv")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out.csv").read_text() == RENDERERS["csv"](report())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tests", "pp4,nope"], "unknown test 'nope'"),
        (["--batch", "1,x"], "--batch 1,x: expected numbers"),
        (["--vs", "ollama"], "unknown peer 'ollama'"),
        (["--output", "/nowhere/at/all.md"], "no such folder"),
    ],
)
def test_a_mistake_is_one_line(tiny: Any, arguments: list[str], message: str) -> None:
    result = run(tiny.folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_peer_that_is_not_installed_is_named_with_its_extra(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    result = run(tiny.folder, "--quiet", "--tests", "pp4", "--vs", "llama.cpp", "--gguf", __file__)
    assert result.exit_code == 2
    assert 'pip install "llmir-iree[bench]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1
