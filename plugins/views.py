"""Follows a torch tensor back through views of it: whose elements it has, and where along which of its dimensions.

A program may select, permute, flatten and unflatten in many ways and mean the same thing. So passes that look for a
meaning do not compare operations one by one: they ask which dimensions of the source a value runs along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from iree.compiler import ir

from llmir_iree.plugins.calls import read_constant
from llmir_iree.plugins.matching import constants, operation_name, producer, tensor_type, torch_element

REPEATED = "repeated"
"""Names an axis along which nothing changes."""


@dataclass(frozen=True)
class Axis:
    """A run of steps along one dimension of a tensor; of a length that is not known, all of the dimension.

    What no tensor has, has a name instead.
    """

    tensor: ir.Value | str
    dim: int
    stride: int
    extent: int | None


Axes = tuple[Axis, ...]
"""What a dimension runs along, outer before inner; a dimension of size 1 runs along nothing."""


@dataclass(frozen=True)
class View:
    """A value whose elements are those of a source.

    Attributes:
        source: where the elements come from, converted at most to a type that holds all values of theirs.
        dims: what each dimension of the value runs along.
        picks: of each dimension of the source that is indexed, the index, or the tensor that holds it.
        largest: where it is known of elements that are not negative, the largest that they may be.
    """

    source: ir.Value
    dims: tuple[Axes, ...]
    picks: Mapping[int, int | ir.Value] = field(default_factory=dict)
    largest: int | None = None


Known = Mapping[ir.Value, View]
"""Values that are taken for views, whatever makes them."""


def whole(value: ir.Value, dim: int) -> Axes:
    """What a dimension of a tensor runs along, seen from the tensor itself."""
    extent = tensor_type(value).shape[dim]
    return () if extent == 1 else (Axis(value, dim, 1, extent),)


def trace(value: ir.Value, known: Known | None = None) -> View:
    """The view that a value is; of itself, if nothing is known of the operation that makes it.

    Raises:
        CompileError: a tensor on the way has no rank.
    """
    known = known or {}
    if value in known:
        return known[value]
    if not isinstance(value.owner, ir.Block):
        operation = value.owner.operation
        step = _STEPS.get(operation_name(operation))
        traced = None if step is None else step(operation, value, known)
        if traced is not None:
            return traced
    return View(value, tuple(whole(value, dim) for dim in range(len(tensor_type(value).shape))))


def row_major(source: ir.Value, axes: Axes) -> list[tuple[int, int]] | None:
    """Strides, in elements of a source of known shape, and extents of what axes run along, with as few as can be.

    None if some of it does not lie in the source.
    """
    shape = tensor_type(source).shape
    runs: list[tuple[int, int]] = []
    for axis in axes:
        inner = _product(shape[axis.dim + 1 :])
        if axis.tensor != source or axis.extent is None or inner is None:
            return None
        stride = axis.stride * inner
        if runs and runs[-1][0] == stride * axis.extent:
            runs[-1] = (stride, runs[-1][1] * axis.extent)
        else:
            runs.append((stride, axis.extent))
    return runs


def regroup(dims: Sequence[Axes], shape: Sequence[int | None]) -> tuple[Axes, ...] | None:
    """The same axes in the same order, as a tensor of another shape has them; None where that cannot be told.

    At most one dimension may be of unknown size: it takes what is left.
    """
    axes = [axis for dim in dims for axis in dim]
    unknown = [index for index, extent in enumerate(shape) if extent is None]
    if len(unknown) > 1:
        return None
    first = unknown[0] if unknown else len(shape)
    front = _take(axes, shape[:first], from_back=False)
    if front is None:
        return None
    if not unknown:
        return None if axes else tuple(front)
    back = _take(axes, shape[first + 1 :], from_back=True)
    return None if back is None else (*front, tuple(axes), *back)


def _take(axes: list[Axis], shape: Sequence[int | None], *, from_back: bool) -> list[Axes] | None:
    """Take the axes of some dimensions of known sizes off one end of a list."""
    taken: list[Axes] = []
    for extent in reversed(shape) if from_back else shape:
        dim: list[Axis] = []
        left = extent or 1
        while left > 1:
            if not axes:
                return None
            axis = axes.pop(-1 if from_back else 0)
            if axis.extent is None:
                return None
            if axis.extent <= left:
                if left % axis.extent:
                    return None
                part = axis
            elif axis.extent % left:
                return None
            else:
                rest = axis.extent // left
                outer = replace(axis, stride=axis.stride * (left if from_back else rest), extent=0)
                if from_back:
                    axes.append(replace(outer, extent=rest))
                    part = replace(axis, extent=left)
                else:
                    axes.insert(0, replace(axis, extent=rest))
                    part = replace(outer, extent=left)
            dim.insert(0 if from_back else len(dim), part)
            left //= part.extent or 1
        taken.insert(0 if from_back else len(taken), tuple(dim))
    return taken


def _product(shape: Sequence[int | None]) -> int | None:
    product = 1
    for extent in shape:
        if extent is None:
            return None
        product *= extent
    return product


# One function an operation: what its result is a view of, or None if that cannot be told.

_Step = Callable[[ir.Operation, ir.Value, Known], View | None]


def _same(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    return trace(operation.operands[0], known)


def _reshaped(operation: ir.Operation, value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    dims = regroup(view.dims, tensor_type(value).shape)
    return None if dims is None else replace(view, dims=dims)


def _unsqueezed(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    dim = _constant_dimension(operation.operands[1], len(view.dims) + 1)
    return None if dim is None else replace(view, dims=(*view.dims[:dim], (), *view.dims[dim:]))


def _flattened(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    first, last = (_constant_dimension(operand, len(view.dims)) for operand in list(operation.operands)[1:])
    if first is None or last is None or last < first:
        return None
    joined = tuple(axis for dim in view.dims[first : last + 1] for axis in dim)
    return replace(view, dims=(*view.dims[:first], joined, *view.dims[last + 1 :]))


def _converted(operation: ir.Operation, value: ir.Value, known: Known) -> View | None:
    before, after = torch_element(operation.operands[0]), torch_element(value)
    view = trace(operation.operands[0], known)
    is_small = view.largest is not None and view.largest <= _LARGEST_BYTE
    return view if before == after or is_small or after in _WIDER.get(before, ()) else None


def _permuted(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    order = [_dimension(dim, len(view.dims)) for dim in constants(operation.operands[1])]
    if None in order or sorted(order, key=str) != sorted(range(len(view.dims)), key=str):
        return None
    return replace(view, dims=tuple(view.dims[dim] for dim in order if dim is not None))


def _transposed(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    pair = [_constant_dimension(operand, len(view.dims)) for operand in list(operation.operands)[1:]] or [0, 1]
    one, other = pair
    if one is None or other is None or len(view.dims) < 2 or (len(operation.operands) == 1 and len(view.dims) > 2):
        return None
    dims = list(view.dims)
    dims[one], dims[other] = dims[other], dims[one]
    return replace(view, dims=tuple(dims))


def _selected(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    dim, index = _constant_dimension(operation.operands[1], len(view.dims)), read_constant(operation.operands[2])
    return None if dim is None or not isinstance(index, int) else _pick(view, dim, index)


def _unbound(operation: ir.Operation, value: ir.Value, known: Known) -> View | None:
    owner = operation.operands[0].owner
    if isinstance(owner, ir.Block) or operation_name(owner.operation) != "torch.aten.unbind.int":
        return None
    view = trace(owner.operation.operands[0], known)
    dim = _constant_dimension(owner.operation.operands[1], len(view.dims))
    return None if dim is None else _pick(view, dim, list(operation.results).index(value))


def _pick(view: View, dim: int, index: int) -> View | None:
    """The view without a dimension, at an index along it."""
    axes = view.dims[dim]
    source = tensor_type(view.source).shape
    if len(axes) > 1:
        return None
    dims = (*view.dims[:dim], *view.dims[dim + 1 :])
    if not axes:  # There is but one, and the source's own dimensions of size 1 need no index.
        return replace(view, dims=dims)
    [axis] = axes
    if axis != Axis(view.source, axis.dim, 1, source[axis.dim]) or axis.extent is None:
        return None
    index += axis.extent if index < 0 else 0
    return replace(view, dims=dims, picks={**view.picks, axis.dim: index}) if 0 <= index < axis.extent else None


def _indexed(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    listed = producer(operation.operands[1], "torch.prim.ListConstruct")
    indices = {} if listed is None else {dim: index for dim, index in enumerate(listed.operands) if not _is_none(index)}
    if len(indices) != 1:
        return None
    [(dim, index)] = indices.items()
    return _gather(trace(operation.operands[0], known), dim, index, known)


def _index_selected(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    dim = _constant_dimension(operation.operands[1], len(view.dims))
    return None if dim is None else _gather(view, dim, operation.operands[2], known)


def _gather(view: View, dim: int, index: ir.Value, known: Known) -> View | None:
    """The view with a dimension indexed by a tensor, whose own dimensions take its place."""
    axes, indices = view.dims[dim], trace(index, known)
    extent = tensor_type(view.source).shape
    if len(axes) != 1 or indices.picks or torch_element(index) not in ("si32", "si64"):
        return None
    [axis] = axes
    if axis != Axis(view.source, axis.dim, 1, extent[axis.dim]):
        return None
    dims = (*view.dims[:dim], *indices.dims, *view.dims[dim + 1 :])
    return replace(view, dims=dims, picks={**view.picks, axis.dim: indices.source})


def _expanded(operation: ir.Operation, value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    before, after = tensor_type(operation.operands[0]).shape, tensor_type(value).shape
    dims: list[Axes] = [() for _ in after]
    for dim in range(len(after)):
        old = dim - (len(after) - len(before))
        if old >= 0 and before[old] != 1:
            dims[dim] = view.dims[old]
        elif after[dim] != 1:
            dims[dim] = (Axis(REPEATED, 0, 1, after[dim]),)
    return replace(view, dims=tuple(dims))


def _repeated(operation: ir.Operation, _value: ir.Value, known: Known) -> View | None:
    view = trace(operation.operands[0], known)
    repeats, dim = read_constant(operation.operands[1]), _constant_dimension(operation.operands[2], len(view.dims))
    if not isinstance(repeats, int) or repeats < 1 or dim is None:
        return None
    added = () if repeats == 1 else (Axis(REPEATED, 0, 1, repeats),)
    return replace(view, dims=(*view.dims[:dim], (*view.dims[dim], *added), *view.dims[dim + 1 :]))


def _is_none(value: ir.Value) -> bool:
    return producer(value, "torch.constant.none") is not None


def _constant_dimension(operand: ir.Value, rank: int) -> int | None:
    return _dimension(read_constant(operand), rank)


def _dimension(number: object, rank: int) -> int | None:
    """A dimension that torch counts from either end."""
    if not isinstance(number, int) or not -rank <= number < rank:
        return None
    return number % rank


# What any type of numbers holds.
_LARGEST_BYTE = 127

# What holds every value of a type.
_WIDER = {
    "f16": ("f32", "f64"),
    "bf16": ("f32", "f64"),
    "f32": ("f64",),
    "ui8": ("si16", "si32", "si64", "f16", "bf16", "f32", "f64"),
    "si8": ("si16", "si32", "si64", "f16", "bf16", "f32", "f64"),
    "si16": ("si32", "si64", "f32", "f64"),
    "si32": ("si64", "f64"),
}

CONVERSIONS = (
    "torch.aten.to.dtype",
    "torch.prims.convert_element_type",
    "torch.aten._to_copy",
    "torch.aten.type_as",
)
"""Operations whose results are their first operand with another element type."""

_STEPS: dict[str, _Step] = {
    **dict.fromkeys(
        (
            "torch.aten.view",
            "torch.aten.reshape",
            "torch.aten._unsafe_view",
            "torch.aten._reshape_alias",
            "torch.aten.squeeze.dim",
            "torch.aten.unflatten.int",
        ),
        _reshaped,
    ),
    **dict.fromkeys(
        ("torch.aten.contiguous", "torch.aten.clone", "torch.aten.detach", "torch.aten.alias", "torch.aten.lift_fresh"),
        _same,
    ),
    **dict.fromkeys(CONVERSIONS, _converted),
    **dict.fromkeys(
        ("torch.aten.transpose.int", "torch.aten.t", "torch.aten.numpy_T", "torch.aten.swapaxes"), _transposed
    ),
    "torch.aten.unsqueeze": _unsqueezed,
    "torch.aten.flatten.using_ints": _flattened,
    "torch.aten.permute": _permuted,
    "torch.aten.select.int": _selected,
    "torch.prim.ListUnpack": _unbound,
    "torch.aten.index.Tensor": _indexed,
    "torch.aten.index_select": _index_selected,
    "torch.aten.expand": _expanded,
    "torch.aten.repeat_interleave.self_int": _repeated,
}
