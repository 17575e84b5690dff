"""Perplexity is what numpy makes of every prefix, however an engine runs the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmir_iree.bench_engines import BundleEngine, Engine, token_losses
from llmir_iree.bench_perplexity import Perplexity, cut_chunks, measure_perplexity, python_help_text
from llmir_iree.bundle import Bundle
from llmir_iree.params.errors import RequestError
from llmir_iree.tokenizer import Tokenizer


def reference(tiny: Any, chunks: np.ndarray) -> float:
    """e to the mean of -log softmax over the second half of every chunk, each prefix on its own."""
    losses = []
    for chunk in chunks.tolist():
        for end in range(len(chunk) // 2 + 1, len(chunk)):
            logits = tiny.logits(chunk[:end]).astype(np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[chunk[end]])
    return float(np.exp(np.mean(losses)))


def test_a_bundle_has_the_perplexity_of_the_reference(tiny: Any) -> None:
    chunks = np.random.default_rng(3).integers(0, len(tiny.table), (3, 14), dtype=np.int32)
    engine = BundleEngine(Bundle.open(tiny.folder), None, None, [(1, 14)])
    result = measure_perplexity([engine], chunks, 1)
    assert result.tokens == 42
    assert result.values["llmir-iree"] == pytest.approx(reference(tiny, chunks), rel=1e-5)


class UniformEngine(Engine):
    """Gives every token the same probability, but row 0 of its batch another one."""

    name = "uniform"
    vocab_size = 10

    def start(self, batch: int, length: int, context: int = 0) -> None:
        self.calls = [(batch, length)]

    def step(self, tokens: np.ndarray) -> None:
        self.calls.append(tokens.shape)

    def logits(self) -> np.ndarray:
        return np.zeros((self.calls[0][0], self.vocab_size), np.float32)


def test_the_first_half_is_context_and_the_last_token_predicts_nothing() -> None:
    engine = UniformEngine()
    losses = engine.losses(np.zeros((2, 8), np.int32), 4)
    assert engine.calls == [(2, 8), (2, 4), (2, 1), (2, 1), (2, 1)]
    assert losses.shape == (2, 3)
    np.testing.assert_allclose(losses, np.log(10))


def test_what_fills_up_the_last_group_does_not_count() -> None:
    class Counting(UniformEngine):
        def losses(self, tokens: np.ndarray, first: int) -> np.ndarray:
            assert tokens.shape == (4, 6)
            assert first == 3
            return np.repeat(tokens[:, :1].astype(np.float64), 2, axis=1)

    chunks = np.repeat(np.arange(6, dtype=np.int32)[:, None], 6, axis=1)
    assert measure_perplexity([Counting()], chunks, 4).values["uniform"] == pytest.approx(np.exp(np.arange(6).mean()))


def test_a_loss_does_not_overflow() -> None:
    logits = np.array([[1000, 0, 0], [-1000, -1000, -1000]], np.float32)
    np.testing.assert_allclose(token_losses(logits, np.array([1, 2], np.int32)), [1000, np.log(3)])


def test_engines_are_as_far_apart_as_the_highest_and_the_lowest() -> None:
    assert Perplexity(10, {"a": 10.0, "b": 10.5, "c": 10.1}).distance == pytest.approx(0.05)


def test_chunks_are_cut_from_the_beginning_and_marked(tiny: Any) -> None:
    tokenizer = Tokenizer.load(tiny.folder / "tokenizer")
    ids = tokenizer.encode("abcdefgh")
    assert ids[0] == 0, "the mark of the beginning"
    assert cut_chunks(tokenizer, "abcdefgh", 8, 0, 4).tolist() == [[0, *ids[1:4]], [0, *ids[5:8]]]
    assert cut_chunks(tokenizer, "abcdefgh", 7, 0, 4).tolist() == [[0, *ids[1:4]]]
    assert cut_chunks(tokenizer, "abcdefgh", 8, None, 4)[1].tolist() == ids[4:8]


@pytest.mark.parametrize("tokens", [3, 12])
def test_a_text_that_is_too_short_is_refused(tiny: Any, tokens: int) -> None:
    with pytest.raises(RequestError, match=rf"perplexity of {tokens} tokens: the text has 9, and a chunk takes 4"):
        cut_chunks(Tokenizer.load(tiny.folder / "tokenizer"), "abcdefgh", tokens, 0, 4)


def test_the_text_is_long_enough() -> None:
    # At four characters a token, 20 thousand tokens.
    assert len(python_help_text()) > 80_000
    assert python_help_text() == python_help_text()


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmir_iree.bench_models import ModelShape, write_random_gguf

    file = tmp_path_factory.mktemp("models") / "small.gguf"
    shape = ModelShape(
        layers=2, hidden_size=64, inner_size=96, heads=4, kv_heads=2, head_dim=16, vocab_size=300, context=512
    )
    write_random_gguf("small", shape, file)
    return file


def test_llama_cpp_loses_at_once_what_it_loses_step_by_step(small_gguf: Path) -> None:
    pytest.importorskip("llama_cpp", reason='needs llama.cpp: pip install "llmir-iree[bench]"')
    from llmir_iree.bench_engines import LlamaCppEngine

    engine = LlamaCppEngine(small_gguf, 1)
    tokens = np.random.default_rng(5).integers(0, 300, (2, 12), dtype=np.int32)
    np.testing.assert_allclose(engine.losses(tokens, 6), Engine.losses(engine, tokens, 6), rtol=1e-3)
    engine.close()


def test_llama_cpp_keeps_a_context_between_starts(small_gguf: Path) -> None:
    pytest.importorskip("llama_cpp", reason='needs llama.cpp: pip install "llmir-iree[bench]"')
    from llmir_iree.bench_engines import LlamaCppEngine

    engine = LlamaCppEngine(small_gguf, 1)
    answers = []
    for context in (7, 7, 5, 7):
        engine.start(2, 12, context)
        for token in (3, 4):
            engine.step(np.full((2, 1), token, np.int32))
        answers.append(engine.logits())
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(answers[3], answers[0], rtol=1e-4, atol=1e-6)
    assert abs(answers[2] - answers[0]).max() > 1e-3
    engine.close()
