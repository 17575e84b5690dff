"""Times a bundle, in turn with other engines on the same weights and tokens, after checking that they agree.

The tests are llama-bench's: "pp<n>" runs prompts of n tokens on an empty cache, "tg<n>" runs n single tokens after a
first one that is not timed. Token ids are random: neither tokenizing nor sampling is measured.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import psutil

from llmir_iree.bench_report import Header, Report, Row, compare_rates
from llmir_iree.bundle import PHASES, Bundle
from llmir_iree.machine import available_memory, cpu_count, cpu_name, measure_bandwidth
from llmir_iree.params.errors import BundleError, RequestError

if TYPE_CHECKING:  # Imported when something runs: the engines load the runtime.
    from llmir_iree.bench_engines import BundleEngine, Engine

DEFAULT_TESTS = "pp128,pp512,tg64"
PEER_NAMES = ("llama.cpp", "transformers")

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

_TEST = re.compile(r"(pp|tg)([1-9]\d{0,6})")
_SEED = 20
# A prompt and a few decodes on top of it.
_CHECK_PROMPT, _CHECK_TOKENS = 9, 12
# Random tokens make large activations, and quantising those to 8 bits, as llama.cpp does, takes the cosine down to
# 0.993. A wrong layout or position brings it near 0.
_MIN_COSINE = 0.99
_WARM_UP_STEPS = 8
# Worker threads spin for some milliseconds after their last task, on cores that the next engine wants.
_SETTLE_S = 0.05
# What a machine does that only runs the benchmark.
_QUIET_LOAD = 0.05


@dataclass(frozen=True)
class Case:
    """A test at a batch size: "pp" or "tg", tokens a sequence, sequences side by side."""

    kind: Literal["pp", "tg"]
    tokens: int
    batch: int

    @property
    def test(self) -> str:
        """The test's name."""
        return f"{self.kind}{self.tokens}"

    @property
    def length(self) -> int:
        """Tokens that a sequence holds in the end."""
        return self.tokens + (self.kind == "tg")

    @property
    def timed_tokens(self) -> int:
        """Tokens of all sequences that the time is divided by."""
        return self.tokens * self.batch

    def read_bytes(self, weight_bytes: int, cache_token_bytes: int) -> int:
        """Bytes that a "tg" has to read: the weights once a step, and each sequence's cache as long as it is by then.

        Args:
            weight_bytes: what one step reads of the weights.
            cache_token_bytes: what one token takes in the cache.
        """
        contexts = sum(range(2, self.tokens + 2))
        return self.tokens * weight_bytes + self.batch * contexts * cache_token_bytes


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
    """

    bundle: Path
    tests: tuple[str, ...] = tuple(DEFAULT_TESTS.split(","))
    batches: tuple[int, ...] = ()
    repetitions: int = 3
    peers: tuple[str, ...] = ()
    gguf: Path | None = None
    target: str | None = None
    device: str | None = None
    cases: tuple[tuple[Literal["pp", "tg"], int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", tuple(parse_test(test) for test in self.tests))
        object.__setattr__(self, "peers", tuple(dict.fromkeys(self.peers)))
        if not self.tests:
            raise RequestError("there is no test to run; name some such as pp128,tg64")
        if self.repetitions < 1:
            raise RequestError(f"repetitions is {self.repetitions}; at least 1 is needed")
        if any(batch < 1 for batch in self.batches):
            raise RequestError(f"batch is {min(self.batches)}; at least 1 is needed")
        for peer in self.peers:
            if peer not in PEER_NAMES:
                raise RequestError(f"unknown peer {peer!r}; valid are {', '.join(PEER_NAMES)}")
        if self.peers and self.gguf is None:
            raise RequestError(f"{self.peers[0]} needs a checkpoint to run: name the bundle's with --gguf FILE")
        if self.gguf is not None and not self.gguf.is_file():
            raise RequestError(f"{self.gguf}: no such file")


def parse_test(name: str) -> tuple[Literal["pp", "tg"], int]:
    """Kind and tokens of a test: "pp128" is ("pp", 128).

    Raises:
        RequestError: not a test's name.
    """
    match = _TEST.fullmatch(name)
    if match is None:
        raise RequestError(f"unknown test {name!r}; a test is pp<n> (a prompt) or tg<n> (decoding), such as pp128")
    return ("pp" if match[1] == "pp" else "tg"), int(match[2])


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
    threads = min(psutil.cpu_count(logical=False) or 1, cpu_count())
    with ExitStack() as stack:
        note(f"loading {bundle.manifest.model.name}")
        longest = max(_CHECK_TOKENS, *(case.length for case in cases))
        ours = BundleEngine(bundle, options.target or implied, options.device, max(batches), longest)
        peers = []
        for name in options.peers:
            note(f"loading {name}")
            peers.append(stack.enter_context(closing(_open_peer(name, options, threads))))
        validation = _validate(ours, peers, options, batches, threads, note)

        bandwidth = measure_bandwidth(bundle.checked_parameters())
        load = OtherLoad()
        rates = [_time_case(case, [ours, *peers], options.repetitions, note) for case in cases]
        other_load = load.share()
        if other_load > _QUIET_LOAD:
            note(f"warning: other processes kept {other_load:.0%} of the cores busy; the times are not to be trusted")
        # Measured on both sides of the runs: what disturbs it makes it smaller, never larger.
        bandwidth = max(bandwidth, measure_bandwidth(bundle.checked_parameters()))

        rows: list[Row] = []
        for case, (our_rates, *peer_rates) in zip(cases, rates, strict=True):
            share = _bandwidth_share(case, our_rates, ours, bandwidth)
            by_peer = dict(zip(options.peers, peer_rates, strict=True))
            rows += compare_rates(case.test, case.batch, our_rates, share, by_peer)
    header = Header(
        cpu=cpu_name(),
        cores=cpu_count(),
        threads=threads,
        bandwidth_gb_s=bandwidth / 1e9,
        model=_describe_model(bundle),
        target=f"{ours.session.target.target} on {ours.session.device_uri}",
        validation=validation,
        repetitions=options.repetitions,
        other_load=other_load,
        versions={name: version for engine in (ours, *peers) for name, version in engine.versions.items()},
    )
    return Report(header, tuple(rows))


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
    """Every test at every batch size, in the order asked for.

    Raises:
        BundleError: the bundle was not exported for a batch size, or its phases have none in common.
        RequestError: a test is longer than the model's sequences.
    """
    manifest = bundle.manifest
    shared = sorted(set(manifest.batch_sizes("prefill")) & set(manifest.batch_sizes("decode")))
    cases = [Case(kind, tokens, batch) for (kind, tokens), batch in product(options.cases, options.batches or shared)]
    if not cases:
        raise BundleError(f"{bundle.folder}: prefill and decode have no batch size in common")
    for case in cases:
        for phase in PHASES:  # A decode needs the first token's prefill.
            manifest.function(phase, case.batch)
        if case.length > manifest.model.max_seq_len:
            raise RequestError(f"{case.test}: the bundle's sequences hold {manifest.model.max_seq_len} tokens at most")
    return cases


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
    results = []
    for engine in (ours, *peers):
        if engine is not reference or engine is ours:
            note(f"comparing the logits of {engine.name} with those of {reference.name}")
            results.append(f"{engine.name} {compare_logits(engine, reference, batches):.4f}")
    name = "its own prefill alone, without --gguf" if reference is ours else reference.name
    return f"logits against {name}, lowest cosine similarity: {', '.join(results)}"


def compare_logits(engine: Engine, reference: Engine, batches: Sequence[int]) -> float:
    """Run a prompt and a few decodes of random tokens, and compare the logits after each of them.

    The reference runs every prefix as a prompt of its own, so that none of its answers comes from a cache.

    Returns:
        The lowest cosine similarity of all steps and rows.

    Raises:
        BundleError: somewhere it is below 0.99 and the likeliest token another one, or the vocabularies differ.
    """
    if engine.vocab_size != reference.vocab_size:
        raise BundleError(
            f"{engine.name} has {engine.vocab_size} tokens, {reference.name} {reference.vocab_size}: different models"
        )
    lowest = 1.0
    for batch in batches:
        tokens = _random_tokens(engine.vocab_size, batch, _CHECK_TOKENS)
        actual = list(_stepwise_logits(engine, tokens))
        expected = list(_prefix_logits(reference, tokens))
        for length, (left, right) in enumerate(zip(actual, expected, strict=True), _CHECK_PROMPT):
            cosines = cosine_similarity(left, right)
            differs = (cosines < _MIN_COSINE) & (left.argmax(axis=1) != right.argmax(axis=1))
            if differs.any():
                row = int(differs.argmax())
                raise BundleError(
                    f"nothing was timed: {engine.name} and {reference.name} disagree on the next token after {length} "
                    f"(batch size {batch}, row {row}); the cosine similarity of their logits is {cosines[row]:.4f}, at "
                    f"least {_MIN_COSINE} is expected; are they the same model and weights?"
                )
            lowest = min(lowest, float(cosines.min()))
    return lowest


def cosine_similarity(left: FloatArray, right: FloatArray) -> FloatArray:
    """Cosine of the angle between rows [rows, n] of both, -1 to 1, [rows]; rows that are not finite count as -1."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: FloatArray = (left * right).sum(axis=1) / norms
    return np.nan_to_num(cosines, nan=-1.0)


def _stepwise_logits(engine: Engine, tokens: IntArray) -> Iterator[FloatArray]:
    engine.start(*tokens.shape)
    for piece in np.split(tokens, range(_CHECK_PROMPT, _CHECK_TOKENS), axis=1):
        engine.step(piece)
        yield engine.logits().copy()


def _prefix_logits(engine: Engine, tokens: IntArray) -> Iterator[FloatArray]:
    for length in range(_CHECK_PROMPT, _CHECK_TOKENS + 1):
        engine.start(*tokens.shape)
        engine.step(tokens[:, :length])
        yield engine.logits().copy()


def _time_case(
    case: Case, engines: Sequence[Engine], repetitions: int, note: Callable[[str], None]
) -> list[list[float]]:
    """Tokens a second of each engine and repetition; the engines take turns, so that what disturbs one disturbs all."""
    vocab = engines[0].vocab_size
    warm_up = Case(case.kind, min(case.tokens, _WARM_UP_STEPS), case.batch) if case.kind == "tg" else case
    for engine in engines:
        time_tokens(engine, warm_up, _random_tokens(vocab, case.batch, warm_up.length), case.length)
    rates: list[list[float]] = [[] for _ in engines]
    for repetition in range(repetitions):
        tokens = _random_tokens(vocab, case.batch, case.length, repetition + 1)
        for engine, taken in zip(engines, rates, strict=True):
            time.sleep(_SETTLE_S)
            taken.append(case.timed_tokens / time_tokens(engine, case, tokens, case.length))
        latest = ", ".join(f"{e.name} {taken[-1]:.1f}" for e, taken in zip(engines, rates, strict=True))
        note(f"{case.test} batch {case.batch}, {repetition + 1} of {repetitions}: {latest} tok/s")
    return rates


def time_tokens(engine: Engine, case: Case, tokens: IntArray, length: int) -> float:
    """Seconds that a test's timed part takes.

    Args:
        engine: who runs it.
        case: the test.
        tokens: i32 [batch, case.length].
        length: tokens a sequence to make room for.
    """
    engine.start(case.batch, length)
    pieces = [tokens]
    if case.kind == "tg":
        first, *pieces = np.split(tokens, case.length, axis=1)
        engine.step(first)
    gc.collect()  # Now rather than in the middle.
    start = time.perf_counter()
    for piece in pieces:
        engine.step(piece)
    return time.perf_counter() - start


def _random_tokens(vocab: int, batch: int, length: int, seed: int = 0) -> IntArray:
    return np.random.default_rng([_SEED, seed]).integers(vocab, size=(batch, length), dtype=np.int32)


def _bandwidth_share(case: Case, rates: Sequence[float], ours: BundleEngine, bandwidth: float) -> float | None:
    # The measured bandwidth is the host's.
    if case.kind == "pp" or not ours.session.device_uri.startswith("local"):
        return None
    weights = ours.session.bundle.manifest.parameters.decode_bytes
    nbytes = case.read_bytes(weights, ours.session.cache_token_bytes)
    seconds = sum(case.timed_tokens / rate for rate in rates) / len(rates)
    return nbytes / seconds / bandwidth


def _describe_model(bundle: Bundle) -> str:
    parameters = bundle.manifest.parameters
    formats = ", ".join(f"{count} {name}" for name, count in parameters.formats.items())
    cache = bundle.manifest.cache.dtype
    return f"{bundle.manifest.model.name}, {parameters.nbytes / 2**20:.0f} MiB ({formats}), {cache} cache"
