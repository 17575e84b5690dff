from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from llmir_iree.params.errors import RequestError
from llmir_iree.sampling import Sampler, SamplingParams

LOGITS = np.array([0.0, 2.0, 1.0, 3.0, -1.0, 2.5], np.float32)


def kept(logits: np.ndarray = LOGITS, **options: Any) -> list[int]:
    return Sampler(SamplingParams(temperature=1.0, **options)).distribution(logits)[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 .greedy. or a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be 0 .off. or more"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0, at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5; it must be from 0 .off. to 1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"stop": ("a", "")}, "stop is .*; it must be a tuple of texts, none of them empty"),
        ({"stop": "text"}, "stop is 'text'; it must be a tuple of texts"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert Sampler(SamplingParams()).sample(LOGITS) == 3
    assert Sampler(SamplingParams()).sample(np.array([1, 4, 4, 2], np.float32)) == 1


def test_top_k_keeps_the_likeliest_and_of_equals_the_first() -> None:
    assert kept(top_k=3) == [3, 5, 1]
    assert kept(top_k=100) == [3, 5, 1, 2, 0, 4]
    assert kept(np.array([1, 2, 2, 2, 0], np.float32), top_k=2) == [1, 2]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert kept(logits, top_p=0.49) == [1]
    assert kept(logits, top_p=0.51) == [1, 3]
    assert kept(logits, top_p=0.8) == [1, 3, 2]
    assert kept(logits, top_p=1.0) == [1, 3, 2, 0]
    assert kept(logits, top_p=1e-9) == [1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert kept(logits, min_p=0.31) == [1, 3]
    assert kept(logits, min_p=0.29) == [1, 3, 2]
    assert kept(logits, min_p=1.0) == [1]


def test_filters_apply_after_the_temperature() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert kept(logits, min_p=0.31) == [1, 3]
    flat = Sampler(SamplingParams(temperature=4.0, min_p=0.31)).distribution(logits)[0]
    assert flat.tolist() == [1, 3, 2, 0]


def test_top_p_looks_at_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert kept(logits, top_p=0.55) == [0, 1]
    assert kept(logits, top_k=2, top_p=0.55) == [0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.5, 40, 0.95, 0.05), (0.3, 5, 1.0, 0.2), (2.0, 0, 0.5, 0.01)],
)
def test_the_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    import torch
    from transformers.generation import logits_process as reference

    warpers = [reference.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(reference.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(reference.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(reference.MinPLogitsWarper(min_p))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(scale=3, size=500).astype(np.float32)
        scores = torch.from_numpy(logits)[None]
        for warper in warpers:
            scores = warper(None, scores)
        tokens, probabilities = Sampler(params).distribution(logits)
        actual = np.zeros(500)
        actual[tokens] = probabilities
        np.testing.assert_allclose(actual, torch.softmax(scores, -1)[0].numpy(), atol=1e-6)


def test_tokens_come_as_often_as_they_are_likely() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    counts = Counter(sampler.sample(logits) for _ in range(4000))
    np.testing.assert_allclose([counts[token] / 4000 for token in range(4)], [0.1, 0.5, 0.15, 0.25], atol=0.03)


def test_a_seed_repeats_itself() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(30)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("logits", [[1.0, float("nan")], [float("-inf")] * 2, [0.0, float("inf")]])
def test_logits_that_are_no_numbers_are_refused(logits: list[float]) -> None:
    with pytest.raises(RequestError, match="logits that are no numbers"):
        Sampler(SamplingParams()).sample(np.array(logits, np.float32))
