"""The benchmark's arithmetic, its order of runs and its renderings; no model is timed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import llmir_iree.peaks
from llmir_iree import bench
from llmir_iree.bench import BenchOptions, Moment, Peaks, plan_cases, time_tokens
from llmir_iree.bench_cases import Case, TimedTest, Work, parse_test
from llmir_iree.bench_engines import BundleEngine, Engine
from llmir_iree.bench_perplexity import Perplexity
from llmir_iree.bench_report import RENDERERS, Header, Report, Throughput, append, compare_rates
from llmir_iree.bench_validation import compare_logits, cosine_similarity
from llmir_iree.build import BuildOptions, build_bundle
from llmir_iree.bundle import Bundle
from llmir_iree.cli.bench import main
from llmir_iree.params.errors import BundleError, RequestError
from llmir_iree.peaks import Rate

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

    def start(self, batch: int, length: int, context: int = 0) -> None:
        self.log.append(f"{self.name} start {batch}x{length}" + (f" behind {context}" if context else ""))
        self.seen = np.zeros((batch, 0), np.int32)

    def step(self, tokens: Any) -> None:
        self.log.append(f"{self.name} step {tokens.shape[0]}x{tokens.shape[1]}")
        self.seen = tokens if self.forgets else np.concatenate([self.seen, tokens], axis=1)

    def logits(self) -> np.ndarray:
        return np.stack([np.random.default_rng(row.tolist()).normal(size=VOCAB) for row in self.seen])


# Names and options


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pp128", TimedTest("pp", 128)),
        ("tg1", TimedTest("tg", 1)),
        ("pp512x8", TimedTest("pp", 512, batch=8)),
        ("tg32@2048", TimedTest("tg", 32, 2048)),
        ("tg32@2048x4", TimedTest("tg", 32, 2048, 4)),
    ],
)
def test_parse_test(name: str, expected: TimedTest) -> None:
    assert parse_test(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", "pp", "pp0", "pp-1", "pp1.5", "tg 4", "tg064", "PP128", "pp128x", "128", "pg8"),
        *("pp8@4", "tg8@", "tg8@0", "tg8x0", "tg8x2@4"),
    ],
)
def test_parse_test_refuses(name: str) -> None:
    with pytest.raises(RequestError, match=r"a test is pp<n> .* or tg<n>@<c>"):
        parse_test(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tests": ()}, "no test"),
        ({"tests": ("pp4", "xx")}, "unknown test 'xx'"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"batches": (1, 0)}, "batch is 0"),
        ({"perplexity": 100}, "perplexity of 100 tokens; a chunk takes 512"),
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


def test_a_test_may_have_a_batch_of_its_own(tiny: Any) -> None:
    options = BenchOptions(tiny.folder, tests=("pp4x1", "tg2@8"), batches=(1,))
    assert plan_cases(options, Bundle.open(tiny.folder)) == [Case("pp", 4, 1), Case("tg", 2, 1, 8)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tests": ("pp4",), "batches": (4,)}, BundleError, "no prefill for batch size 4; it was exported for 1"),
        ({"tests": ("pp65",)}, RequestError, "pp65: .* 64 tokens at most"),
        ({"tests": ("tg64",)}, RequestError, "tg64: .* 64 tokens at most"),
        ({"tests": ("tg8@56",)}, RequestError, "tg8@56: .* 64 tokens at most"),
        ({"tests": ("tg8x4",)}, BundleError, "no prefill for batch size 4"),
    ],
)
def test_plan_cases_refuses(tiny: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_cases(BenchOptions(tiny.folder, **options), Bundle.open(tiny.folder))


# Arithmetic


WORK = Work(weight_bytes=1000, cache_token_bytes=10, token_macs=500, head_macs=70, multiplied="bytes")
NO_THROUGHPUT = Throughput(None, None, None, None)


def test_a_decode_reads_the_weights_once_a_step_and_each_cache_as_long_as_it_is() -> None:
    # Steps at 2, 3 and 4 tokens, the new one included.
    assert WORK.read_bytes(Case("tg", 3, 4)) == 3 * 1000 + 4 * (2 + 3 + 4) * 10
    assert WORK.read_bytes(Case("tg", 3, 4, 100)) == 3 * 1000 + 4 * (102 + 103 + 104) * 10


def test_a_prompt_meets_the_output_head_once_and_a_decode_in_every_step() -> None:
    assert WORK.macs(Case("pp", 3, 4)) == 4 * (3 * 500 + 70)
    assert WORK.macs(Case("tg", 3, 4)) == 4 * 3 * (500 + 70)


@pytest.mark.parametrize(("quant", "multiplied"), [("keep", "floats"), ("q8_0", "bytes")])
def test_the_work_of_a_model_is_that_of_its_matmuls(
    tiny_checkpoint: Any, tmp_path: Path, quant: str, multiplied: str
) -> None:
    source = tiny_checkpoint("llama", num_hidden_layers=3)
    bundle = build_bundle(BuildOptions(str(source), tmp_path / "bundle", quant=quant, batch_sizes=(2, 3)))
    work = Work.of(bundle)
    # Query and output are as wide as the hidden state; key and value half as wide; three matrices of the inner size.
    assert work.token_macs == 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert work.head_macs == 96 * 64
    assert work.multiplied == multiplied
    assert work.cache_token_bytes == 3 * 2 * 2 * 16 * 2
    # All matrices but the table of embeddings, and the norms.
    matrix_bytes = 34 / 32 if multiplied == "bytes" else 4
    assert work.weight_bytes == (work.token_macs + work.head_macs) * matrix_bytes + (2 * 3 + 1) * 64 * 4


def test_shares_are_of_what_there_was_at_the_moment() -> None:
    case = Case("tg", 3, 4)  # 12 tokens, 3360 bytes and 6840 products in 2 s and in 4 s: 3 s in the mean.
    throughput = bench._throughput(case, [6.0, 3.0], WORK, [Moment(2000, 22800)] * 2)
    assert throughput == Throughput(1120 / 1e9, 0.56, 2280 / 1e9, 0.1)
    # A machine that halves its pace halves ours: the share is that of a steady one.
    slowing = bench._throughput(case, [6.0, 3.0], WORK, [Moment(2000, 22800), Moment(1000, 11400)])
    assert (slowing.bandwidth_share, slowing.peak_share) == (pytest.approx(0.84), pytest.approx(0.15))


def test_a_moment_lies_between_two() -> None:
    assert Moment.between(Moment(1.0, 10.0), Moment(3.0, 30.0)) == Moment(2.0, 20.0)
    assert Moment.between(Moment(1.0, None), Moment(None, 30.0)) == Moment(None, None)


def test_a_prompt_has_no_bandwidth() -> None:
    throughput = bench._throughput(Case("pp", 4, 1), [4.0], WORK, [Moment(1.0, 20700.0)])
    assert throughput == Throughput(None, None, 2070 / 1e9, 0.1)


def test_without_peaks_there_are_no_shares() -> None:
    throughput = bench._throughput(Case("tg", 3, 4), [12.0], WORK, [Moment(None, None)])
    assert throughput == Throughput(3360 / 1e9, None, 6840 / 1e9, None)


def test_a_model_without_matmuls_has_no_products() -> None:
    none = dataclasses.replace(WORK, token_macs=0, head_macs=0)
    assert bench._throughput(Case("pp", 4, 1), [4.0], none, [Moment(1, 1)]) == NO_THROUGHPUT


class FakeMeter:
    """Finds a disturbed machine, each time another peak."""

    def __init__(self) -> None:
        self.found = iter([(3.0, 10.0), (5.0, 8.0)])

    def bandwidth(self, file: Path) -> Rate:
        assert file == Path("weights")
        self.latest = next(self.found)
        return Rate(self.latest[0], self.latest[0] / 2)

    def macs(self, multiplied: str) -> Rate:
        assert multiplied == "floats"
        return Rate(self.latest[1], self.latest[1] / 2)


def test_peaks_keep_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = FakeMeter()
    monkeypatch.setattr(llmir_iree.peaks, "open_peak_meter", lambda: meter)
    peaks = Peaks(Path("weights"), "local-task", "floats")
    assert peaks.measure() == Moment(1.5, 5.0)
    assert (peaks.bandwidth, peaks.macs) == (3.0, 10.0)
    assert peaks.measure() == Moment(2.5, 4.0)
    assert (peaks.bandwidth, peaks.macs) == (5.0, 10.0)


def test_weights_of_both_kinds_have_no_peak_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmir_iree.peaks, "open_peak_meter", FakeMeter)
    peaks = Peaks(Path("weights"), "local-task", None)
    assert peaks.measure() == Moment(1.5, None)
    assert (peaks.bandwidth, peaks.macs) == (3.0, None)


@pytest.mark.parametrize(("device", "meter"), [("local-task", None), ("cuda://0", FakeMeter())])
def test_peaks_are_left_out_where_nothing_measures_them(
    monkeypatch: pytest.MonkeyPatch, device: str, meter: FakeMeter | None
) -> None:
    monkeypatch.setattr(llmir_iree.peaks, "open_peak_meter", lambda: meter)
    peaks = Peaks(Path("weights"), device, "floats")
    assert peaks.measure() == Moment(None, None)
    assert (peaks.bandwidth, peaks.macs) == (None, None)


def test_rates_are_compared_repetition_by_repetition() -> None:
    throughput = Throughput(1.5, 0.5, 2.5, 0.25)
    (row,) = compare_rates("m", Case("tg", 4, 2), [10.0, 20.0, 30.0], throughput, {"llama.cpp": [20.0, 20.0, 20.0]})
    assert (row.model, row.test, row.batch, row.mean, row.stdev) == ("m", "tg4", 2, 20.0, 10.0)
    assert (row.gb_s, row.bandwidth_share, row.gmac_s, row.peak_share) == (1.5, 0.5, 2.5, 0.25)
    assert (row.peer, row.peer_mean, row.peer_stdev) == ("llama.cpp", 20.0, 0.0)
    assert (row.ratio, row.ratio_spread) == (1.0, (0.5, 1.5))


def test_noise_that_hits_both_engines_alike_leaves_the_ratio_alone() -> None:
    (row,) = compare_rates("m", Case("tg", 4, 1), [10.0, 40.0], NO_THROUGHPUT, {"llama.cpp": [20.0, 80.0]})
    assert row.stdev is not None
    assert row.stdev > 20
    assert (row.ratio, row.ratio_spread) == (0.5, (0.5, 0.5))


def test_every_peer_has_a_row_and_no_peer_has_one_too() -> None:
    peers = {"llama.cpp": [1.0], "transformers": [2.0]}
    case = Case("pp", 4, 1)
    assert [row.peer for row in compare_rates("m", case, [1.0], NO_THROUGHPUT, peers)] == ["llama.cpp", "transformers"]
    (alone,) = compare_rates("m", case, [1.0], NO_THROUGHPUT, {})
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
    peaks = Peaks(Path("weights"), "local-task", "floats")
    monkeypatch.setattr(peaks, "measure", lambda: log.append("peak start") or Moment(1.0, len(log)))
    rates, moments = bench._time_case(Case("pp", 4, 1), engines, peaks, 2, notes.append)
    # What the machine gives is measured around ours, the first.
    assert [line[0] for line in log if "start" in line] == list("abc" + "papbc" * 2)
    assert [len(taken) for taken in rates] == [2, 2, 2]
    assert len(moments) == 2
    assert len(notes) == 2


def test_what_others_take_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 1000.0), (103.0, 1012.0)])
    monkeypatch.setattr(bench, "_cpu_seconds", lambda: next(readings))
    assert bench.OtherLoad().share() == 0.25


def test_a_decode_behind_a_context_goes_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a")
    monkeypatch.setattr(bench.time, "perf_counter", lambda: engine.log.append("clock") or 0.0)
    time_tokens(engine, Case("tg", 1, 2, 7), np.zeros((2, 2), np.int32), 9)
    assert engine.log == ["a start 2x9 behind 7", "a step 2x1", "clock", "a step 2x1", "clock"]


def test_a_bundle_goes_on_from_a_random_cache(tiny: Any) -> None:
    engine = BundleEngine(Bundle.open(tiny.folder), None, None, [(1, 12)])
    engine.start(1, 12, 10)
    cache = engine.session.read_cache()
    assert cache.std() > 0.5
    engine.step(np.array([[5]], np.int32))
    written = engine.session.read_cache()
    # Token and position in the one slot behind the context, on the third page of four tokens.
    assert written[3, 0, :, 0, 2].tolist() == [[5, 10], [5, 10]]
    written[3, 0, :, 0, 2] = cache[3, 0, :, 0, 2]
    assert (written == cache).all()


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


def report(model: str = "tiny") -> Report:
    header = Header(
        model=model,
        weights="1 MiB (3 q4_0), f16 cache",
        cpu="Some, CPU",
        cores=2,
        threads=2,
        bandwidth_gb_s=40.04,
        peak_gmac_s=650.4,
        multiplied="bytes",
        target="cpu on local-task",
        validation="nothing",
        perplexity=Perplexity(1024, {"llmir-iree": 10.0, "llama.cpp": 10.02}),
        repetitions=3,
        other_load=0.25,
        versions={"llmir-iree": "1", "llama-cpp-python": "2"},
    )
    rows = compare_rates(model, Case("pp", 8, 1), [100.0, 110.0], Throughput(None, None, 10.04, None), {})
    throughput = Throughput(5.04, 0.125, 2.04, 0.5)
    rows += compare_rates(model, Case("tg", 4, 4, 9), [10.0, 20.0], throughput, {"llama.cpp": [20.0, 20.0]})
    return Report(header, tuple(rows))


FIELDS = (
    *("model", "test", "batch", "mean", "stdev", "gb_s", "bandwidth_share", "gmac_s", "peak_share"),
    *("peer", "peer_mean", "peer_stdev", "ratio"),
)


def test_markdown() -> None:
    text = RENDERERS["markdown"](report())
    assert text.startswith(
        "## tiny\n\n- machine: Some, CPU, 2 cores (2 threads), at best 40.0 GB/s, 650 GMAC/s of bytes\n"
    )
    assert "- versions: llmir-iree 1, llama-cpp-python 2\n" in text
    assert "- perplexity: llmir-iree 10.000, llama.cpp 10.020 (0.20% apart), of 1024 tokens of " in text
    assert "- other processes: 25% of the cores while the tests ran\n" in text
    assert text.endswith(
        "\n\n| test | batch | tok/s | GB/s | of bandwidth | GMAC/s | of peak | peer | peer tok/s | ours / peer |\n"
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|\n"
        "| pp8 | 1 | 105.0 ± 7.1 |  |  | 10.0 |  |  |  |  |\n"
        "| tg4@9 | 4 | 15.0 ± 7.1 | 5.0 | 12% | 2.0 | 50% | llama.cpp | 20.0 ± 0.0 | 0.75 (0.50 to 1.00) |\n"
    )


def test_markdown_is_silent_about_what_was_not_measured() -> None:
    header = dataclasses.replace(report().header, bandwidth_gb_s=None, peak_gmac_s=None, perplexity=None)
    text = RENDERERS["markdown"](Report(header, ()))
    assert "- machine: Some, CPU, 2 cores (2 threads)\n" in text
    assert "perplexity" not in text


def test_one_engine_is_not_apart_from_itself() -> None:
    header = dataclasses.replace(report().header, perplexity=Perplexity(512, {"llmir-iree": 10.0}))
    assert "- perplexity: llmir-iree 10.000, of 512 tokens" in RENDERERS["markdown"](Report(header, ()))


def test_json_holds_all_and_rounds_nothing() -> None:
    data = json.loads(RENDERERS["json"](report()))
    expected = json.loads(json.dumps(asdict(report())))
    assert data == {"headers": {"tiny": expected["header"]}, "rows": expected["rows"]}
    assert [tuple(row) for row in data["rows"]] == [(*FIELDS, "ratio_spread")] * 2
    assert data["rows"][0]["peer"] is None
    assert data["rows"][1]["ratio_spread"] == [0.5, 1.0]


def test_csv_repeats_the_header_in_every_line() -> None:
    first, second = csv.DictReader(io.StringIO(RENDERERS["csv"](report())))
    assert tuple(first)[: len(FIELDS) + 2] == (*FIELDS, "ratio_min", "ratio_max")
    assert (first["test"], first["peer"], first["ratio_min"], first["cpu"]) == ("pp8", "", "", "Some, CPU")
    assert (second["ratio_min"], second["ratio_max"], second["bandwidth_share"]) == ("0.5", "1.0", "0.125")
    assert second["versions"] == "llmir-iree 1, llama-cpp-python 2"
    assert second["perplexity"].startswith("llmir-iree 10.000")


@pytest.mark.parametrize("format_name", RENDERERS)
def test_reports_are_appended(format_name: str) -> None:
    first, second = (RENDERERS[format_name](report(model)) for model in ("a", "b"))
    assert append("", first, format_name) == first
    both = append(first, second, format_name)
    if format_name == "json":
        data = json.loads(both)
        assert (list(data["headers"]), [row["model"] for row in data["rows"]]) == (["a", "b"], ["a", "a", "b", "b"])
    elif format_name == "csv":
        assert [row["model"] for row in csv.DictReader(io.StringIO(both))] == ["a", "a", "b", "b"]
    else:
        assert both == f"{first}\n{second}"


@pytest.mark.parametrize("format_name", ["json", "csv"])
@pytest.mark.parametrize("earlier", ["text", "[1]", "{}"])
def test_a_report_is_not_appended_to_something_else(format_name: str, earlier: str) -> None:
    with pytest.raises(RequestError, match="cannot append to a file that does not hold"):
        append(earlier, RENDERERS[format_name](report()), format_name)


# The command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_results_on_stdout_and_progress_on_stderr(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peaks, "measure", lambda _: Moment(1e9, 1e9))
    result = run(tiny.folder, "--tests", "pp4,tg2,tg3@9", "--repetitions", 1, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [(row["test"], row["batch"]) for row in data["rows"]] == [("pp4", 1), ("tg2", 1), ("tg3@9", 1)]
    assert [row["bandwidth_share"] is None for row in data["rows"]] == [True, False, False]
    assert "against its own prefill alone" in data["headers"]["tiny"]["validation"]
    assert "tg2 batch 1, 1 of 1: llmir-iree" in result.stderr


def test_results_in_a_file(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda _options, _note: report())
    result = run(tiny.folder, "--quiet", "--format", "csv", "--output", tmp_path / "out.csv")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out.csv").read_text() == RENDERERS["csv"](report())


def test_results_are_added_to_a_file(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda _options, _note: report())
    file = tmp_path / "out.csv"
    for _ in range(2):
        assert run(tiny.folder, "--quiet", "--format", "csv", "--output", file, "--append").exit_code == 0
    text = RENDERERS["csv"](report())
    assert file.read_text() == append(text, text, "csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tests", "pp4,nope"], "unknown test 'nope'"),
        (["--batch", "1,x"], "--batch 1,x: expected numbers"),
        (["--vs", "ollama"], "unknown peer 'ollama'"),
        (["--output", "/nowhere/at/all.md"], "no such folder"),
        (["--append"], "--append needs a file"),
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
