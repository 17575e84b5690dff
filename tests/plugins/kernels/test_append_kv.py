"""The cache is bit for bit what the op's reference makes of it."""

import numpy as np
import pytest
import torch

from llmir_iree.export import ops


def both(kernels, key, value, page_table, positions, layer=1, layers=3, page_size=4, pages=12):
    shape = (pages, layers, 2, key.shape[2], page_size, key.shape[3])
    cache = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    tensors = [torch.from_numpy(array.copy()) for array in (cache, key, value, page_table, positions)]
    expected = ops.append_kv(*tensors, layer).numpy()
    kernels.append(cache, key, value, page_table, positions, layer)
    return cache, expected


@pytest.mark.parametrize("head_dim", [1, 16, 31, 64, 80])
@pytest.mark.parametrize("seq", [1, 7, 9])
def test_tokens_reach_their_slots(kernels, seq, head_dim):
    rng = np.random.default_rng(seq)
    key, value = rng.standard_normal((2, 2, seq, 3, head_dim)).astype(np.float32)
    page_table = rng.permutation(11)[:8].astype(np.int32).reshape(2, 4) + 1
    positions = np.stack((np.arange(seq), np.arange(seq) + 5)).astype(np.int32)
    cache, expected = both(kernels, key, value, page_table, positions)
    assert cache.tobytes() == expected.tobytes()


def test_padding_is_not_stored_and_its_entries_are_not_read(kernels):
    key, value = np.ones((2, 2, 3, 1, 16), np.float32)
    page_table = np.array([[1, -(2**31)], [2, -(2**31)]], np.int32)
    positions = np.array([[0, 1, -1], [3, -1, -7]], np.int32)
    cache, expected = both(kernels, key, value, page_table, positions)
    assert cache.tobytes() == expected.tobytes()


def test_values_are_rounded_as_torch_rounds(kernels):
    """Ties, denormals, what overflows, and everything between."""
    bits = np.random.default_rng(1).integers(0, 2**32, 4096, np.uint32)
    edges = [0, 1e-8, 2**-25, 2**-24, 3 * 2**-25, 6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519.99, 65520, np.inf]
    finite = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    values = np.concatenate([finite, np.float32(edges), -np.float32(edges)])
    values = values[: len(values) // 2 * 2].reshape(2, 1, 1, 1, -1).astype(np.float32)
    cache, expected = both(kernels, *values, np.array([[1]], np.int32), np.array([[2]], np.int32))
    np.testing.assert_array_equal(cache, expected)


def test_nan_stays_nan(kernels):
    key = np.full((1, 1, 1, 17), np.nan, np.float32)
    cache, _ = both(kernels, key, key, np.array([[1]], np.int32), np.array([[2]], np.int32))
    assert np.isnan(cache[1, 1, :, 0, 2]).all()
    assert np.isfinite(cache[2:]).all()
