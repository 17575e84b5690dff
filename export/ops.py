"""The `llmir` ops: the contract between the traced model and the plugin that lowers it.

Each op stands here with its schema, its eager implementation (the reference that every lowering is held to) and its
fake implementation (the shapes, for tracing). All are functional: the cache goes in and comes out, and a traced program
uses every version of it exactly once, which is what lets the compiled module update it in place.

Shapes, in the order of the dimensions:
    cache       [pages, layers, 2, kv_heads, page_size, head_dim]: dimension 2 is key, value
    page_table  int32 [batch, table]: page that holds positions i * page_size .. (i + 1) * page_size - 1 of a row
    positions   int32 [batch, seq]: position of every token; negative for padding, which is neither stored nor attended
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmir_iree.export.dequantize import matrix
from llmir_iree.params.layouts import LAYOUTS, TILE16, TILE_ROWS

NAMESPACE = "llmir"

_library = torch.library.Library(NAMESPACE, "DEF")


# append_kv: stores the keys and values of new tokens in their pages of one layer.

_library.define(
    "append_kv(Tensor cache, Tensor key, Tensor value, Tensor page_table, Tensor positions, int layer) -> Tensor"
)


def append_kv(cache: Tensor, key: Tensor, value: Tensor, page_table: Tensor, positions: Tensor, layer: int) -> Tensor:
    """Store keys and values of new tokens; rows with a negative position are dropped.

    Args:
        cache: see the module.
        key: [batch, seq, kv_heads, head_dim], converted to the cache's dtype.
        value: like `key`.
        page_table: see the module.
        positions: see the module.
        layer: which layer's part of each page to write.

    Returns:
        The cache with the new tokens in it.
    """
    cache = cache.clone()
    page_size = cache.shape[4]
    rows, columns = torch.nonzero(positions >= 0, as_tuple=True)
    position = positions[rows, columns].long()
    page = page_table[rows, position // page_size].long()
    for kind, new in enumerate((key, value)):
        cache[page, layer, kind, :, position % page_size] = new[rows, columns].to(cache.dtype)
    return cache


@torch.library.register_fake("llmir::append_kv", lib=_library)
def _(cache: Tensor, key: Tensor, value: Tensor, page_table: Tensor, positions: Tensor, layer: int) -> Tensor:
    _expect(cache.dim() == 6, f"append_kv: cache must have 6 dimensions, it has {tuple(cache.shape)}")
    expected = (cache.shape[3], cache.shape[5])
    for name, new in (("key", key), ("value", value)):
        _expect(
            tuple(new.shape[2:]) == expected,
            f"append_kv: {name} must end in (kv_heads, head_dim) = {expected}, it has {tuple(new.shape)}",
        )
    return torch.empty_like(cache)


# paged_attention: causal attention of new tokens over all that is stored, grouped heads, one layer.

_library.define(
    "paged_attention(Tensor query, Tensor cache, Tensor page_table, Tensor positions, int layer, float scale, "
    "int window, float softcap) -> (Tensor, Tensor)"
)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend from new tokens, already stored, to every position up to their own.

    Args:
        query: float32 [batch, seq, heads, head_dim]; heads is a multiple of the cache's kv_heads.
        cache: see the module. Nothing read through a padded entry of the table reaches the result, NaN included.
        page_table: see the module.
        positions: see the module. Tokens with a negative position get zeros.
        layer: which layer's part of each page to read.
        scale: factor on the scores.
        window: how many positions, the token's own included, it may see; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.

    Returns:
        float32 [batch, seq, heads, head_dim], and the cache, unchanged.
    """
    batch, seq, heads, head_dim = query.shape
    kv_heads = cache.shape[3]
    output = torch.zeros_like(query)
    for row in range(batch):
        pages = cache[page_table[row].long(), layer]
        keys, values = pages.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim).float()
        for column in range(seq):
            position = int(positions[row, column])
            if position < 0:
                continue
            first = max(0, position + 1 - window) if window else 0
            visible = slice(first, position + 1)
            grouped = query[row, column].reshape(kv_heads, heads // kv_heads, head_dim)
            scores = torch.einsum("hgd,htd->hgt", grouped, keys[:, visible]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(scores, dim=-1)
            output[row, column] = torch.einsum("hgt,htd->hgd", weights, values[:, visible]).reshape(heads, head_dim)
    return output, cache.clone()


@torch.library.register_fake("llmir::paged_attention", lib=_library)
def _(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    heads, kv_heads = query.shape[2], cache.shape[3]
    _expect(
        heads % kv_heads == 0,
        f"paged_attention: query has {heads} heads, not a multiple of the cache's {kv_heads}",
    )
    return torch.empty_like(query), torch.empty_like(cache)


# quantized_matmul: a linear layer whose weights are stored in blocks.

_library.define("quantized_matmul(Tensor x, Tensor[] planes, str format, str layout, int out_features) -> Tensor")


def quantized_matmul(
    x: Tensor,
    planes: Sequence[Tensor],
    format: str,  # noqa: A002
    layout: str,
    out_features: int,
) -> Tensor:
    """Multiply activations with a matrix of packed weights.

    Args:
        x: float32 [..., in_features].
        planes: the weights, the planes of `llmir_iree.params.FORMATS[format]` in its order.
        format: name of the weight format.
        layout: how the planes of an [out_features, in_features] matrix are ordered, "planes" or "tile16"; see
            `llmir_iree.params.layouts`. A compiled op reads each format in the layout that archives have it in.
        out_features: rows of the matrix; tiles may hold more.

    Returns:
        float32 [..., out_features].
    """
    return x @ matrix(format, layout, planes, out_features).T


@torch.library.register_fake("llmir::quantized_matmul", lib=_library)
def _(x: Tensor, planes: Sequence[Tensor], format: str, layout: str, out_features: int) -> Tensor:  # noqa: A002
    _expect(layout in LAYOUTS, f"quantized_matmul: layout {layout!r} is none of {', '.join(LAYOUTS)}")
    unit = f"tiles of {TILE_ROWS} rows" if layout == TILE16.name else "rows"
    needed = -(-out_features // TILE_ROWS) if layout == TILE16.name else out_features
    _expect(
        planes[0].shape[0] == needed,
        f"quantized_matmul: planes have {planes[0].shape[0]} {unit}, out_features is {out_features}",
    )
    return x.new_empty(*x.shape[:-1], out_features)


for _op in (append_kv, paged_attention, quantized_matmul):
    _library.impl(_op.__name__, _op, "CPU")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
