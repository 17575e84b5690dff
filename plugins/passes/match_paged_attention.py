"""match-paged-attention: recognises torch's attention over pages that were gathered from a paged cache.

Before: `torch.aten.scaled_dot_product_attention` of keys and values that are views of one tensor, indexed by a table.
After: `llmir.paged_attention` of that tensor, by the table and the positions that the mask compares with.

The cache is [pages, layers, 2, kv_heads, page_size, head_dim], or the same without layers, and the table is [batch,
table], however the program selects, gathers and reshapes; key heads may be repeated for the query heads of their group.
The mask is a comparison, `numbers < lengths` or `numbers <= positions`, or is 0 where that holds and minus infinity
elsewhere. Every later reader of the cache reads what the op hands on, so that versions of it stay a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import read_constant
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import (
    Unlike,
    convert,
    create,
    erase_assertions,
    none,
    operations,
    producer,
    replace,
    tensor_type,
    torch_element,
    torch_int,
    torch_list,
    torch_type,
)
from llmir_iree.plugins.views import REPEATED, Axes, Axis, View, row_major, trace, whole

ATTENTION = "torch.aten.scaled_dot_product_attention"

# Comparisons that show a position, with the number of the position on the left or on the right; whether the bound
# itself is shown.
_LEFT = {"torch.aten.lt.Tensor": False, "torch.aten.le.Tensor": True}
_RIGHT = {"torch.aten.gt.Tensor": False, "torch.aten.ge.Tensor": True}

_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class _Cache:
    """A cache, which of its layers is read, and the table that says which pages."""

    tensor: ir.Value
    layer: int
    table: ir.Value

    @property
    def shape(self) -> tuple[int | None, ...]:
        """As [pages, layers, 2, kv_heads, page_size, head_dim]."""
        pages, *layer = tensor_type(self.tensor).shape
        return (pages, *layer) if len(layer) == 5 else (pages, 1, *layer)


@dataclass(frozen=True)
class _Bound:
    """A tensor of [batch, seq] numbers in row-major order, and whether a token sees the position of its number too."""

    tensor: ir.Value
    is_shown: bool


def match_paged_attention(module: ir.Module, lowering: Lowering) -> None:
    """Match every attention of a module, in place; what is left alone is told to the lowering, with the reason."""
    erase_assertions(module)
    newest: dict[ir.Value, ir.Value] = {}
    for number, operation in enumerate(operations(module, ATTENTION), start=1):
        try:
            cache, bound, scale = _match(operation)
        except (Unlike, CompileError) as reason:
            kind = str(operation.operands[0].type).removeprefix("!torch.")
            lowering.leave(f"scaled_dot_product_attention number {number}, of queries {kind}: {reason}")
            continue
        _rewrite(operation, cache, bound, scale, newest)


def _match(operation: ir.Operation) -> tuple[_Cache, _Bound, float]:
    query, key, value, mask, dropout, is_causal, scale, _enable_gqa = operation.operands
    batch, heads, seq, head_dim = _query_shape(query)
    if read_constant(dropout) != 0.0 or read_constant(is_causal) != 0:
        raise Unlike("it drops weights, or is causal by itself, not by a mask")
    if torch_element(key) != torch_element(query) or torch_element(value) != torch_element(query):
        raise Unlike("keys and values are not of the queries' type")
    factor = head_dim**-0.5 if producer(scale, "torch.constant.none") else read_constant(scale)
    if not isinstance(factor, float):
        raise Unlike("the scale is not a constant")
    cache = _match_pages(trace(key), 0, batch, heads)
    if cache != _match_pages(trace(value), 1, batch, heads):
        raise Unlike("keys and values are not of one cache, one layer and one table")
    return cache, _match_mask(mask, batch, seq), factor


def _query_shape(query: ir.Value) -> tuple[int, int, int | None, int]:
    shape = tensor_type(query).shape
    if len(shape) != 4 or torch_element(query) not in _FLOATS:
        raise Unlike("queries are not floats [batch, heads, seq, head_dim]")
    batch, heads, seq, head_dim = shape
    if batch is None or heads is None or head_dim is None:
        raise Unlike("batch, heads or head_dim of the queries is not known")
    return batch, heads, seq, head_dim


def _match_pages(view: View, kind: int, batch: int, heads: int) -> _Cache:
    """The cache whose keys (kind 0) or values (kind 1) a view [batch, heads, tokens, head_dim] is."""
    source, rank = view.source, len(tensor_type(view.source).shape)
    table = view.picks.get(0)
    if rank not in (5, 6) or not isinstance(table, ir.Value):
        raise Unlike(
            "keys and values are not pages gathered from a cache [pages, layers, 2, kv_heads, page_size, head_dim]"
        )
    *_, two, kv_heads, page_size, head_dim = tensor_type(source).shape
    if two != 2 or None in (kv_heads, page_size, head_dim) or torch_element(source) not in _FLOATS:
        raise Unlike("the cache is not floats [pages, layers, 2, kv_heads, page_size, head_dim]")
    layers = tensor_type(source).shape[1] if rank == 6 else 1
    picks = {dim: index for dim, index in view.picks.items() if dim != 0}
    layer = picks.pop(1, 0 if layers == 1 else None) if rank == 6 else 0
    if picks != {rank - 4: kind} or not isinstance(layer, int):
        raise Unlike("keys are not kind 0 and values kind 1 of one layer of the cache")
    if len(tensor_type(table).shape) != 2 or tensor_type(table).shape[0] != batch:
        raise Unlike("the table is not [batch, table]")
    assert kv_heads is not None
    repeats = heads // kv_heads
    group: Axes = (Axis(REPEATED, 0, 1, repeats),) if repeats > 1 else ()
    ungrouped = (
        whole(table, 0),
        whole(source, rank - 3),
        (*whole(table, 1), *whole(source, rank - 2)),
        whole(source, rank - 1),
    )
    grouped = (ungrouped[0], (*ungrouped[1], *group), *ungrouped[2:])
    # scaled_dot_product_attention itself checks that heads are as many, or a multiple with enable_gqa.
    if heads % kv_heads or view.dims not in (ungrouped, grouped):
        raise Unlike(
            "keys and values are not [batch, heads, tokens, head_dim] of whole pages in the order of the table"
        )
    return _Cache(source, layer, table)


def _match_mask(mask: ir.Value, batch: int, seq: int | None) -> _Bound:
    """What the numbers of positions are compared with, in a mask [batch, 1, seq, tokens] or one that is broadcast."""
    if producer(mask, "torch.constant.none"):
        raise Unlike("it has no mask: every query sees all that the pages hold")
    chosen = producer(mask, "torch.aten.where.Scalar")
    if chosen is not None:
        shown, hidden = (read_constant(operand) for operand in list(chosen.operands)[1:])
        if shown != 0 or hidden != float("-inf"):
            raise Unlike("the mask is not 0 where a query sees and minus infinity elsewhere")
        mask = chosen.operands[0]
    view = trace(mask)
    comparison = producer(view.source, *_LEFT, *_RIGHT)
    if comparison is None or view.picks or torch_element(mask) != "i1":
        raise Unlike("the mask is not a comparison of positions with lengths")
    name, (left, right) = str(comparison.name), list(comparison.operands)[:2]
    numbers, bound = (left, right) if name in _LEFT else (right, left)
    where = _spread(numbers, view)
    source = trace(numbers).source
    if where[:3] != [(), (), ()] or where[3] != whole(source, 0) or not where[3] or not _counts_from_zero(source):
        raise Unlike("the mask does not compare the numbers of all positions, from 0 on, with lengths")
    rows, heads, columns, tokens = _spread(bound, view)
    source = trace(bound).source
    if heads or tokens or trace(bound).picks or torch_element(source) not in ("si32", "si64"):
        raise Unlike("the mask's lengths are not integers, one for a row or one for a query")
    if _extent(rows) != batch or _extent(columns) != seq or not _is_all_of(source, (*rows, *columns)):
        raise Unlike("the mask does not give each query of each row a length of its own, as causal ones do")
    return _Bound(source, {**_LEFT, **_RIGHT}[name])


def _spread(operand: ir.Value, mask: View) -> list[Axes]:
    """What an operand of a comparison runs along in each of the four dimensions of a mask that views the comparison."""
    result = mask.source
    axes = trace(operand).dims
    padded = [()] * (len(tensor_type(result).shape) - len(axes)) + list(axes)
    spread: list[Axes] = [()] * (4 - len(mask.dims))
    for dim in mask.dims:
        if not dim:
            spread.append(())
            continue
        [axis, *others] = dim
        if others or dim != whole(result, axis.dim):
            raise Unlike("the mask is a comparison, but not in the order of its dimensions")
        spread.append(padded[axis.dim])
    return spread


def _counts_from_zero(value: ir.Value) -> bool:
    """Whether a tensor holds 0, 1, 2 and so on."""
    counted = producer(value, "torch.aten.arange", "torch.aten.arange.start", "torch.aten.arange.start_step")
    if counted is None or torch_element(value) not in ("si32", "si64"):
        return False
    starts = str(counted.name) == "torch.aten.arange" or read_constant(counted.operands[0]) == 0
    return starts and (not str(counted.name).endswith("step") or read_constant(counted.operands[2]) == 1)


def _extent(axes: Axes) -> int | None:
    extent = 1
    for axis in axes:
        if axis.extent is None:
            return None
        extent *= axis.extent
    return extent


def _is_all_of(source: ir.Value, axes: Axes) -> bool:
    """Whether axes run through all of a tensor in its own order."""
    everything = tuple(axis for dim in range(len(tensor_type(source).shape)) for axis in whole(source, dim))
    return axes == everything or (
        None not in tensor_type(source).shape and _runs(source, axes) == _runs(source, everything)
    )


def _runs(source: ir.Value, axes: Axes) -> list[tuple[int, int]] | None:
    return row_major(source, axes)


def _rewrite(
    operation: ir.Operation, cache: _Cache, bound: _Bound, scale: float, newest: dict[ir.Value, ir.Value]
) -> None:
    query = operation.operands[0]
    batch, heads, seq, head_dim = tensor_type(query).shape
    element = torch_element(query)
    with ir.InsertionPoint(operation), operation.location:
        current = newest.get(cache.tensor, cache.tensor)
        paged = current
        if len(tensor_type(current).shape) == 5:
            layered = torch_type(cache.shape, torch_element(current))
            paged = create("torch.aten.unsqueeze", (current, torch_int(1)), (layered,)).result
        turned = create(
            "torch.aten.transpose.int",
            (convert(query, "f32"), torch_int(1), torch_int(2)),
            (torch_type((batch, seq, heads, head_dim), "f32"),),
        ).result
        table = convert(cache.table, "si32")
        operands = (turned, paged, table, _positions(cache, bound, batch, seq))
        constants = (
            torch_int(cache.layer),
            create("torch.constant.float", (), (ir.Type.parse("!torch.float"),), {"value": scale}).result,
            torch_int(0),
            create("torch.constant.float", (), (ir.Type.parse("!torch.float"),), {"value": 0.0}).result,
        )
        attention = create("llmir.paged_attention", (*operands, *constants), (turned.type, paged.type))
        attended, updated = attention.results
        back = create(
            "torch.aten.transpose.int",
            (attended, torch_int(1), torch_int(2)),
            (torch_type((batch, heads, seq, head_dim), "f32"),),
        ).result
        output = convert(back, element)
        if len(tensor_type(current).shape) == 5:
            updated = create("torch.aten.squeeze.dim", (updated, torch_int(1)), (current.type,)).result
    for use in list(current.uses):
        user = use.owner.operation
        if user.block == operation.block and operation.is_before_in_block(user):
            user.operands[use.operand_number] = updated
    newest[cache.tensor] = newest[updated] = updated
    replace(operation, output)


def _positions(cache: _Cache, bound: _Bound, batch: int | None, seq: int | None) -> ir.Value:
    """int32 [batch, seq]: the last position that a token sees, where the table has that many."""
    element = torch_element(bound.tensor)
    shape = torch_list([torch_int(batch or 0), torch_int(-1 if seq is None else seq)], "int")
    kind = torch_type((batch, seq), element)
    last = create("torch.aten.view", (bound.tensor, shape), (kind,)).result
    if not bound.is_shown:
        last = create("torch.aten.sub.Scalar", (last, torch_int(1), torch_int(1)), (kind,)).result
    integer = ir.Type.parse("!torch.int")
    entries = create("torch.aten.size.int", (cache.table, torch_int(1)), (integer,)).result
    room = create("torch.aten.mul.int", (entries, torch_int(cache.shape[4] or 0)), (integer,)).result
    most = create("torch.aten.sub.int", (room, torch_int(1)), (integer,)).result
    held = create("torch.aten.clamp", (last, none(), most), (kind,)).result
    return convert(held, "si32")
