"""match-paged-attention: which ways of writing it are taken, that they compute the same, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmir_iree.plugins.pipeline import Lowered, lower
from llmir_iree.targets import resolve_target
from tests.plugins.conftest import export_torch

BATCH, HEADS, KV_HEADS, PAGE_SIZE, HEAD_DIM, LAYERS = 2, 4, 2, 8, 16, 3
LAYER = 1
TARGETS = ("llvm-cpu", "vulkan:llvmpipe")

SDPA = "torch.aten.scaled_dot_product_attention"
GATHERS = ("torch.aten.index.Tensor", "torch.aten.index_select", "torch.aten.where", SDPA)

Pages = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Mask = Callable[[Tensor, int], Tensor]


class Attention(torch.nn.Module):
    """Attention of queries over pages, by functions that gather them and make the mask."""

    def __init__(self, pages: Pages, mask: Mask, **options: Any) -> None:
        super().__init__()
        self.pages, self.mask, self.options = pages, mask, {"enable_gqa": True, **options}

    def forward(self, query: Tensor, cache: Tensor, table: Tensor, bounds: Tensor) -> Tensor:
        key, value = self.pages(cache, table)
        mask = self.mask(bounds, key.shape[2])
        return F.scaled_dot_product_attention(query, key.float(), value.float(), attn_mask=mask, **self.options)


# Ways to gather keys and values [batch, kv_heads, tokens, head_dim] of a layer.


def select_then_index(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    kinds = (cache[:, LAYER, kind][table].permute(0, 2, 1, 3, 4) for kind in (0, 1))
    key, value = (kind.reshape(table.shape[0], KV_HEADS, -1, HEAD_DIM) for kind in kinds)
    return key, value


def index_with_layer(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    key, value = cache[table, LAYER].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    return key, value


def index_select_of_one_layer(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Of a cache without layers, with the table flat."""
    batch, entries = table.shape
    flat = cache.index_select(0, table.flatten().long())
    pages = flat.view(batch, entries, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    key, value = (pages[:, :, kind].transpose(1, 2).reshape(batch, KV_HEADS, -1, HEAD_DIM) for kind in (0, 1))
    return key, value


def expand_heads(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As models without enable_gqa do."""
    group = HEADS // KV_HEADS
    shape = (table.shape[0], KV_HEADS, group, -1, HEAD_DIM)
    key, value = (
        kind[:, :, None].expand(*shape).reshape(table.shape[0], HEADS, -1, HEAD_DIM)
        for kind in select_then_index(cache, table)
    )
    return key, value


def repeat_heads(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (kind.repeat_interleave(HEADS // KV_HEADS, dim=1) for kind in select_then_index(cache, table))
    return key, value


# Ways to say what a token sees.


def before_lengths(lengths: Tensor, tokens: int) -> Tensor:
    return (torch.arange(tokens)[None, :] < lengths[:, None])[:, None, None, :]


def after_lengths(lengths: Tensor, tokens: int) -> Tensor:
    return lengths.view(-1, 1, 1, 1) > torch.arange(tokens)


def added_to_scores(lengths: Tensor, tokens: int) -> Tensor:
    return torch.where(before_lengths(lengths, tokens), 0.0, -torch.inf)


def up_to_positions(positions: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens) <= positions[:, None, :, None]


WAYS = [
    (select_then_index, before_lengths),
    (index_with_layer, after_lengths),
    (index_select_of_one_layer, before_lengths),
    (expand_heads, added_to_scores),
    (repeat_heads, before_lengths),
    (select_then_index, up_to_positions),
]


def arguments_for(
    pages: Pages, mask: Mask, seq: int, entries: int = 3, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seq + entries)
    shape = (7, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    cache = torch.randn(shape, generator=generator).to(dtype)
    if pages is index_select_of_one_layer:
        cache = cache[:, LAYER].clone()
    # Pages in no order, one of them twice.
    table = torch.tensor([[5, 2, 6, 1], [3, 0, 4, 3]])[:, :entries].contiguous()
    query = torch.randn(BATCH, HEADS, seq, HEAD_DIM, generator=generator)
    lengths = torch.tensor([entries * PAGE_SIZE - 3, 9])
    if mask is up_to_positions:
        return query, cache, table, lengths[:, None] - seq + torch.arange(seq)
    return query, cache, table, lengths


def shapes_for(mask: Mask) -> Any:
    dims = {name: torch.export.Dim(name, min=2, max=64) for name in ("seq", "pages", "table")}
    if mask is up_to_positions:
        return {2: dims["seq"]}, {0: dims["pages"]}, {1: dims["table"]}, {1: dims["seq"]}
    return None, {0: dims["pages"]}, {1: dims["table"]}, None


def check(lowered: Lowered, output: np.ndarray, expected: Tensor, implementation: str) -> None:
    assert lowered.left_alone == ()
    assert lowered.implementations == {"paged_attention": {implementation: 1}}
    np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("pages", "mask"), WAYS)
def test_every_way_becomes_the_op_and_gathers_nothing(pages: Pages, mask: Mask, run_passes: Callable[..., Any]) -> None:
    seq = 5 if mask is up_to_positions else 1
    text = export_torch(Attention(pages, mask), *arguments_for(pages, mask, seq), dynamic_shapes=shapes_for(mask))
    assert SDPA in text
    after = run_passes(text, "match-paged-attention")
    assert after.llmir() == {"paged_attention": 1}
    assert not [name for name in after.counts if name.startswith(GATHERS)]
    [line] = [line for line in after.text.splitlines() if "torch.llmir.paged_attention" in line]
    layers = 1 if pages is index_select_of_one_layer else LAYERS
    assert f"!torch.vtensor<[?,{layers},2,{KV_HEADS},{PAGE_SIZE},{HEAD_DIM}],f16>, !torch.vtensor<[2,?],si32>" in line
    assert f"-> (!torch.vtensor<[2,{'?' if seq > 1 else 1},{HEADS},{HEAD_DIM}],f32>" in line


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("pages", "mask"), WAYS)
def test_every_way_agrees_with_torch(pages: Pages, mask: Mask, target: str, run_matched: Callable[..., Any]) -> None:
    seq = 5 if mask is up_to_positions else 1
    module = Attention(pages, mask, scale=0.3)
    text = export_torch(module, *arguments_for(pages, mask, seq), dynamic_shapes=shapes_for(mask))
    arguments = arguments_for(pages, mask, 7 if seq > 1 else 1, entries=4)
    lowered, output = run_matched(text, target, *arguments)
    check(lowered, output, module(*arguments), "cpu-kernels" if target == "llvm-cpu" else "gpu-kernels")


@pytest.mark.parametrize("target", TARGETS)
def test_bounds_past_either_end_see_what_torch_sees(target: str, run_matched: Callable[..., Any]) -> None:
    """A length larger than the table's room sees all of it, one of 0 nothing: torch gives zeros there."""
    module = Attention(select_then_index, before_lengths)
    query, cache, table, _ = arguments_for(select_then_index, before_lengths, 1)
    arguments = (query, cache, table, torch.tensor([1000, 0]))
    lowered, output = run_matched(export_torch(module, *arguments), target, *arguments)
    check(lowered, output, module(*arguments), "cpu-kernels" if target == "llvm-cpu" else "gpu-kernels")
    assert not output[1].any()


def test_a_float32_cache_and_a_table_of_int32(run_matched: Callable[..., Any]) -> None:
    module = Attention(index_with_layer, before_lengths)
    query, cache, table, lengths = arguments_for(index_with_layer, before_lengths, 1, dtype=torch.float32)
    arguments = (query, cache, table.int(), lengths.int())
    lowered, output = run_matched(export_torch(module, *arguments), "llvm-cpu", *arguments)
    check(lowered, output, module(query, cache, table, lengths), "portable")


def test_any_number_of_queries_over_a_known_number_of_pages(run_matched: Callable[..., Any]) -> None:
    module, seq = Attention(select_then_index, up_to_positions), torch.export.Dim("seq", min=2, max=64)
    shapes = ({2: seq}, None, None, {1: seq})
    text = export_torch(module, *arguments_for(select_then_index, up_to_positions, 5), dynamic_shapes=shapes)
    arguments = arguments_for(select_then_index, up_to_positions, 9)
    for implementations, name in (("best", "cpu-kernels"), ("portable", "portable")):
        lowered, output = run_matched(text, "llvm-cpu", *arguments, implementations=implementations)
        check(lowered, output, module(*arguments), name)


class Half(torch.nn.Module):
    """Attention in float16 throughout."""

    def forward(self, query: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = index_with_layer(cache, table)
        mask = before_lengths(lengths, key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def test_float16_throughout_is_computed_in_float32(run_matched: Callable[..., Any]) -> None:
    query, cache, table, lengths = arguments_for(index_with_layer, before_lengths, 1)
    arguments = (query.half(), cache, table, lengths)
    lowered, output = run_matched(export_torch(Half(), *arguments), "llvm-cpu", *arguments)
    assert (lowered.implementations, output.dtype) == ({"paged_attention": {"cpu-kernels": 1}}, np.float16)
    expected = Attention(index_with_layer, before_lengths)(query.half().float(), cache, table, lengths)
    np.testing.assert_allclose(output, expected.half().numpy(), rtol=2e-3, atol=1e-4)


class TwoLayers(torch.nn.Module):
    """Gathers the pages of both layers, attends in both, and returns the cache."""

    def forward(self, query: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        kinds = [
            [cache[:, layer, kind][table].transpose(1, 2).flatten(2, 3).float() for kind in (0, 1)] for layer in (0, 2)
        ]
        for key, value in kinds:
            mask = before_lengths(lengths, key.shape[2])
            query = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return query, cache + 1


def test_versions_of_the_cache_are_a_chain(run_passes: Callable[..., Any]) -> None:
    text = export_torch(TwoLayers(), *arguments_for(select_then_index, before_lengths, 1))
    after = run_passes(text, "match-paged-attention")
    assert after.llmir() == {"paged_attention": 2}
    first, second = [line.split() for line in after.text.splitlines() if "torch.llmir.paged_attention" in line]
    # The results are called %n:2; operand 1 of the second attention is the cache that the first one hands on.
    assert f"{first[0].removesuffix(':2')}#1," in second
    [add] = [line for line in after.text.splitlines() if "torch.aten.add.Scalar" in line]
    assert f"{second[0].removesuffix(':2')}#1," in add


# Near misses.


def swapped_kinds(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    key, value = select_then_index(cache, table)
    return value, key


def two_layers(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return select_then_index(cache, table)[0], select_then_index(cache[:, 1:], table)[1]


def tokens_before_heads(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """A cache whose pages are [page_size, kv_heads, head_dim], of as many tokens as heads."""
    key, value = (cache[:, LAYER, kind].transpose(1, 2)[table] for kind in (0, 1))
    shape = (table.shape[0], -1, PAGE_SIZE, HEAD_DIM)
    return key.reshape(*shape).transpose(1, 2)[:, :2], value.reshape(*shape).transpose(1, 2)[:, :2]


def pages_in_the_wrong_place(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Heads and pages are not exchanged before they are flattened."""
    key, value = (cache[:, LAYER, kind][table].reshape(BATCH, KV_HEADS, -1, HEAD_DIM) for kind in (0, 1))
    return key, value


def tiled_heads(cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Heads 0, 1, 0, 1 and not 0, 0, 1, 1."""
    shape = (BATCH, HEADS // KV_HEADS, KV_HEADS, -1, HEAD_DIM)
    key, value = (
        kind[:, None].expand(*shape).reshape(BATCH, HEADS, -1, HEAD_DIM) for kind in select_then_index(cache, table)
    )
    return key, value


def not_gathered(cache: Tensor, _table: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (cache[:BATCH, LAYER, kind] for kind in (0, 1))
    return key, value


def no_mask(_lengths: Tensor, _tokens: int) -> None:
    return None


def after_the_length(lengths: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens) >= lengths.view(-1, 1, 1, 1)


def from_one_on(lengths: Tensor, tokens: int) -> Tensor:
    return torch.arange(1, tokens + 1) < lengths.view(-1, 1, 1, 1)


def in_a_window(lengths: Tensor, tokens: int) -> Tensor:
    numbers = torch.arange(tokens)
    return (numbers < lengths.view(-1, 1, 1, 1)) & (numbers >= lengths.view(-1, 1, 1, 1) - 5)


def added_as_a_penalty(lengths: Tensor, tokens: int) -> Tensor:
    return torch.where(before_lengths(lengths, tokens), 0.0, -10.0)


def another_for_each_head(lengths: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens) < lengths.view(-1, 1, 1, 1) - torch.arange(HEADS).view(1, -1, 1, 1)


NEAR_MISSES = [
    (swapped_kinds, before_lengths, {}, "keys are not kind 0 and values kind 1"),
    (two_layers, before_lengths, {}, "keys and values are not"),
    (tokens_before_heads, before_lengths, {}, "keys and values are not"),
    (pages_in_the_wrong_place, before_lengths, {}, "keys and values are not"),
    (tiled_heads, before_lengths, {}, "of whole pages in the order of the table"),
    (not_gathered, before_lengths, {}, "not pages gathered from a cache"),
    (select_then_index, no_mask, {}, "it has no mask"),
    (select_then_index, no_mask, {"is_causal": True}, "is causal by itself"),
    (select_then_index, after_the_length, {}, "does not compare the numbers of all positions"),
    (select_then_index, from_one_on, {}, "from 0 on"),
    (select_then_index, in_a_window, {}, "not a comparison of positions with lengths"),
    (select_then_index, added_as_a_penalty, {}, "not 0 where a query sees and minus infinity"),
    (select_then_index, another_for_each_head, {}, "lengths"),
    (select_then_index, before_lengths, {"dropout_p": 0.5}, "it drops weights"),
]


@pytest.mark.parametrize(("pages", "mask", "options", "reason"), NEAR_MISSES)
def test_near_misses_are_left_alone_and_told(pages: Any, mask: Any, options: dict[str, Any], reason: str) -> None:
    text = export_torch(Attention(pages, mask, **options), *arguments_for(pages, mask, 1))
    lowered = lower(text, resolve_target("llvm-cpu"), match=True)
    assert lowered.implementations == {}
    assert SDPA in lowered.text
    [line] = lowered.left_alone
    assert line.startswith("scaled_dot_product_attention number 1, of queries vtensor<[2,4,1,16],f32>: ")
    assert reason in line


def test_several_tokens_that_all_see_a_whole_row_are_left_alone() -> None:
    text = export_torch(
        Attention(select_then_index, before_lengths), *arguments_for(select_then_index, before_lengths, 3)
    )
    [line] = lower(text, resolve_target("llvm-cpu"), match=True).left_alone
    assert "each query of each row a length of its own, as causal ones do" in line


def test_nothing_is_matched_unless_it_is_asked_for() -> None:
    text = export_torch(
        Attention(select_then_index, before_lengths), *arguments_for(select_then_index, before_lengths, 1)
    )
    lowered = lower(text, resolve_target("llvm-cpu"))
    assert SDPA in lowered.text
    assert (lowered.implementations, lowered.left_alone) == ({}, ())
    assert "match-paged-attention" not in lowered.passes
    without = lower(text, resolve_target("llvm-cpu"), match=True, passes=["-match-paged-attention"])
    assert without.implementations == {}
    assert "match-quantized-matmul" in without.passes
