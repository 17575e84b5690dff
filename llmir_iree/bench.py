"""Times a bundle, in turn with other engines on the same weights and tokens, after checking that they agree.

Token ids are random: neither tokenizing nor sampling is measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import psutil

from llmir_iree.bench_cases import Case, TimedTest, Work, parse_test
from llmir_iree.bench_perplexity import (
    CHUNK_TOKENS,
    TOLERANCE,
    Perplexity,
    cut_chunks,
    measure_perplexity,
    python_help_text,
)
from llmir_iree.bench_report import Header, Report, Row, Throughput, compare_rates
from llmir_iree.bench_validation import CHECKED_TOKENS, IntArray, random_tokens, validate
from llmir_iree.bundle import PHASES, TOKENIZER_FOLDER, Bundle
from llmir_iree.machine import available_memory, cpu_count, cpu_name
from llmir_iree.params.errors import BundleError, RequestError

if TYPE_CHECKING:  # Imported when something runs: the engines load the runtime.
    from llmir_iree.bench_engines import BundleEngine, Engine
    from llmir_iree.plugins.kernels.peaks import Multiplied

DEFAULT_TESTS = "pp512,pp128,tg128"
PEER_NAMES = ("llama.cpp", "transformers")

_WARM_UP_STEPS = 8
# Worker threads spin for some milliseconds after their last task, on cores that the next engine wants.
_SETTLE_S = 0.05
# What a machine does that only runs the benchmark.
_QUIET_LOAD = 0.05


@dataclass(frozen=True)
class BenchOptions:
    """What to time.

    Attributes:
        bundle: a bundle's folder, or a `.vmfb` inside one.
        tests: names such as "pp128" and "tg64".
        batches: batch sizes; empty for all that the bundle was exported for.
        repetitions: how often each engine runs each test.
        peers: names out of PEER_NAMES.
        gguf: the checkpoint that the bundle was exported from; the peers and the validation read it.
        target: one of the bundle's compiled targets, if it has several.
        device: an IREE device URI; the target's driver if left out.
        perplexity: tokens of text to measure the perplexity of, in whole chunks; none for 0.
    """

    bundle: Path
    tests: tuple[str, ...] = tuple(DEFAULT_TESTS.split(","))
    batches: tuple[int, ...] = ()
    repetitions: int = 3
    peers: tuple[str, ...] = ()
    gguf: Path | None = None
    target: str | None = None
    device: str | None = None
    perplexity: int = 0
    parsed: tuple[TimedTest, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", tuple(parse_test(test) for test in self.tests))
        object.__setattr__(self, "peers", tuple(dict.fromkeys(self.peers)))
        if not self.tests:
            raise RequestError("there is no test to run; name some such as pp128,tg64")
        if self.repetitions < 1:
            raise RequestError(f"repetitions is {self.repetitions}; at least 1 is needed")
        if self.perplexity and self.perplexity < CHUNK_TOKENS:
            raise RequestError(f"perplexity of {self.perplexity} tokens; a chunk takes {CHUNK_TOKENS}")
        if any(batch < 1 for batch in self.batches):
            raise RequestError(f"batch is {min(self.batches)}; at least 1 is needed")
        for peer in self.peers:
            if peer not in PEER_NAMES:
                raise RequestError(f"unknown peer {peer!r}; valid are {', '.join(PEER_NAMES)}")
        if self.peers and self.gguf is None:
            raise RequestError(f"{self.peers[0]} needs a checkpoint to run: name the bundle's with --gguf FILE")
        if self.gguf is not None and not self.gguf.is_file():
            raise RequestError(f"{self.gguf}: no such file")


def run_bench(options: BenchOptions, note: Callable[[str], None] = lambda _: None) -> Report:
    """Check that the engines agree, then time every test at every batch size.

    Args:
        options: what to time.
        note: takes a line about what is being done.

    Raises:
        BundleError: the logits differ from the reference's, so that times would mean nothing.
        LlmirError: a bundle, checkpoint or option that cannot be used, or a peer that is not installed.
    """
    from llmir_iree.bench_engines import BundleEngine

    bundle, implied = Bundle.containing(options.bundle)
    cases = plan_cases(options, bundle)
    batches = sorted({case.batch for case in cases})
    chunks = _cut_text(options.perplexity, bundle) if options.perplexity else None
    rooms = [(case.batch, case.length) for case in cases] + [(batch, CHECKED_TOKENS) for batch in batches]
    if chunks is not None:
        rooms.append((batches[-1], CHUNK_TOKENS))
    threads = min(psutil.cpu_count(logical=False) or 1, cpu_count())
    with ExitStack() as stack:
        note(f"loading {bundle.manifest.model.name}")
        ours = BundleEngine(bundle, options.target or implied, options.device, rooms)
        peers = []
        for name in options.peers:
            note(f"loading {name}")
            peers.append(stack.enter_context(closing(_open_peer(name, options, threads))))
        validation = _validate(ours, peers, options, batches, threads, note)
        perplexity = None
        if chunks is not None:
            perplexity = _measure_perplexity([ours, *peers], chunks, batches[-1], note)

        work = Work.of(bundle)
        peaks = Peaks(bundle.checked_parameters(), ours.session.device_uri, work.multiplied)
        load = OtherLoad()
        timed = [_time_case(case, [ours, *peers], peaks, options.repetitions, note) for case in cases]
        other_load = load.share()
        if other_load > _QUIET_LOAD:
            note(f"warning: other processes kept {other_load:.0%} of the cores busy; the times are not to be trusted")

    rows: list[Row] = []
    for case, ((our_rates, *peer_rates), moments) in zip(cases, timed, strict=True):
        throughput = _throughput(case, our_rates, work, moments)
        by_peer = dict(zip(options.peers, peer_rates, strict=True))
        rows += compare_rates(bundle.manifest.model.name, case, our_rates, throughput, by_peer)
    header = Header(
        model=bundle.manifest.model.name,
        weights=_describe_weights(bundle),
        cpu=cpu_name(),
        cores=cpu_count(),
        threads=threads,
        bandwidth_gb_s=_giga(peaks.bandwidth),
        peak_gmac_s=_giga(peaks.macs),
        multiplied=work.multiplied,
        target=f"{ours.session.target.target} on {ours.session.device_uri}",
        validation=validation,
        perplexity=perplexity,
        repetitions=options.repetitions,
        other_load=other_load,
        versions={name: version for engine in (ours, *peers) for name, version in engine.versions.items()},
    )
    return Report(header, tuple(rows))


@dataclass(frozen=True)
class Moment:
    """What the machine gave at some time, in the mean of some tenths of a second.

    Attributes:
        bandwidth: bytes read a second; None where there is nothing that could measure it.
        macs: products a second of what was asked for; None likewise.
    """

    bandwidth: float | None
    macs: float | None

    @classmethod
    def between(cls, before: Moment, after: Moment) -> Moment:
        """The mean of two."""
        return cls(_middle(before.bandwidth, after.bandwidth), _middle(before.macs, after.macs))


class Peaks:
    """The best that the machine was seen to give: what disturbs a measurement makes it smaller, never larger.

    Attributes:
        bandwidth: bytes read a second; None before `measure`, and where there is nothing that could measure it.
        macs: products a second; None likewise.
    """

    def __init__(self, file: Path, device_uri: str, multiplied: Multiplied | None) -> None:
        """Measure nothing yet.

        Args:
            file: what is read, see `PeakMeter.bandwidth`.
            device_uri: whose peaks are wanted. The kernels measure the host's.
            multiplied: what products are of; None if there is no one peak for them.
        """
        self._file = file
        self._is_host = device_uri.startswith("local")
        self._multiplied = multiplied
        self.bandwidth: float | None = None
        self.macs: float | None = None

    def measure(self) -> Moment:
        """Measure once more, and tell what there is just now."""
        from llmir_iree.peaks import open_peak_meter

        meter = open_peak_meter() if self._is_host else None
        if meter is None:
            return Moment(None, None)
        bandwidth = meter.bandwidth(self._file)
        self.bandwidth = max(self.bandwidth or 0.0, bandwidth.best)
        if self._multiplied is None:
            return Moment(bandwidth.mean, None)
        macs = meter.macs(self._multiplied)
        self.macs = max(self.macs or 0.0, macs.best)
        return Moment(bandwidth.mean, macs.mean)


class OtherLoad:
    """How busy others keep the machine, from the object's creation on.

    It decides what a ratio is worth: engines that wait for their threads by spinning lose tenfold to a busy neighbour.
    """

    def __init__(self) -> None:
        self._busy, self._total = _cpu_seconds()

    def share(self) -> float:
        """Share of all cores' time that went to other processes or, in a virtual machine, to other machines: 0 to 1."""
        busy, total = _cpu_seconds()
        return max(0.0, busy - self._busy) / max(total - self._total, 1e-3)


def _cpu_seconds() -> tuple[float, float]:
    """Seconds of all cores that others were busy, and seconds altogether, since the system started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Guests' time is part of user's already.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = psutil.Process().cpu_times()
    return total - idle - own.user - own.system, total


def plan_cases(options: BenchOptions, bundle: Bundle) -> list[Case]:
    """Every test at its own batch size, or at every batch size, in the order asked for.

    Raises:
        BundleError: the bundle was not exported for a batch size, or its phases have none in common.
        RequestError: a test is longer than the model's sequences.
    """
    manifest = bundle.manifest
    shared = sorted(set(manifest.batch_sizes("prefill")) & set(manifest.batch_sizes("decode")))
    cases = [
        Case(test.kind, test.tokens, batch, test.context)
        for test in options.parsed
        for batch in ((test.batch,) if test.batch else options.batches or shared)
    ]
    if not cases:
        raise BundleError(f"{bundle.folder}: prefill and decode have no batch size in common")
    for case in cases:
        for phase in PHASES:  # A decode needs the first token's prefill.
            manifest.function(phase, case.batch)
        if case.length > manifest.model.max_seq_len:
            raise RequestError(f"{case.test}: the bundle's sequences hold {manifest.model.max_seq_len} tokens at most")
    return cases


def _cut_text(tokens: int, bundle: Bundle) -> IntArray:
    from llmir_iree.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(bundle.path(TOKENIZER_FOLDER))
    return cut_chunks(tokenizer, python_help_text(), tokens, bundle.manifest.model.bos_token_id)


def _measure_perplexity(
    engines: Sequence[Engine], chunks: IntArray, batch: int, note: Callable[[str], None]
) -> Perplexity:
    """Ours and llama.cpp's; transformers in float32 would take minutes, and has other activations to compare with."""
    result = measure_perplexity([engine for engine in engines if engine.name != "transformers"], chunks, batch, note)
    if result.distance > TOLERANCE:
        note(f"warning: the perplexities are {result.distance:.2%} apart, at most {TOLERANCE:.1%} is expected")
    return result


def _open_peer(name: str, options: BenchOptions, threads: int) -> Engine:
    from llmir_iree.bench_engines import LlamaCppEngine, TransformersEngine

    assert options.gguf is not None
    return LlamaCppEngine(options.gguf, threads) if name == "llama.cpp" else TransformersEngine(options.gguf, threads)


def _validate(
    ours: BundleEngine,
    peers: Sequence[Engine],
    options: BenchOptions,
    batches: Sequence[int],
    threads: int,
    note: Callable[[str], None],
) -> str:
    """Compare every engine with the dullest one at hand; returns what was compared and how close it was.

    That is transformers, loaded for this alone if it is no peer; llama.cpp where the float32 weights do not fit into
    memory; and without a checkpoint our own prefill, which says nothing about the weights.
    """
    from llmir_iree.bench_engines import transformers_bytes

    by_name: dict[str, Engine] = {peer.name: peer for peer in peers}
    if options.gguf is not None and "transformers" not in by_name:
        if transformers_bytes(options.gguf) < available_memory():
            note("loading transformers to compare with")
            by_name["transformers"] = _open_peer("transformers", options, threads)
        else:
            note("transformers' float32 weights do not fit into memory")
    reference = by_name.get("transformers") or by_name.get("llama.cpp") or ours
    return validate([ours, *peers], reference, batches, note)


def _time_case(
    case: Case, engines: Sequence[Engine], peaks: Peaks, repetitions: int, note: Callable[[str], None]
) -> tuple[list[list[float]], list[Moment]]:
    """Tokens a second of each engine and repetition, and what the machine gave around each of the first engine's.

    The engines take turns, so that what disturbs one disturbs all.
    """
    vocab = engines[0].vocab_size
    warm_up = replace(case, tokens=min(case.tokens, _WARM_UP_STEPS)) if case.kind == "tg" else case
    for engine in engines:
        time_tokens(engine, warm_up, random_tokens(vocab, case.batch, warm_up.new_tokens), case.length)
    rates: list[list[float]] = [[] for _ in engines]
    moments: list[Moment] = []
    for repetition in range(repetitions):
        tokens = random_tokens(vocab, case.batch, case.new_tokens, repetition + 1)
        before = peaks.measure()
        for engine, taken in zip(engines, rates, strict=True):
            time.sleep(_SETTLE_S)
            taken.append(case.timed_tokens / time_tokens(engine, case, tokens, case.length))
            if engine is engines[0]:
                time.sleep(_SETTLE_S)
                moments.append(Moment.between(before, peaks.measure()))
        latest = ", ".join(f"{e.name} {taken[-1]:.1f}" for e, taken in zip(engines, rates, strict=True))
        note(f"{case.test} batch {case.batch}, {repetition + 1} of {repetitions}: {latest} tok/s")
    return rates, moments


def time_tokens(engine: Engine, case: Case, tokens: IntArray, length: int) -> float:
    """Seconds that a test's timed part takes.

    Args:
        engine: who runs it.
        case: the test.
        tokens: i32 [batch, case.new_tokens].
        length: tokens a sequence to make room for.
    """
    engine.start(case.batch, length, case.context)
    pieces = [tokens]
    if case.kind == "tg":
        first, *pieces = np.split(tokens, case.new_tokens, axis=1)
        engine.step(first)
    gc.collect()  # Now rather than in the middle.
    start = time.perf_counter()
    for piece in pieces:
        engine.step(piece)
    return time.perf_counter() - start


def _throughput(case: Case, rates: Sequence[float], work: Work, moments: Sequence[Moment]) -> Throughput:
    """What a case's rates mean in bytes and products, alone and beside what the machine gave at the moment of each."""
    seconds = [case.timed_tokens / rate for rate in rates]
    macs = work.macs(case)
    # A prompt computes rather than reads.
    read = work.read_bytes(case) if case.kind == "tg" else 0
    return Throughput(
        gb_s=_giga(read / fmean(seconds) or None),
        bandwidth_share=_share(read, seconds, [moment.bandwidth for moment in moments]),
        gmac_s=_giga(macs / fmean(seconds) or None),
        peak_share=_share(macs, seconds, [moment.macs for moment in moments]),
    )


def _share(amount: int, seconds: Sequence[float], rates: Sequence[float | None]) -> float | None:
    """What was done by what could have been done in the same time; None where that is not known."""
    possible = [rate * taken for rate, taken in zip(rates, seconds, strict=True) if rate is not None]
    return amount * len(seconds) / sum(possible) if amount and len(possible) == len(seconds) else None


def _middle(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else (left + right) / 2


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _describe_weights(bundle: Bundle) -> str:
    parameters = bundle.manifest.parameters
    formats = ", ".join(f"{count} {name}" for name, count in parameters.formats.items())
    return f"{parameters.nbytes / 2**20:.0f} MiB ({formats}), {bundle.manifest.cache.dtype} cache"
