"""Whole models through export, compile and run, against transformers in float32 on the same dequantised weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmir_iree.build import BuildOptions, build_bundle
from llmir_iree.bundle import Bundle
from llmir_iree.plugins.lowering import Preference
from llmir_iree.plugins.pipeline import lower
from llmir_iree.session import Session
from llmir_iree.targets import resolve_target

# Where two logits lie closer than this, either may be the larger one; errors of a float16 cache are below it.
TIE = 0.05
PAGE_EDGES = (31, 32, 33, 64, 65)

# What the seam is asked for, without "kernels": on a CPU, that is "best", as a test says.
IMPLEMENTATIONS: tuple[Preference, ...] = ("portable", "best")

# Of the logits, to transformers'. Kernels round activations to 8 bits, or to twice that in groups with outliers, which
# costs most at a few positions of the chat template.
LEAST_COSINE = {"portable": 0.999, "best": 0.995}
MEDIAN_COSINE = 0.999


class Rows:
    """Sequences that run through a session's explicit calls, each on pages of its own."""

    def __init__(self, session: Session, batch_size: int, table_size: int = 4) -> None:
        self.session = session
        self.batch_size = batch_size
        first = 1 + np.arange(batch_size, dtype=np.int32)[:, None] * table_size
        self.page_table = (first + np.arange(table_size, dtype=np.int32)).astype(np.int32)
        self.starts = np.zeros(batch_size, np.int32)

    def step(self, phase: Any, rows: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Feed new tokens to every row (none leaves it idle); logits [batch, vocab]."""
        lengths = np.array([len(row) for row in rows], np.int32)
        seq = 1 if phase == "decode" else max(2, int(lengths.max()))
        tokens = np.zeros((self.batch_size, seq), np.int32)
        for index, row in enumerate(rows):
            tokens[index, seq - len(row) :] = row
        result = self.session.run(phase, self.batch_size, tokens, self.starts, lengths, self.page_table)
        self.starts = self.starts + lengths
        logits = result.logits().copy()
        assert np.array_equal(result.next_token(), logits.argmax(axis=1))
        return logits


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def assert_same(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], implementations: str) -> None:
    """Two ways to the same logits, in which sums run in another order.

    Rounded to 8 bits, activations that differ in their last bit may differ in 1 of 127 steps, so that logits of up to
    30 differ by up to 1; a wrong page or position brings the cosine below 0.9.
    """
    if implementations == "portable":
        np.testing.assert_allclose(got, expected, atol=0.02)
    else:
        assert cosine(got, expected).min() >= 0.9995


def assert_close(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], implementations: str) -> None:
    """Logits [positions, vocab] of a session, and of transformers."""
    similarity = cosine(got, expected)
    assert similarity.min() >= LEAST_COSINE[implementations]
    assert np.median(similarity) >= MEDIAN_COSINE


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def implementations(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(implementations: str, request: pytest.FixtureRequest) -> Session:
    name = {"portable": "smollm2_portable_bundle", "best": "smollm2_bundle"}[implementations]
    return Session(request.getfixturevalue(name), max_seq_len=512)


def test_the_bundles_have_the_implementations_that_the_tests_name(
    smollm2_bundle: Bundle, smollm2_portable_bundle: Bundle
) -> None:
    # Two functions of 30 layers, of which each has 7 matmuls without fusion, and a head.
    matmuls, layers = 211, 2 * 30
    assert smollm2_portable_bundle.target("llvm-cpu").modules["decode"].implementations == {
        # Those of one row are fused with dequantising, and the large output head.
        "quantized_matmul": {"portable-fused": matmuls + 1, "portable": matmuls - 1},
        "append_kv": {"portable": layers},
        "paged_attention": {"portable": layers},
    }
    fused = {"rope_append_attend": layers, "gated_multiply": layers, "multiply": 3 * layers + 2}
    norms = {"norm_quantize": 2, "add_norm_quantize": 2 * layers}
    assert smollm2_bundle.target("llvm-cpu").modules["decode"].implementations == {
        op: {"cpu-kernels": count} for op, count in {**fused, **norms}.items()
    }


def test_kernels_alone_are_the_best_on_a_cpu(smollm2_bundle: Bundle) -> None:
    source = smollm2_bundle.path(smollm2_bundle.manifest.portable["prefill"].file).read_text(encoding="utf-8")
    merged = smollm2_bundle.manifest.parameters.merged
    target = resolve_target("llvm-cpu")
    kernels, best, portable = (
        lower(source, target, preference, merged=merged).text for preference in ("kernels", "best", "portable")
    )
    assert kernels == best != portable


@pytest.fixture(scope="module")
def prompt(smollm2_bundle: Bundle) -> list[int]:
    from llmir_iree.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2_bundle.path("tokenizer"))
    messages = [{"role": "user", "content": "Write a short story about a lighthouse keeper and the sea."}]
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special=False)


def test_smollm2_prefill_and_64_decode_steps_equal_transformers(
    session: Session,
    implementations: str,
    prompt: list[int],
    smollm2_gguf: Path,
    reference: Callable[[str], Any],
) -> None:
    rows = Rows(session, 1)
    logits = [rows.step("prefill", [prompt])[0]]
    tokens = [int(logits[0].argmax())]
    for _ in range(64):
        logits.append(rows.step("decode", [tokens[-1:]])[0])
        tokens.append(int(logits[-1].argmax()))

    expected = reference(str(smollm2_gguf))([[*prompt, *tokens[:-1]]])[0, len(prompt) - 1 :]
    assert_close(np.stack(logits), expected, implementations)
    if implementations != "portable":
        return  # the largest logit is another one now and then
    for position, (token, truth) in enumerate(zip(tokens, expected, strict=True)):
        margin = float(truth.max() - truth[token])
        assert margin < TIE, f"token {position}: chose {token}, transformers {truth.argmax()}, {margin} above it"


def test_smollm2_prefill_equals_transformers_at_every_position(
    session: Session,
    implementations: str,
    prompt: list[int],
    smollm2_gguf: Path,
    reference: Callable[[str], Any],
) -> None:
    expected = reference(str(smollm2_gguf))([prompt])[0]
    got = [Rows(session, 1).step("prefill", [prompt[:length]])[0] for length in range(1, len(prompt) + 1)]
    assert_close(np.stack(got), expected, implementations)


@pytest.mark.parametrize("length", PAGE_EDGES)
def test_decode_after_prefill_equals_one_longer_prefill(session: Session, implementations: str, length: int) -> None:
    tokens = np.random.default_rng(length).integers(3, 40_000, length + 3).tolist()
    stepwise = Rows(session, 1)
    stepwise.step("prefill", [tokens[:length]])
    for end in range(length + 1, length + 4):
        got = stepwise.step("decode", [tokens[end - 1 : end]])
        expected = Rows(session, 1).step("prefill", [tokens[:end]])
        assert_same(got, expected, implementations)


def test_a_prefill_in_pieces_equals_one_prefill(session: Session, implementations: str) -> None:
    tokens = np.random.default_rng(0).integers(3, 40_000, 70).tolist()
    pieces = Rows(session, 1)
    for start, stop in ((0, 31), (31, 33), (33, 64), (64, 70)):
        got = pieces.step("prefill", [tokens[start:stop]])
    assert_same(got, Rows(session, 1).step("prefill", [tokens]), implementations)


def test_a_batch_of_unequal_lengths_equals_its_rows_alone(session: Session, implementations: str) -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, 40_000, length + 1).tolist() for length in (31, 33, 64)]
    batch = Rows(session, 4)
    got = batch.step("prefill", [*(text[:-1] for text in texts), []])
    after = batch.step("decode", [*(text[-1:] for text in texts), []])
    for index, text in enumerate(texts):
        alone = Rows(session, 1)
        assert_same(got[index], alone.step("prefill", [text[:-1]])[0], implementations)
        assert_same(after[index], alone.step("decode", [text[-1:]])[0], implementations)


@pytest.mark.parametrize("padding", [0, 9])
def test_padded_table_entries_never_change_a_result(session: Session, padding: int) -> None:
    tokens = np.random.default_rng(2).integers(3, 40_000, 34).tolist()
    clean = Rows(session, 1)
    expected = [clean.step("prefill", [tokens[:33]]), clean.step("decode", [tokens[33:]])]

    cache = np.zeros_like(session.read_cache())
    cache[padding] = np.nan
    session.write_cache(cache)
    padded = Rows(session, 1, table_size=2)
    padded.page_table = np.array([[3, 5, padding, padding, padding]], np.int32)
    got = [padded.step("prefill", [tokens[:33]]), padded.step("decode", [tokens[33:]])]
    session.write_cache(np.zeros_like(cache))
    np.testing.assert_array_equal(np.stack(got), np.stack(expected))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 12}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
]
ARCHITECTURE_NAMES = [
    "llama3-rope-tied",
    "llama-biases-no-groups",
    "mistral-window",
    "qwen2-biases-tied",
    "qwen3-head-norms",
]


@pytest.mark.parametrize(("model_type", "options"), ARCHITECTURES, ids=ARCHITECTURE_NAMES)
def test_every_architecture_equals_transformers(
    model_type: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    reference: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    source = str(tiny_checkpoint(model_type, **options))
    target = resolve_target("llvm-cpu")
    bundle = build_bundle(
        BuildOptions(source, tmp_path / "bundle", batch_sizes=(2,), page_size=16, cache_dtype="f32", targets=(target,))
    )
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 96, (2, 40))
    compare(bundle, texts, reference(source)(texts.tolist()))


@pytest.mark.parametrize("implementations", IMPLEMENTATIONS)
@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_a_quantised_export_equals_transformers_on_the_same_weights(
    quant: str,
    implementations: Preference,
    tiny_checkpoint: Callable[..., Path],
    reference: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = str(tiny_checkpoint("llama"))
    target = resolve_target("llvm-cpu")
    bundle = build_bundle(
        BuildOptions(
            source,
            tmp_path / "bundle",
            quant=quant,
            batch_sizes=(2,),
            page_size=16,
            cache_dtype="f32",
            targets=(target,),
            implementations=implementations,
        )
    )
    assert bundle.manifest.parameters.formats == {"f32": 1, quant: 15}
    texts = np.random.default_rng(0).integers(0, 96, (2, 40))
    compare(bundle, texts, reference(source, quant)(texts.tolist()), implementations=implementations)


@pytest.mark.parametrize(("model_type", "options"), ARCHITECTURES, ids=ARCHITECTURE_NAMES)
def test_kernels_serve_every_architecture(
    model_type: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    reference: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """With all passes: what they fuse differs in biases, windows, groups and norms of heads."""
    source = str(tiny_checkpoint(model_type, **{"head_dim": 32, **options}))
    target = resolve_target("llvm-cpu")
    bundle = build_bundle(
        BuildOptions(source, tmp_path / "bundle", quant="q8_0", batch_sizes=(2,), page_size=16, targets=(target,))
    )
    used = bundle.target("llvm-cpu").modules["decode"].implementations
    assert {name for names in used.values() for name in names} == {"cpu-kernels"}
    assert ("rope_append_attend" in used) == (model_type != "qwen3")
    texts = np.random.default_rng(0).integers(0, 96, (2, 40))
    compare(bundle, texts, reference(source, "q8_0")(texts.tolist()), implementations="best")


@pytest.mark.parametrize(("cache_dtype", "bits"), [("f16", 10), ("bf16", 7)])
def test_a_cache_of_fewer_bits_costs_their_precision(
    cache_dtype: Any,
    bits: int,
    tiny_checkpoint: Callable[..., Path],
    reference: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = str(tiny_checkpoint("llama"))
    target = resolve_target("llvm-cpu")
    bundle = build_bundle(
        BuildOptions(source, tmp_path / "bundle", batch_sizes=(2,), cache_dtype=cache_dtype, targets=(target,))
    )
    texts = np.random.default_rng(0).integers(0, 96, (2, 40))
    expected = reference(source)(texts.tolist())
    compare(bundle, texts, expected, tolerance=float(np.abs(expected).max()) * 2.0 ** (1 - bits))


def compare(
    bundle: Bundle,
    texts: npt.NDArray[Any],
    expected: npt.NDArray[np.float32],
    tolerance: float = 1e-3,
    implementations: str = "portable",
) -> None:
    """A prefill of 33 tokens and decodes of the others, against the logits [batch, seq, vocab] that are expected."""
    rows = Rows(Session(bundle, pages=16), 2)
    got = [rows.step("prefill", texts[:, :33].tolist())]
    got += [rows.step("decode", texts[:, position, None].tolist()) for position in range(33, texts.shape[1])]
    logits, truth = np.stack(got, axis=1), expected[:, 32:]
    if implementations == "portable":
        np.testing.assert_allclose(logits, truth, rtol=1e-3, atol=tolerance)
    else:
        assert_close(logits.reshape(-1, logits.shape[-1]), truth.reshape(-1, truth.shape[-1]), implementations)
