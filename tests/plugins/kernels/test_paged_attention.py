"""Attention against the op's reference; whatever a query must not see is NaN, or a page that does not exist."""

import ml_dtypes
import numpy as np
import pytest
import torch

from llmir_iree.export import ops

ABSENT = -(2**31)
LAYER, LAYERS = 1, 2


def scene(lengths, seq, heads=4, kv_heads=2, head_dim=64, page_size=16, seed=0, ahead=0, dtype=np.float16):
    """A cache in which each row holds `length` positions, and queries for its last `seq`; short rows are padded.

    `ahead` more positions are stored than any query may see.
    """
    rng = np.random.default_rng(seed)
    stored = [length + ahead for length in lengths]
    used = [-(-length // page_size) for length in stored]
    table = np.full((len(lengths), max(used) + 2), ABSENT, np.int32)
    order = rng.permutation(sum(used)).astype(np.int32) + 1
    cache = np.full((sum(used) + 1, LAYERS, 2, kv_heads, page_size, head_dim), np.nan, dtype)
    for row, length in enumerate(stored):
        table[row, : used[row]], order = order[: used[row]], order[used[row] :]
        for position in range(length):
            page = cache[table[row, position // page_size], LAYER]
            page[:, :, position % page_size] = rng.standard_normal((2, kv_heads, head_dim))
    positions = np.full((len(lengths), seq), -1, np.int32)
    for row, length in enumerate(lengths):
        new = min(seq, length)
        positions[row, :new] = np.arange(length - new, length)
    query = rng.standard_normal((len(lengths), seq, heads, head_dim)).astype(np.float32)
    return query, cache, table, positions


def reference(query, cache, table, positions, scale, window, softcap):
    """The eager op. It gathers whole tables, so that absent entries become the page of NaN."""
    present = np.where(table == ABSENT, 0, table)
    tensors = [torch.from_numpy(array) for array in (query, cache.astype(np.float32), present, positions)]
    return ops.paged_attention(*tensors, LAYER, scale, window, softcap)[0].numpy()


def check(kernels, shape, window=0, softcap=0.0, scale=0.125, tolerance=2e-6):
    query, cache, table, positions = shape
    output = kernels.attend(query, cache, table, positions, LAYER, scale, window, softcap)
    expected = reference(query, cache, table, positions, scale, window, softcap)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 100])
def test_decode(kernels, length):
    check(kernels, scene([length], 1))


@pytest.mark.parametrize("heads", [2, 6, 8, 16])
def test_decode_of_small_and_large_groups(kernels, heads):
    for window, softcap in ((0, 0.0), (0, 3.0), (9, 0.0), (17, 0.0)):
        check(kernels, scene([35, 16, 1], 1, heads, head_dim=40), window, softcap)


@pytest.mark.parametrize("seq", [2, 3, 7, 8, 9, 31, 33])
def test_prefill(kernels, seq):
    check(kernels, scene([seq], seq))


@pytest.mark.parametrize("window", [0, 1, 5, 16, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_later_chunk_with_window_and_softcap(kernels, window, softcap):
    check(kernels, scene([50], 19), window, softcap)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 1), (32, 4), (6, 2), (20, 1)])
def test_groups_of_heads(kernels, heads, kv_heads):
    check(kernels, scene([21], 5, heads, kv_heads))


@pytest.mark.parametrize("head_dim", [1, 16, 24, 80, 128, 256])
def test_head_sizes(kernels, head_dim):
    check(kernels, scene([19], 3, head_dim=head_dim), tolerance=1e-5)


@pytest.mark.parametrize("seq", [1, 2, 21])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_a_cache_of_bfloat16(kernels, seq, head_dim):
    check(kernels, scene([37, 4], seq, 6, head_dim=head_dim, dtype=ml_dtypes.bfloat16), window=30)


@pytest.mark.parametrize("page_size", [1, 3, 8, 20, 32])
def test_page_sizes(kernels, page_size):
    check(kernels, scene([41], 9, page_size=page_size))


def test_ragged_batch_with_padding(kernels):
    check(kernels, scene([33, 1, 9, 40], 9))


def test_padding_gives_zeros(kernels):
    query, cache, table, positions = scene([3], 4)
    output = kernels.attend(query, cache, table, positions, LAYER, 0.125)
    assert positions.tolist() == [[0, 1, 2, -1]]
    assert not output[0, 3].any()
    positions[:] = -5
    assert not kernels.attend(query, cache, table, positions, LAYER, 0.125).any()


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_later_tokens_that_are_nan_do_not_reach_earlier_ones(kernels, heads):
    query, cache, table, positions = scene([12], 12, heads, page_size=8)
    clean = kernels.attend(query, cache, table, positions, LAYER, 0.125)
    cache[table[0, 1], LAYER, :, :, 2] = np.nan  # position 10
    spoiled = kernels.attend(query, cache, table, positions, LAYER, 0.125)
    np.testing.assert_array_equal(spoiled[:, :10], clean[:, :10])
    assert np.isnan(spoiled[:, 10:]).all()


@pytest.mark.parametrize("heads", [4, 16])
def test_positions_before_the_window_may_be_nan(kernels, heads):
    query, cache, table, positions = scene([30], 1, heads, page_size=8)
    clean = kernels.attend(query, cache, table, positions, LAYER, 0.125, window=9)
    cache[table[0, :2], LAYER] = np.nan
    cache[table[0, 2], LAYER, :, :, :5] = np.nan  # up to position 20; 21 and on are seen
    np.testing.assert_array_equal(kernels.attend(query, cache, table, positions, LAYER, 0.125, window=9), clean)


@pytest.mark.parametrize("scale", [1e-30, 40.0])
def test_scores_near_each_other_and_far_apart(kernels, scale):
    check(kernels, scene([40], 5), scale=scale, tolerance=2e-5)
