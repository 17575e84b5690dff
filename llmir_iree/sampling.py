"""Choosing the next token from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmir_iree.params.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is sampled and when it ends; checks itself.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        min_p: keep tokens at least this many times as likely as the likeliest; 0 keeps all.
        seed: makes the choices repeatable, whatever else runs beside; None differs every time.
        stop: texts that end the completion; they are not part of it.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        RequestError: an option out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        in_range = math.isfinite(self.temperature) and self.temperature >= 0
        _require("temperature", self.temperature, in_range, "0 (greedy) or a positive number")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1")
        _require("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more")
        is_tuple = isinstance(self.stop, tuple)
        _require("stop", self.stop, is_tuple and all(self.stop), "a tuple of texts, none of them empty")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that no logits are needed."""
        return self.temperature == 0


def _require(option: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise RequestError(f"{option} is {value!r}; it must be {expected}")


class Sampler:
    """Draws tokens as its parameters say, from a random stream of its own.

    The filters come in the order of transformers: temperature, top-k, top-p, min-p. (llama.cpp scales by the
    temperature last; there, top-p and min-p see the model's own distribution.) Ties go to the lower token.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose a token.

        Args:
            logits: f32 [vocab].

        Raises:
            RequestError: the logits hold NaN or nothing finite.
        """
        best = int(np.argmax(logits))
        if not np.isfinite(logits[best]):
            raise RequestError(f"the model answers with logits that are no numbers (token {best}: {logits[best]})")
        if self._params.is_greedy:
            return best
        tokens, probabilities = self.distribution(logits)
        # One draw a token, so that a seed gives the same choices however many tokens the filters keep.
        cumulative = np.cumsum(probabilities)
        drawn = self._random.random() * cumulative[-1]
        return int(tokens[np.searchsorted(cumulative, drawn, side="right")])

    def distribution(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """What the filters leave: tokens [n], the likeliest first, and their probabilities [n], which sum to 1."""
        params = self._params
        scaled = (logits.astype(np.float64) - np.max(logits)) / params.temperature
        tokens = _largest(scaled, params.top_k) if 0 < params.top_k < scaled.size else np.arange(scaled.size)
        weights = np.exp(scaled[tokens])
        weights /= weights.sum()
        if params.top_p < 1:
            # All tokens below this together have less than 1 - top_p: none of them can belong, none need be sorted.
            floor = (1 - params.top_p) / weights.size
            tokens, weights = tokens[weights >= floor], weights[weights >= floor]
        order = np.lexsort((tokens, -weights))
        tokens, weights = tokens[order], weights[order]
        if params.top_p < 1:
            before = np.cumsum(weights) - weights
            kept = before < params.top_p
            tokens, weights = tokens[kept], weights[kept]
        kept = weights >= params.min_p * weights[0]
        tokens, weights = tokens[kept], weights[kept]
        return tokens, weights / weights.sum()


def _largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest values, in no order; of equal values, those that come first."""
    threshold = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)
    return np.concatenate([above, equal[: count - above.size]])
