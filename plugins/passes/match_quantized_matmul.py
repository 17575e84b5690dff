"""match-quantized-matmul: recognises a linear layer of 4-bit weights that are unpacked, shifted and scaled in place.

Before: `torch.aten.linear`, `matmul` or `mm` of float32, by scale * (code - 8), scale * (code - zero) or scale * code +
minimum, where codes are the nibbles of bytes and each scale is that of a group of columns.
After: `llmir.quantized_matmul` by the same bits in layout tile16, as q4_0 or q4_1. Where a module holds the weights, a
global of its own holds the tiles, filled when it is loaded; weights that are arguments are put into tiles in each call.

Bytes hold columns in pairs or in halves of 32, the lower nibble first; groups are of 32 columns or a multiple; scales
and minima are float16. Zero points become minima, which float16 rounds by less than 0.004 of a step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.params.layouts import GROUP, TILE16, stored_shapes
from llmir_iree.plugins.calls import read_constant
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import (
    Unlike,
    create,
    erase_assertions,
    operation_name,
    operations,
    producer,
    replace,
    tensor_type,
    torch_element,
    torch_int,
    torch_list,
    torch_str,
    torch_type,
)
from llmir_iree.plugins.portable.tiles import ZERO_ELEMENTS, NibbleOrder
from llmir_iree.plugins.tiled_weights import TiledWeights
from llmir_iree.plugins.views import CONVERSIONS, Axes, Axis, View, row_major, trace

_PRODUCTS = ("torch.aten.linear", "torch.aten.matmul", "torch.aten.mm")
_ANDS = ("torch.aten.__and__.Scalar", "torch.aten.bitwise_and.Scalar")
_SHIFTS = ("torch.aten.__rshift__.Scalar", "torch.aten.bitwise_right_shift.Tensor_Scalar")
_JOINS = ("torch.aten.stack", "torch.aten.cat")
_BY_NUMBER = ("torch.aten.sub.Scalar", "torch.aten.add.Scalar")
_TIMES, _PLUS = "torch.aten.mul.Tensor", "torch.aten.add.Tensor"

# Stands for the two nibbles of a byte among the axes of a view: the lower one first.
_NIBBLES = Axis("nibbles", 0, 1, 2)

_HALF = 16


@dataclass(frozen=True)
class Weights:
    """A matrix of 4-bit weights, and the tensors that hold it, row after row.

    Attributes:
        rows, columns: its shape.
        packed: uint8 [rows, columns / 2], columns in `order`.
        scales: float16 [rows, scale_count].
        shift: what makes minima of q4_1, or None for q4_0: the zero points, or the minima themselves.
    """

    rows: int
    columns: int
    packed: ir.Value
    order: NibbleOrder
    scale_count: int
    scales: ir.Value
    shift: tuple[Literal["zeros", "minima"], ir.Value] | None


def match_quantized_matmul(module: ir.Module, lowering: Lowering) -> None:
    """Match every product by 4-bit weights of a module, in place; what is left alone is told to the lowering."""
    erase_assertions(module)
    tiled = TiledWeights(module)
    number = 0
    for operation in operations(module, *_PRODUCTS):
        if not _is_unpacked(operation.operands[1]):
            continue
        number += 1
        try:
            weights = _match(operation)
        except (Unlike, CompileError) as reason:
            kind = str(operation.operands[1].type).removeprefix("!torch.")
            lowering.leave(f"product by unpacked weights number {number}, {kind}: {reason}")
            continue
        _rewrite(operation, weights, tiled)


def _is_unpacked(weights: ir.Value) -> bool:
    """Whether weights are computed from shifted integers, by arithmetic and views alone."""
    waiting, seen = [weights], set()
    while waiting:
        value = waiting.pop()
        if value in seen or isinstance(value.owner, ir.Block):
            continue
        seen.add(value)
        operation = value.owner.operation
        if operation_name(operation) in _SHIFTS:
            return True
        _dialect, *name = operation_name(operation).split(".")
        if name[1:2] and name[1] in _BETWEEN:
            waiting += operation.operands
    return False


# What may stand between weights and their bits; no products, or activations would count as weights.
_BETWEEN = frozenset(
    {
        *("__and__", "__rshift__", "bitwise_and", "bitwise_right_shift", "mul", "add", "sub", "rsub", "div", "pow"),
        *("stack", "cat", "ListConstruct", "to", "_to_copy", "convert_element_type", "type_as", "contiguous", "clone"),
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose"),
        *("t", "numpy_T", "expand", "slice", "select", "repeat_interleave"),
    }
)


def _match(operation: ir.Operation) -> Weights:
    x, matrix = operation.operands[0], operation.operands[1]
    is_linear = operation_name(operation) == "torch.aten.linear"
    if torch_element(x) != "f32" or torch_element(matrix) != "f32":
        raise Unlike("it is not float32 that is multiplied")
    if len(tensor_type(x).shape) not in (2, 3) or None in (tensor_type(x).shape[-1], *tensor_type(x).shape[:-2]):
        raise Unlike("activations are not [tokens, columns] or [batch, tokens, columns] with a batch that is known")
    view = trace(matrix)
    rows_axes, columns_axes = view.dims if is_linear else reversed(view.dims)
    scaled = producer(view.source, _TIMES, _PLUS)
    shape = tensor_type(view.source).shape
    if scaled is None or view.picks or len(shape) != 3 or None in shape:
        raise Unlike("weights are not scaled as [rows, groups, columns of a group]")
    rows, count, size = (extent or 0 for extent in shape)
    if not _runs(view.source, rows_axes, (count * size, rows)) or not _runs(
        view.source, columns_axes, (1, count * size)
    ):
        raise Unlike("groups of weights are not the columns of a row, in their order")
    if size % GROUP:
        raise Unlike(f"a scale is that of {size} columns, which is no multiple of {GROUP}")
    codes, scale, shift = _match_scaled(scaled)
    packed, order = _match_codes(codes, rows, count, size, shifts=1 if shift is None else 0)
    if torch_element(scale.source) != "f16":
        raise Unlike(f"scales are {torch_element(scale.source)}, not float16")
    named = {"scales": scale} if shift is None else {"scales": scale, shift[0]: shift[1]}
    for name, found in named.items():
        if not _is_grouped(found, rows, count):
            raise Unlike(f"{name} do not lie as [rows, groups]")
    if shift is not None and shift[0] == "minima" and torch_element(shift[1].source) != "f16":
        raise Unlike(f"minima are {torch_element(shift[1].source)}, not float16")
    if shift is not None and torch_element(shift[1].source) not in ZERO_ELEMENTS:
        raise Unlike(f"zero points are {torch_element(shift[1].source)}")
    return Weights(
        rows, count * size, packed, order, count, scale.source, None if shift is None else (shift[0], shift[1].source)
    )


_Shift = tuple[Literal["zeros", "minima"], View] | None


def _match_scaled(scaled: ir.Operation) -> tuple[ir.Value, View, _Shift]:
    """Codes [rows, groups, columns of a group], scales and, unless a code is 8 above its weight, a shift."""
    shift: _Shift = None
    if str(scaled.name) == _PLUS:
        if read_constant(scaled.operands[2]) != 1:
            raise Unlike("minima are not added as they are")
        product, minima = _by_size(scaled)
        times = producer(product, _TIMES)
        if times is None:
            raise Unlike("weights are not scale * code + minimum")
        codes, scales = _by_size(times)
        return codes, trace(scales), ("minima", trace(minima))
    shifted, scales = _by_size(scaled)
    # Without a zero point among the groups, the code may be shifted before it is brought to their shape.
    difference = trace(shifted).source
    by_eight = producer(difference, *_BY_NUMBER)
    if by_eight is not None:
        sign = 1 if str(by_eight.name) == "torch.aten.sub.Scalar" else -1
        if [read_constant(operand) for operand in list(by_eight.operands)[1:]] != [8 * sign, 1]:
            raise Unlike("codes are not 8 above their weights")
        if torch_element(difference) == "ui8":
            raise Unlike("codes below 8 wrap around when 8 is taken off a byte")
        return shifted, trace(scales), None
    by_zeros = producer(shifted, "torch.aten.sub.Tensor")
    if by_zeros is None or read_constant(by_zeros.operands[2]) != 1:
        raise Unlike("weights are not scale * (code - 8), scale * (code - zero) or scale * code + minimum")
    if torch_element(shifted) in ("ui8", "si8"):
        raise Unlike("zero points are taken off in 8 bits, where the difference may wrap around")
    codes, zeros = list(by_zeros.operands)[:2]
    if tensor_type(codes).shape != tensor_type(scaled.results[0]).shape:
        raise Unlike("zero points are not taken off codes, one for a group")
    shift = ("zeros", trace(zeros))
    return codes, trace(scales), shift


def _by_size(operation: ir.Operation) -> tuple[ir.Value, ir.Value]:
    """The operands of an elementwise operation: that of its result's shape, then that with one number for a group."""
    left, right = list(operation.operands)[:2]
    whole_shape = tensor_type(operation.results[0]).shape
    for large, small in ((left, right), (right, left)):
        if tensor_type(large).shape == whole_shape and tensor_type(small).shape[-1:] == (1,):
            return large, small
    raise Unlike("there is not one scale for a group of columns")


def _match_codes(codes: ir.Value, rows: int, count: int, size: int, *, shifts: int) -> tuple[ir.Value, NibbleOrder]:
    """The bytes that codes [rows, groups, columns of a group] are unpacked from, and which columns share one.

    `shifts` says how often a number is added to codes or taken off on the way.
    """
    joined, found = _find_join(codes)
    if len(found) != shifts:
        raise Unlike("codes are shifted more than once")
    listed = producer(joined.operands[0], "torch.prim.ListConstruct")
    if listed is None or len(listed.operands) != 2:
        raise Unlike("codes are not two nibbles of a byte, joined")
    known = {joined.results[0]: _join(joined, *listed.operands)}
    for shift in reversed(found):
        known[shift.results[0]] = dataclasses.replace(trace(shift.operands[0], known), largest=None)
    view = trace(codes, known)
    packed, shape = view.source, tensor_type(view.source).shape
    if torch_element(packed) != "ui8" or view.picks or None in shape or len(view.dims) != 3:
        raise Unlike("codes are not nibbles of whole rows of uint8")
    columns = (*view.dims[1], *view.dims[2])
    bytes_in_row = count * size // 2
    if not _runs(packed, view.dims[0], (bytes_in_row, rows)) or _NIBBLES not in columns:
        raise Unlike("codes are not nibbles of bytes that lie row after row")
    outer, inner_axes = columns[: columns.index(_NIBBLES)], columns[columns.index(_NIBBLES) + 1 :]
    if _runs(packed, outer, (1, bytes_in_row)) and not inner_axes:
        return packed, "pairs"
    if _runs(packed, outer, (_HALF, count * size // GROUP)) and _runs(packed, inner_axes, (1, _HALF)):
        return packed, "halves"
    raise Unlike("a byte holds neither neighbouring columns nor those 16 apart, the lower nibble first")


def _find_join(codes: ir.Value) -> tuple[ir.Operation, list[ir.Operation]]:
    """What joins the nibbles that codes are views of, and where a number is taken off on the way, the last first."""
    shifts: list[ir.Operation] = []
    source = trace(codes).source
    while (joined := producer(source, *_JOINS)) is None:
        step = producer(source, *_BY_NUMBER, *CONVERSIONS)
        if step is None:
            raise Unlike("codes are not two nibbles of a byte, joined")
        if operation_name(step) in _BY_NUMBER:
            shifts.append(step)
        source = trace(step.operands[0]).source
    return joined, shifts


def _join(joined: ir.Operation, first: ir.Value, second: ir.Value) -> View:
    """The bytes whose lower nibbles, then upper ones, a stack or a concatenation holds."""
    (low, low_view), (high, high_view) = _nibble(first), _nibble(second)
    if (low, high) != (0, 1) or low_view != high_view:
        raise Unlike("the lower nibbles of bytes do not come first, with the upper ones of the same bytes behind")
    dims = list(low_view.dims)
    is_stack = operation_name(joined) == "torch.aten.stack"
    rank = len(dims) + is_stack
    dim = read_constant(joined.operands[1])
    if not isinstance(dim, int) or not -rank <= dim < rank:
        raise Unlike("nibbles are joined along no dimension")
    dim %= rank
    if is_stack:
        dims.insert(dim, (_NIBBLES,))
    else:
        dims[dim] = (_NIBBLES, *dims[dim])
    return dataclasses.replace(low_view, dims=tuple(dims))


def _nibble(value: ir.Value) -> tuple[int, View]:
    """Which nibble of bytes a value is, 0 for the lower one, and the view of the bytes."""
    known: dict[ir.Value, View] = {}
    masked = producer(trace(value).source, *_ANDS)
    if masked is not None and read_constant(masked.operands[1]) != 15:
        raise Unlike("a mask of nibbles is not 15")
    inner = value if masked is None else masked.operands[0]
    shifted = producer(trace(inner).source, *_SHIFTS)
    if shifted is not None:
        if read_constant(shifted.operands[1]) != 4 or torch_element(shifted.operands[0]) != "ui8":
            raise Unlike("nibbles are not 4 bits of uint8")
        known[shifted.results[0]] = trace(shifted.operands[0])
    if masked is not None:
        known[masked.results[0]] = trace(inner, known)
    if masked is None and shifted is None:
        raise Unlike("codes are not nibbles of bytes")
    return (0 if shifted is None else 1), dataclasses.replace(trace(value, known), largest=15)


def _is_grouped(view: View, rows: int, count: int) -> bool:
    """Whether a view is [rows, groups, 1] of a tensor that lies row after row."""
    if len(view.dims) != 3 or view.picks or view.dims[2] or None in tensor_type(view.source).shape:
        return False
    return _runs(view.source, view.dims[0], (count, rows)) and _runs(view.source, view.dims[1], (1, count))


def _runs(source: ir.Value, axes: Axes, expected: tuple[int, int]) -> bool:
    """Whether axes are one run of a stride and an extent; of an extent of 1, none."""
    return row_major(source, axes) == ([expected] if expected[1] > 1 else [])


def _rewrite(operation: ir.Operation, weights: Weights, tiled: TiledWeights) -> None:
    x, y = operation.operands[0], operation.results[0]
    rows, columns, count = weights.rows, weights.columns, weights.scale_count
    is_matrix = len(tensor_type(x).shape) == 2
    with ir.InsertionPoint(operation), operation.location:
        planes = [tiled.scales(weights.scales, rows, count, columns)]
        if weights.shift is not None and weights.shift[0] == "zeros":
            planes.append(tiled.minima(weights.scales, weights.shift[1], rows, count, columns))
        elif weights.shift is not None:
            planes.append(tiled.scales(weights.shift[1], rows, count, columns))
        planes.append(tiled.codes(weights.packed, rows, columns, weights.order))
        weight_format = "q4_0" if weights.shift is None else "q4_1"
        assert [tensor_type(plane).shape for plane in planes] == list(
            stored_shapes(weight_format, rows, columns).values()
        )
        batched = x
        if is_matrix:
            kind = torch_type((1, *tensor_type(x).shape), "f32")
            batched = create("torch.aten.unsqueeze", (x, torch_int(0)), (kind,)).result
        product = create(
            "llmir.quantized_matmul",
            (batched, torch_list(planes, "vtensor"), torch_str(weight_format), torch_str(TILE16.name), torch_int(rows)),
            (torch_type((*tensor_type(batched).shape[:-1], rows), "f32"),),
        ).result
        if is_matrix:
            product = create("torch.aten.squeeze.dim", (product, torch_int(0)), (y.type,)).result
        bias = operation.operands[2] if operation_name(operation) == "torch.aten.linear" else None
        if bias is not None and producer(bias, "torch.constant.none") is None:
            product = create(_PLUS, (product, bias, torch_int(1)), (y.type,)).result
    replace(operation, product)
