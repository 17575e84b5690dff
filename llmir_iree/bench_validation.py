"""Whether engines agree: nothing is worth timing that computes something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmir_iree.params.errors import BundleError

if TYPE_CHECKING:  # Importing the engines loads the runtime.
    from llmir_iree.bench_engines import Engine

CHECKED_TOKENS = 12
"""Tokens of a sequence that a comparison runs: a prompt, and a few decodes on top of it."""

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

_SEED = 20
_CHECK_PROMPT = 9
# Random tokens make large activations, and quantising those to 8 bits, as llama.cpp does, takes the cosine down to
# 0.993. A wrong layout or position brings it near 0.
_MIN_COSINE = 0.99


def validate(engines: Sequence[Engine], reference: Engine, batches: Sequence[int], note: Callable[[str], None]) -> str:
    """Compare every engine with the reference; returns what was compared and how close it was.

    Args:
        engines: ours first. Ours is compared with its own prefill where it is the reference itself.
        reference: the dullest engine at hand.
        batches: batch sizes to compare at.
        note: takes a line about what is being done.

    Raises:
        BundleError: see `compare_logits`.
    """
    ours = engines[0]
    results = []
    for engine in engines:
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
        tokens = random_tokens(engine.vocab_size, batch, CHECKED_TOKENS)
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
    for piece in np.split(tokens, range(_CHECK_PROMPT, CHECKED_TOKENS), axis=1):
        engine.step(piece)
        yield engine.logits().copy()


def _prefix_logits(engine: Engine, tokens: IntArray) -> Iterator[FloatArray]:
    for length in range(_CHECK_PROMPT, CHECKED_TOKENS + 1):
        engine.start(*tokens.shape)
        engine.step(tokens[:, :length])
        yield engine.logits().copy()


def random_tokens(vocab: int, batch: int, length: int, seed: int = 0) -> IntArray:
    """Token ids i32 [batch, length], the same for the same arguments."""
    return np.random.default_rng([_SEED, seed]).integers(vocab, size=(batch, length), dtype=np.int32)
