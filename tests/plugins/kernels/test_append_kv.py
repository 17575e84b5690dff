"""The cache is bit for bit what the op's reference makes of it."""

import ml_dtypes
import numpy as np
import pytest
import torch

from llmir_iree.export import ops


@pytest.fixture(params=[np.float16, ml_dtypes.bfloat16])
def dtype(request):
    return np.dtype(request.param)


def as_torch(cache):
    """A copy; torch reads no bfloat16 of numpy's."""
    is_half = cache.dtype == np.float16
    return torch.from_numpy(cache.view(np.int16).copy()).view(torch.float16 if is_half else torch.bfloat16)


def both(kernels, dtype, key, value, page_table, positions, layer=1, layers=3, page_size=4, pages=12):
    shape = (pages, layers, 2, key.shape[2], page_size, key.shape[3])
    cache = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    tensors = [torch.from_numpy(array.copy()) for array in (key, value, page_table, positions)]
    expected = ops.append_kv(as_torch(cache), *tensors, layer).view(torch.int16).numpy().view(dtype)
    kernels.append(cache, key, value, page_table, positions, layer)
    return cache, expected


@pytest.mark.parametrize("head_dim", [1, 16, 31, 64, 80])
@pytest.mark.parametrize("seq", [1, 7, 9])
def test_tokens_reach_their_slots(kernels, dtype, seq, head_dim):
    rng = np.random.default_rng(seq)
    key, value = rng.standard_normal((2, 2, seq, 3, head_dim)).astype(np.float32)
    page_table = rng.permutation(11)[:8].astype(np.int32).reshape(2, 4) + 1
    positions = np.stack((np.arange(seq), np.arange(seq) + 5)).astype(np.int32)
    cache, expected = both(kernels, dtype, key, value, page_table, positions)
    assert cache.tobytes() == expected.tobytes()


def test_padding_is_not_stored_and_its_entries_are_not_read(kernels, dtype):
    key, value = np.ones((2, 2, 3, 1, 16), np.float32)
    page_table = np.array([[1, -(2**31)], [2, -(2**31)]], np.int32)
    positions = np.array([[0, 1, -1], [3, -1, -7]], np.int32)
    cache, expected = both(kernels, dtype, key, value, page_table, positions)
    assert cache.tobytes() == expected.tobytes()


def test_values_are_rounded_as_torch_rounds(kernels, dtype):
    """Ties, denormals, what overflows, and everything between."""
    bits = np.random.default_rng(1).integers(0, 2**32, 4096, np.uint32)
    edges = [0, 1e-8, 2**-25, 2**-24, 3 * 2**-25, 6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519.99, 65520, np.inf]
    finite = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    edges += [1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3.3895e38, 3.4e38]  # of bf16
    values = np.concatenate([finite, np.float32(edges), -np.float32(edges)])
    values = values[: len(values) // 2 * 2].reshape(2, 1, 1, 1, -1).astype(np.float32)
    cache, expected = both(kernels, dtype, *values, np.array([[1]], np.int32), np.array([[2]], np.int32))
    np.testing.assert_array_equal(cache.view(np.uint16), expected.view(np.uint16))


def test_nan_stays_nan(kernels, dtype):
    key = np.full((1, 1, 1, 17), np.nan, np.float32)
    cache, _ = both(kernels, dtype, key, key, np.array([[1]], np.int32), np.array([[2]], np.int32))
    assert np.isnan(cache[1, 1, :, 0, 2].astype(np.float32)).all()
    assert np.isfinite(cache[2:].astype(np.float32)).all()
