"""Finds the places that dispatch in a module at IREE's stream level, with all that the IR says of each.

At this level (`--compile-to=stream`, with `--mlir-print-debuginfo`) dispatches stand in the order in which a command
buffer holds them, so that the n-th of a function is the n-th that a profile of one call shows. Sizes that vary are
computed from the shapes of the function's arguments, as the compiled module itself does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from iree.compiler import ir

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.ir_values import Evaluator, Shape
from llmir_iree.tracing.stream_copies import walk

_DISPATCH = "stream.cmd.dispatch"
_EXECUTE = "stream.cmd.execute"
_PARAMETERS = "stream.cmd.parameter.load"
_EXECUTABLE = "stream.executable"
_SUBSPAN = "stream.binding.subspan"
_LOAD = "iree_tensor_ext.dispatch.tensor.load"
_STORE = "iree_tensor_ext.dispatch.tensor.store"
# Its first operand are new rows; the last one is the tensor that they go into.
_SCATTER = "iree_linalg_ext.scatter"

# Of a coarse-fences function, the one that does the work carries this suffix.
_ASYNC = "$async"
_DYNAMIC = -(1 << 63)

_ACCESS = {1: "read", 2: "write", 3: "update"}
_LINE = re.compile(r":(\d+):\d+")
_BITS = re.compile(r"(?:bf|f|i|si|ui|index)(\d*)")
_FLOAT_OPS = re.compile(r"arith\.(add|sub|mul|div|maximum|minimum|maxnum|minnum|cmp|neg)f|math\.(?!fma)\w+")


@dataclass(frozen=True)
class Binding:
    """A buffer of a dispatch.

    Attributes:
        access: "read", "write" or "update".
        buffer: tells buffers and offsets in them apart within a function: equal for two bindings of the same bytes.
        nbytes: its length, None if that is not known.
        parameter: key of the parameter that it is, if it is one.
    """

    access: str
    buffer: int
    nbytes: int | None
    parameter: str | None


@dataclass(frozen=True)
class Work:
    """What a dispatch of the compiler's own making moves and computes; None where the IR does not tell."""

    bytes_read: int | None
    bytes_written: int | None
    flops: int | None


@dataclass(frozen=True)
class StreamSite:
    """A place that dispatches.

    Attributes:
        key: name of the export, the last part of `executable::variant::export`.
        workload, scalars: what the dispatch is passed beside buffers, None where a value is not known.
        lines: in the compiled text, from 1: where the op stands, then where what holds it was called, and so on.
        work: None for an executable that came into the module as machine code or calls it.
    """

    executable: str
    key: str
    workload: tuple[int | None, ...]
    scalars: tuple[int | None, ...]
    bindings: tuple[Binding, ...]
    lines: tuple[int, ...]
    work: Work | None


def read_stream_sites(stream_ir: str, function: str, shapes: Sequence[Shape | None] = ()) -> list[StreamSite]:
    """All places that dispatch in a function, in the order of its command buffers.

    Args:
        stream_ir: what iree-compile printed of the stream level.
        function: name of an exported function.
        shapes: of its arguments, in order; None, or none at all, for those that are not known.

    Returns:
        Nothing if there is no such function or it dispatches nothing.

    Raises:
        CaptureError: the text is not MLIR.
    """
    with ir.Context():
        try:
            module = ir.Module.parse(stream_ir)
        except ir.MLIRError as error:
            raise CaptureError(f"the IR at stream level cannot be read: {str(error).splitlines()[0]}") from None
        parameters: dict[str, str] = {}
        executables: dict[str, ir.Operation] = {}
        bodies: dict[str, ir.Operation] = {}
        for view in module.body.operations:
            operation = view.operation
            if operation.name == "util.initializer":
                parameters.update(_stored_parameters(operation))
            elif operation.name == _EXECUTABLE:
                executables[_symbol(operation)] = operation
            elif operation.name == "util.func":
                bodies[_symbol(operation)] = operation
        body = bodies.get(function + _ASYNC, bodies.get(function))
        return [] if body is None else list(_sites(body, shapes, parameters, executables))


def _stored_parameters(initializer: ir.Operation) -> Iterator[tuple[str, str]]:
    """Symbols of globals, and keys of the parameters that an initializer stores in them."""
    keys: dict[ir.Value, str] = {}
    for operation in walk(initializer):
        if operation.name == _PARAMETERS:
            # Segments: scopes, keys, offsets, sizes, a timepoint.
            scopes, count = list(operation.attributes["operandSegmentSizes"])[:2]
            names = [operation.operands[scopes + index] for index in range(count)]
            keys.update(zip(operation.results, map(_text, names), strict=False))
        elif operation.name == "stream.timepoint.await":
            awaited = [operand for operand in operation.operands if "timepoint" not in str(operand.type)]
            for result, operand in zip(operation.results, awaited, strict=False):
                if operand in keys:
                    keys[result] = keys[operand]
        elif operation.name == "util.global.store" and operation.operands[0] in keys:
            yield str(operation.attributes["global"]).lstrip("@").strip('"'), keys[operation.operands[0]]


def _text(constant: ir.Value) -> str:
    return str(ir.StringAttr(constant.owner.attributes["value"]).value)


def _sites(
    body: ir.Operation,
    shapes: Sequence[Shape | None],
    parameters: Mapping[str, str],
    executables: Mapping[str, ir.Operation],
) -> Iterator[StreamSite]:
    evaluate = Evaluator({}, dict(zip(body.regions[0].blocks[0].arguments, shapes, strict=False)))
    captured: dict[ir.Value, ir.Value] = {}
    buffers = _Buffers(parameters)
    for operation in walk(body):
        if operation.name == _EXECUTE:
            captured.update(zip(operation.regions[0].blocks[0].arguments, operation.operands, strict=False))
        elif operation.name == _DISPATCH:
            yield _site(operation, evaluate, captured, buffers, executables)


def _site(
    operation: ir.Operation,
    evaluate: Evaluator,
    captured: Mapping[ir.Value, ir.Value],
    buffers: _Buffers,
    executables: Mapping[str, ir.Operation],
) -> StreamSite:
    entry = str(operation.attributes["entry_points"]).strip("[]").split(",")[0]
    path = [part.lstrip("@").strip('"') for part in entry.split("::")]
    segments = iter(operation.operands)
    workload, scalars, resources, _sizes, offsets, lengths = (
        [next(segments) for _ in range(size)] for size in operation.attributes["operandSegmentSizes"]
    )
    accesses = [int(ir.IntegerAttr(access).value) for access in operation.attributes["resource_accesses"]]
    bindings = tuple(
        buffers.bind(_ACCESS[access & 3], captured.get(resource, resource), offset, evaluate(length))
        for access, resource, offset, length in zip(accesses, resources, offsets, lengths, strict=True)
    )
    values = tuple(map(evaluate, scalars))
    executable = executables.get(path[0])
    return StreamSite(
        executable=path[0],
        key=path[-1],
        workload=tuple(map(evaluate, workload)),
        scalars=values,
        bindings=bindings,
        lines=_lines(operation.location),
        work=None if executable is None else _work(executable, path[-1], len(bindings), values),
    )


class _Buffers:
    """Numbers the buffers of a function, and knows which of them are parameters."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._parameters = parameters
        self._numbers: dict[tuple[ir.Value, ir.Value], int] = {}

    def bind(self, access: str, resource: ir.Value, offset: ir.Value, nbytes: int | None) -> Binding:
        """Describe a binding of the part of a buffer that begins at an offset."""
        parameter = None
        owner = resource.owner
        if not isinstance(owner, ir.Block) and owner.name == "util.global.load":
            parameter = self._parameters.get(str(owner.attributes["global"]).lstrip("@").strip('"'))
        number = self._numbers.setdefault((resource, offset), len(self._numbers))
        return Binding(access, number, nbytes, parameter)


def _lines(location: ir.Location) -> tuple[int, ...]:
    """Lines of a location from the inside out; of several ops that were fused into one, the last one's."""
    if hasattr(location, "caller"):
        return (*_lines(location.callee), *_lines(location.caller))
    found = [int(line) for line in _LINE.findall(str(location))]
    return (max(found),) if found else ()


def _work(executable: ir.Operation, export: str, bindings: int, scalars: Sequence[int | None]) -> Work | None:
    """What a dispatch does, from the ops on tensors in the function that it runs."""
    function = next(
        (inner for inner in walk(executable) if inner.name == "func.func" and _symbol(inner) == export), None
    )
    if function is None:
        return None
    passed = list(function.regions[0].blocks[0].arguments)[bindings:]
    known = {argument: value for argument, value in zip(passed, scalars, strict=False) if value is not None}
    evaluate = Evaluator(known, {})
    read: list[int | None] = []
    written: list[int | None] = []
    flops: list[int | None] = []
    for operation in walk(function):
        if operation.name == _LOAD:
            read.append(_bytes_read(operation, evaluate))
        elif operation.name == _STORE:
            written.append(_bytes_written(operation, evaluate))
        elif operation.name.startswith(("linalg.", "iree_linalg_ext.")) and len(operation.results):
            flops.append(_flops(operation, evaluate))
    return Work(_total(read), _total(written), _total(flops))


def _bytes_read(load: ir.Operation, evaluate: Evaluator) -> int | None:
    """All of a tensor; but where single elements are taken out of it or replaced in it, as many as are taken."""
    users = [use.owner for use in load.results[0].uses]
    kind = ir.RankedTensorType(load.results[0].type)
    if users and all(user.name == _SCATTER and _last_operand(user) == load.results[0] for user in users):
        return 0
    if not users or any(user.name != "tensor.extract" for user in users):
        return _sized(load, None, evaluate)
    total = _total([_iterations(_parent(user), evaluate) for user in users])
    return None if total is None else total * _element_bytes(str(kind.element_type))


def _bytes_written(store: ir.Operation, evaluate: Evaluator) -> int | None:
    """The slice that is stored; of a tensor in which some rows were replaced, these."""
    owner = store.operands[0].owner
    if isinstance(owner, ir.Block) or owner.name != _SCATTER:
        return _sized(store, 0, evaluate)
    element = ir.RankedTensorType(owner.operands[0].type).element_type
    return _elements(_dimensions(owner.operands[0], evaluate), _element_bytes(str(element)))


def _sized(operation: ir.Operation, operand: int | None, evaluate: Evaluator) -> int | None:
    """Bytes of the slice that a load or a store moves."""
    value = operation.results[0] if operand is None else operation.operands[operand]
    kind = ir.RankedTensorType(value.type)
    segments = list(operation.attributes["operandSegmentSizes"])
    # Source, or value and target, with their dimensions; then dynamic offsets, sizes and strides.
    before = sum(segments[:-2])
    dynamic = iter(operation.operands[before + index] for index in range(segments[-2]))
    sizes = [
        evaluate(next(dynamic)) if size == _DYNAMIC else int(size) for size in operation.attributes["static_sizes"]
    ]
    return _elements(sizes, _element_bytes(str(kind.element_type)))


def _flops(operation: ir.Operation, evaluate: Evaluator) -> int | None:
    if operation.name in ("linalg.fill", "linalg.transpose", "linalg.copy", "linalg.broadcast"):
        return 0
    if operation.name == "linalg.softmax":
        # Largest, difference, exponential, sum, quotient.
        elements = _elements(_dimensions(operation.operands[0], evaluate), 1)
        return None if elements is None else 5 * elements
    if not operation.name.startswith("linalg."):
        return None
    per_iteration = sum(bool(_FLOAT_OPS.fullmatch(inner.name)) for inner in walk(operation))
    iterations = _iterations(operation, evaluate) if per_iteration else 0
    return None if iterations is None else iterations * per_iteration


def _iterations(operation: ir.Operation | None, evaluate: Evaluator) -> int | None:
    """Points of the space that a linalg op runs through."""
    if operation is None or "indexing_maps" not in operation.attributes:
        return None
    extents: dict[int, int | None] = {}
    maps = [ir.AffineMapAttr(attribute) for attribute in operation.attributes["indexing_maps"]]
    for operand, attribute in zip(operation.operands, maps, strict=False):
        text = str(attribute)
        results = [part.strip() for part in text[text.index("->") + 2 :].strip(" ()<>").split(",")]
        for name, size in zip(results, _dimensions(operand, evaluate), strict=False):
            if re.fullmatch(r"d\d+", name):
                extents[int(name[1:])] = size
    rank = int(re.findall(r"d(\d+)\)? *(?:\[[^]]*\])? *->", str(maps[0]))[0]) + 1 if "d0" in str(maps[0]) else 0
    return _elements([extents.get(dimension) for dimension in range(rank)], 1)


def _dimensions(value: ir.Value, evaluate: Evaluator) -> list[int | None]:
    """Dimensions of a tensor; those that vary as far as the op that made it tells them."""
    if not isinstance(value.type, ir.RankedTensorType):
        return []
    shape = ir.RankedTensorType(value.type)
    static = [None if shape.is_dynamic_dim(axis) else int(shape.get_dim_size(axis)) for axis in range(shape.rank)]
    owner = value.owner
    if None not in static or isinstance(owner, ir.Block):
        return list(static)
    if owner.name == _LOAD:
        segments = list(owner.attributes["operandSegmentSizes"])
        before = sum(segments[:-2])
        dynamic = iter(owner.operands[before + index] for index in range(segments[-2]))
    elif owner.name == "tensor.empty":
        dynamic = iter(owner.operands)
    elif owner.name.startswith("linalg."):
        return _dimensions(_last_operand(owner), evaluate)
    else:
        return list(static)
    return [evaluate(next(dynamic)) if size is None else size for size in static]


def _last_operand(operation: ir.Operation) -> ir.Value:
    return operation.operands[len(operation.operands) - 1]


def _parent(operation: ir.Operation) -> ir.Operation | None:
    parent = operation.parent
    return None if parent is None else parent.operation


def _elements(sizes: Sequence[int | None], each: int) -> int | None:
    known = [size for size in sizes if size is not None]
    return prod(known) * each if len(known) == len(sizes) else None


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _element_bytes(element: str) -> int:
    """Bytes of an element; i1 takes one, as IREE stores it."""
    match = _BITS.match(element)
    bits = int(match[1]) if match and match[1] else 64
    return max(1, bits // 8)


def _symbol(operation: ir.Operation) -> str:
    return str(ir.StringAttr(operation.attributes["sym_name"]).value)
