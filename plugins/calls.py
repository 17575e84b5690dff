"""The `llmir` ops of a module as typed calls, and how an operation becomes the call of a definition.

An export has three ops, whose constants are operands. Passes fuse them and what stands between them into more ops of
the same namespace, whose constants are attributes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.params.errors import CompileError

OPERATOR = "torch.operator"
PREFIX = "torch.llmir."

Constant = int | float | str

# Where the constants of an export's ops stand among their operands; the others are tensors, or lists of tensors.
_OPERAND_CONSTANTS: dict[str, dict[int, str]] = {
    "append_kv": {5: "layer"},
    "paged_attention": {4: "layer", 5: "scale", 6: "window", 7: "softcap"},
    "quantized_matmul": {2: "format", 3: "layout", 4: "out_features"},
}
FUSED_OPS = (
    "quantize_activations",
    "norm_quantize",
    "add_norm_quantize",
    "multiply",
    "gated_multiply",
    "rope_append",
    "rope_attend",
    "rope_append_attend",
)
"""The ops that passes make; the functions in `kernels.definitions` say what each takes and gives."""

OPS = (*_OPERAND_CONSTANTS, *FUSED_OPS)

# torch tells signed from unsigned integers; builtin tensors do not.
_ELEMENT_TYPES = {"si8": "i8", "ui8": "i8", "si32": "i32", "si64": "i64"}
_VTENSOR = re.compile(r"!torch\.vtensor<\[([\d,?]*)\],(\w+)>")


@dataclass(frozen=True)
class TensorType:
    """A builtin tensor type; a dimension that is not known is None."""

    shape: tuple[int | None, ...]
    element: str

    @classmethod
    def parse(cls, text: str) -> TensorType:
        """Read a `!torch.vtensor` type.

        Raises:
            CompileError: the type is not a ranked tensor.
        """
        match = _VTENSOR.fullmatch(text)
        if match is None:
            raise CompileError(f"llmir op: expected a ranked tensor operand, found {text}")
        dimensions = match[1].split(",") if match[1] else []
        shape = tuple(None if dimension == "?" else int(dimension) for dimension in dimensions)
        return cls(shape, _ELEMENT_TYPES.get(match[2], match[2]))

    def __str__(self) -> str:
        """The type as MLIR writes it."""
        return f"tensor<{''.join(f'{extent(dimension)}x' for dimension in self.shape)}{self.element}>"


@dataclass(frozen=True)
class LlmirCall:
    """One `llmir` op: what it is, the types it works on, and its constants."""

    op: str
    operands: tuple[TensorType, ...]
    results: tuple[TensorType, ...]
    constants: tuple[tuple[str, Constant], ...]

    def constant(self, name: str) -> Constant:
        """The value of a constant operand."""
        return dict(self.constants)[name]

    @property
    def layer(self) -> int | None:
        """The layer, which is passed to the definition and so does not tell definitions apart."""
        layer = dict(self.constants).get("layer")
        return None if layer is None else int(layer)

    @property
    def symbol(self) -> str:
        """Name of the definition this call needs: equal for two calls exactly if they can share it."""
        constants = [item for item in self.constants if item[0] != "layer"]
        key = f"{self.op} {[str(operand) for operand in self.operands]} {constants}"
        shape = "x".join(extent(dimension).replace("?", "D") for dimension in self.operands[0].shape)
        return f"llmir_{self.op}_{shape}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Site:
    """Where a call stands in a module, and the values it takes."""

    call: LlmirCall
    operation: ir.Operation
    tensors: tuple[ir.Value, ...]


def find_calls(module: ir.Module) -> Iterator[Site]:
    """All `llmir` ops of a module, in program order; each is read when it is reached, so that callers may replace it.

    Raises:
        CompileError: an op that this version does not know, or an operand that is not of its schema.
    """
    for operation in [operation for operation in walk(module.operation) if is_llmir(operation)]:
        yield _read(operation)


def is_llmir(operation: ir.Operation) -> bool:
    """Whether an operation is one of the `llmir` ops."""
    return operation.name == OPERATOR and _operator_name(operation).startswith(PREFIX)


def op_name(operation: ir.Operation) -> str:
    """Which `llmir` op an operation is."""
    return _operator_name(operation).removeprefix(PREFIX)


def walk(operation: ir.Operation) -> Iterator[ir.Operation]:
    """Every operation inside another one, outer before inner; the list is taken first, so that callers may erase."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                yield inner.operation
                yield from walk(inner.operation)


def call_definition(
    operation: ir.Operation, symbol: str, tensors: Sequence[ir.Value], layer: int | None = None
) -> None:
    """Replace an operation of the torch dialect by a call of a definition on builtin tensors.

    Args:
        operation: what to replace; it is erased.
        symbol: the definition's name.
        tensors: what to pass, torch tensors that become builtin ones.
        layer: passed as an index behind the tensors, if given.
    """
    with ir.InsertionPoint(operation), operation.location:
        operands = [_builtin(tensor) for tensor in tensors]
        if layer is not None:
            index = ir.IntegerAttr.get(ir.IndexType.get(), layer)
            constant = ir.Operation.create("arith.constant", results=[index.type], attributes={"value": index})
            operands.append(constant.result)
        call = ir.Operation.create(
            "util.call",
            results=[ir.Type.parse(str(TensorType.parse(str(result.type)))) for result in operation.results],
            operands=operands,
            attributes={"callee": ir.FlatSymbolRefAttr.get(symbol)},
        )
        for old, new in zip(operation.results, call.results, strict=True):
            value = ir.Operation.create("torch_c.from_builtin_tensor", results=[old.type], operands=[new])
            old.replace_all_uses_with(value.result)
    operation.erase()


def append_definitions(module: ir.Module, functions: Mapping[str, str]) -> None:
    """Append definitions, MLIR text by symbol, to a module.

    Raises:
        CompileError: one of them is not valid MLIR.
    """
    try:
        parsed = ir.Module.parse("\n".join(functions.values()))
    except ir.MLIRError as error:
        raise CompileError(f"a definition among {', '.join(functions)} is not valid MLIR: {error}") from None
    for function in list(parsed.body.operations):
        module.body.append(function.operation.detach_from_parent())


def extent(dimension: int | None) -> str:
    """A dimension as MLIR writes it."""
    return "?" if dimension is None else str(dimension)


def _builtin(tensor: ir.Value) -> ir.Value:
    builtin = ir.Type.parse(str(TensorType.parse(str(tensor.type))))
    return ir.Operation.create("torch_c.to_builtin_tensor", results=[builtin], operands=[tensor]).result


def _operator_name(operation: ir.Operation) -> str:
    return str(ir.StringAttr(operation.attributes["name"]).value)


def _read(operation: ir.Operation) -> Site:
    op = op_name(operation)
    if op not in OPS:
        raise CompileError(f"unknown op llmir.{op}; known: {', '.join(OPS)}")
    tensors: list[ir.Value] = []
    named: list[tuple[str, Constant]] = []
    for index, operand in enumerate(operation.operands):
        name = _OPERAND_CONSTANTS.get(op, {}).get(index)
        if name is not None:
            value = read_constant(operand)
            if value is None:
                raise CompileError(f"llmir.{op}: {name} must be a constant")
            named.append((name, value))
        elif str(operand.type).startswith("!torch.list"):
            tensors.extend(operand.owner.operands)
        else:
            tensors.append(operand)
    if op in FUSED_OPS:
        named += [(name, plain(operation.attributes[name])) for name in sorted(operation.attributes) if name != "name"]
    call = LlmirCall(
        op,
        tuple(TensorType.parse(str(tensor.type)) for tensor in tensors),
        tuple(TensorType.parse(str(result.type)) for result in operation.results),
        tuple(named),
    )
    return Site(call, operation, tuple(tensors))


def read_constant(value: ir.Value) -> Constant | None:
    """What a value is, if an operation makes it from nothing but an attribute."""
    owner = value.owner
    if isinstance(owner, ir.Block) or len(owner.operands) or "value" not in owner.attributes:
        return None
    return plain(owner.attributes["value"])


def plain(attribute: ir.Attribute) -> Constant:
    """The value of an attribute."""
    if isinstance(attribute, (ir.IntegerAttr, ir.BoolAttr)):
        return int(attribute.value)
    if isinstance(attribute, ir.FloatAttr):
        return float(attribute.value)
    return str(ir.StringAttr(attribute).value)
