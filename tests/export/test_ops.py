"""The eager ops, against attention written without pages."""

import pytest
import torch

import llmir_iree.export.ops  # noqa: F401  registers the ops

PAGE_SIZE, LAYERS, KV_HEADS, HEADS, HEAD_DIM = 4, 2, 2, 6, 8
SCALE = HEAD_DIM**-0.5


def store(length: int, pages: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache with one sequence stored through `append_kv` in layer 1, its table, and its keys and values."""
    torch.manual_seed(length)
    cache = torch.zeros(8, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    table = torch.tensor([pages], dtype=torch.int32)
    key, value = torch.randn(2, 1, length, KV_HEADS, HEAD_DIM)
    positions = torch.arange(length, dtype=torch.int32)[None]
    return torch.ops.llmir.append_kv(cache, key, value, table, positions, 1), table, key, value


def attend(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, **options):
    window, softcap = options.get("window", 0), options.get("softcap", 0.0)
    return torch.ops.llmir.paged_attention(query, cache, table, positions, 1, SCALE, window, softcap)[0]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
def test_attention_equals_torch_without_pages(length: int) -> None:
    cache, table, key, value = store(length, [6, 2, 5])
    query = torch.randn(1, length, HEADS, HEAD_DIM)
    got = attend(query, cache, table, torch.arange(length, dtype=torch.int32)[None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_append_writes_one_layer_and_leaves_its_input_alone() -> None:
    cache, _table, key, value = store(5, [6, 2, 5])
    assert not cache[:, 0].any()
    assert torch.equal(cache[6, 1, 0, :, 3], key[0, 3])
    assert torch.equal(cache[2, 1, 1, :, 0], value[0, 4])
    assert cache[2, 1, :, :, 1:].abs().sum() == 0


def test_padding_is_neither_stored_nor_attended() -> None:
    cache, table, _key, _value = store(5, [6, 2, 5])
    positions = torch.tensor([[-1, -1, 4]], dtype=torch.int32)
    new = torch.full((1, 3, KV_HEADS, HEAD_DIM), torch.nan)
    new[:, 2] = 1.0
    after = torch.ops.llmir.append_kv(cache, new, new, table, positions, 1)
    assert not after.isnan().any()
    assert (after != cache).sum() == 2 * KV_HEADS * HEAD_DIM
    output = attend(torch.randn(1, 3, HEADS, HEAD_DIM), after, table, positions)
    assert not output[0, :2].any()
    assert output[0, 2].any()


def test_window_hides_what_is_older() -> None:
    cache, table, key, value = store(9, [6, 2, 5])
    query = torch.randn(1, 1, HEADS, HEAD_DIM)
    got = attend(query, cache, table, torch.tensor([[8]], dtype=torch.int32), window=3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key[:, 6:].transpose(1, 2), value[:, 6:].transpose(1, 2), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_softcap_bounds_the_scores() -> None:
    cache, table, key, value = store(4, [6, 2, 5])
    query = 50 * torch.randn(1, 1, HEADS, HEAD_DIM)
    got = attend(query, cache, table, torch.tensor([[3]], dtype=torch.int32), softcap=2.0)
    scores = torch.einsum("bshgd,bthd->bhgst", query.reshape(1, 1, KV_HEADS, -1, HEAD_DIM), key) * SCALE
    weights = (2.0 * (scores / 2.0).tanh()).softmax(-1)
    expected = torch.einsum("bhgst,bthd->bshgd", weights, value).reshape(1, 1, HEADS, HEAD_DIM)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_tracing_refuses_shapes_that_do_not_fit() -> None:
    with torch.device("meta"):
        cache = torch.empty(8, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
        table = torch.empty(1, 3, dtype=torch.int32)
        positions = torch.empty(1, 1, dtype=torch.int32)
        new = torch.empty(1, 1, KV_HEADS + 1, HEAD_DIM)
        with pytest.raises(ValueError, match=r"append_kv: key must end in \(kv_heads, head_dim\) = \(2, 8\)"):
            torch.ops.llmir.append_kv(cache, new, new, table, positions, 0)
        with pytest.raises(ValueError, match="query has 5 heads, not a multiple of the cache's 2"):
            attend(torch.empty(1, 1, 5, HEAD_DIM), cache, table, positions)
        with pytest.raises(ValueError, match="planes have 3 rows, out_features is 4"):
            torch.ops.llmir.quantized_matmul(torch.empty(1, 8), [torch.empty(3, 8)], "f32", "planes", 4)
        with pytest.raises(ValueError, match="planes have 1 tiles of 16 rows, out_features is 17"):
            torch.ops.llmir.quantized_matmul(torch.empty(1, 8), [torch.empty(1, 8, 16)], "f16", "tile16", 17)
        with pytest.raises(ValueError, match="layout 'rows' is none of planes, tile16"):
            torch.ops.llmir.quantized_matmul(torch.empty(1, 8), [torch.empty(4, 8)], "f32", "rows", 4)
