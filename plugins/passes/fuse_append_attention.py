"""fuse-append-attention: lets the attention kernels rotate queries and keys, and take them where a matmul left them.

Before: heads are split off and transposed, queries and keys rotated, then `llmir.append_kv`, `llmir.paged_attention`.
After: where one token a row is new, `llmir.rope_append_attend`, which does all of that; where more are, and a query may
need the key of another new token, `llmir.rope_append` and `llmir.rope_attend`.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.plugins.calls import Constant, Site, find_calls, read_constant
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import create, only_user, producer, replace, tensor_type
from llmir_iree.plugins.passes.fold_silu_mul import LAST
from llmir_iree.plugins.seam import choose


@dataclass(frozen=True)
class _Heads:
    """Heads [batch, seq, heads, head_dim] as columns of a tensor [batch, seq, width], from `first` on."""

    tensor: ir.Value
    first: int


@dataclass(frozen=True)
class _Rotated:
    """Heads after the rotary embedding by cos and sin [batch, seq, head_dim]."""

    heads: _Heads
    cos: ir.Value
    sin: ir.Value


def fuse_append_attention(module: ir.Module, lowering: Lowering) -> None:
    """Fuse every append with the attention that follows, in place.

    Raises:
        CompileError: an op without an implementation for the target.
    """
    append: Site | None = None
    for site in find_calls(module):
        if site.call.op == "append_kv":
            append = site
        elif site.call.op == "paged_attention" and append is not None:
            if choose(append.call, lowering).has_fused_forms and choose(site.call, lowering).has_fused_forms:
                _fuse(append, site)
            append = None


def _fuse(append: Site, attend: Site) -> None:
    cache, key, value, table, positions = append.tensors
    query, appended, *where = attend.tensors
    flat = only_user(attend.operation.results[0], "torch.aten.view")
    if appended != append.operation.results[0] or where != [table, positions] or flat is None:
        return
    keys, queries, values = _match_rotated(key), _match_rotated(query), _match_heads(value, is_transposed=True)
    if keys is None or queries is None or values is None or (keys.cos, keys.sin) != (queries.cos, queries.sin):
        return
    if append.call.layer != attend.call.layer or only_user(appended, "llmir.paged_attention") is None:
        return
    batch, seq, heads, head_dim = attend.call.operands[0].shape
    if tensor_type(flat.results[0]).shape != (batch, seq, (heads or 0) * (head_dim or 0)):
        return

    shape: dict[str, Constant] = {"layer": int(append.call.layer or 0), "heads": heads or 0}
    shape["kv_heads"] = append.call.operands[1].shape[2] or 0
    key_columns: dict[str, Constant] = {"k_first": keys.heads.first, "v_first": values.first}
    query_columns: dict[str, Constant] = {"q_first": queries.heads.first}
    scores = {name: attend.call.constant(name) for name in ("scale", "window", "softcap")}
    rotation = (keys.cos, keys.sin)
    stored, output = append.operation.results[0].type, flat.results[0].type
    with ir.InsertionPoint(attend.operation), attend.operation.location:
        if seq == 1:
            fused = create(
                "llmir.rope_append_attend",
                (cache, queries.heads.tensor, keys.heads.tensor, values.tensor, table, positions, *rotation),
                (output, stored),
                {**shape, **query_columns, **key_columns, **scores},
            )
        else:
            filled = create(
                "llmir.rope_append",
                (cache, keys.heads.tensor, values.tensor, table, positions, *rotation),
                (stored,),
                {**shape, **key_columns},
            )
            fused = create(
                "llmir.rope_attend",
                (queries.heads.tensor, filled.result, table, positions, *rotation),
                (output, stored),
                {**shape, **query_columns, **scores},
            )
    attend.operation.results[1].replace_all_uses_with(fused.results[1])
    replace(flat, fused.results[0])


def _match_rotated(value: ir.Value) -> _Rotated | None:
    """The rotary embedding x * cos + rotate_half(x) * sin, transposed to [batch, seq, heads, head_dim]."""
    transposed = producer(value, "torch.aten.transpose.int")
    both = None if transposed is None else producer(transposed.operands[0], "torch.aten.add.Tensor")
    if transposed is None or both is None or not _swaps_heads(transposed):
        return None
    straight, crossed = (producer(operand, "torch.aten.mul.Tensor") for operand in list(both.operands)[:2])
    if straight is None or crossed is None or read_constant(both.operands[2]) != 1:
        return None
    x = straight.operands[0]
    cos, sin = _match_factor(straight.operands[1]), _match_factor(crossed.operands[1])
    heads = _match_heads(x)
    if cos is None or sin is None or heads is None or not _rotates_half(crossed.operands[0], x):
        return None
    *rows, _, head_dim = tensor_type(value).shape
    is_whole = all(tensor_type(factor).shape == (*rows, head_dim) for factor in (cos, sin))
    return _Rotated(heads, cos, sin) if is_whole else None


def _rotates_half(value: ir.Value, x: ir.Value) -> bool:
    """Whether a value is cat(-x[half:], x[:half]) along the last dimension."""
    joined = producer(value, "torch.aten.cat")
    built = None if joined is None else producer(joined.operands[0], "torch.prim.ListConstruct")
    if joined is None or built is None or len(built.operands) != 2 or read_constant(joined.operands[1]) not in (-1, 3):
        return False
    negated, low = producer(built.operands[0], "torch.aten.neg"), producer(built.operands[1], "torch.aten.slice.Tensor")
    high = None if negated is None else producer(negated.operands[0], "torch.aten.slice.Tensor")
    if low is None or high is None or low.operands[0] != x or high.operands[0] != x:
        return False
    head_dim = tensor_type(x).shape[3] or 0
    halves = [[read_constant(bound) for bound in list(half.operands)[1:]] for half in (low, high)]
    return halves[0] == [3, 0, head_dim // 2, 1] and halves[1] in (
        [3, head_dim // 2, LAST, 1],
        [3, head_dim // 2, head_dim, 1],
    )


def _match_factor(value: ir.Value) -> ir.Value | None:
    """[batch, seq, head_dim], which stands here for all heads."""
    spread = producer(value, "torch.aten.unsqueeze")
    return spread.operands[0] if spread is not None and read_constant(spread.operands[1]) == 1 else None


def _match_heads(value: ir.Value, *, is_transposed: bool = False) -> _Heads | None:
    """Heads in front of tokens, or behind them if `is_transposed`, that a tensor of columns was split into."""
    for _ in range(2 if is_transposed else 1):
        transposed = producer(value, "torch.aten.transpose.int")
        if transposed is None or not _swaps_heads(transposed):
            return None
        value = transposed.operands[0]
    split = producer(value, "torch.aten.view")
    if split is None or len(tensor_type(split.operands[0]).shape) != 3:
        return None
    columns = split.operands[0]
    part = producer(columns, "torch.aten.slice.Tensor")
    if part is not None:
        dimension, first, _, step = (read_constant(bound) for bound in list(part.operands)[1:])
        if (dimension, step) == (2, 1) and isinstance(first, int):
            return _Heads(part.operands[0], first)
    return _Heads(columns, 0)


def _swaps_heads(transposed: ir.Operation) -> bool:
    return [read_constant(dimension) for dimension in list(transposed.operands)[1:]] == [1, 2]
