"""Reads and rewrites the graph of a torch module: who made a value, who takes it, what its constants are.

A handle of an operation that was erased must not be touched, and `replace` erases more than the operation it is given:
passes list only operations whose results are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from iree.compiler import ir

from llmir_iree.plugins.calls import (
    OPERATOR,
    PREFIX,
    Constant,
    TensorType,
    extent,
    is_llmir,
    op_name,
    plain,
    read_constant,
    walk,
)

# What may go when nobody takes its results.
_PURE = ("torch.", "torch_c.", "util.global.load", "arith.constant")

_TORCH_ELEMENTS = {"i8": "ui8", "i32": "si32", "i64": "si64"}


# Numbers by which torch's operations name types.
SCALAR_TYPES = {"si32": 3, "si64": 4, "f16": 5, "f32": 6, "bf16": 15}


class Unlike(Exception):  # noqa: N818  it is no error
    """Why an operation is not what a pass looks for."""


def operation_name(operation: ir.Operation) -> str:
    """Name of an operation, "llmir.<op>" for those of the plugin."""
    return f"llmir.{op_name(operation)}" if is_llmir(operation) else str(operation.name)


def operations(module: ir.Module, *names: str) -> list[ir.Operation]:
    """All operations of these names, in program order."""
    return [operation for operation in walk(module.operation) if operation_name(operation) in names]


def producer(value: ir.Value, *names: str) -> ir.Operation | None:
    """The operation that made a value, if it has one of these names."""
    owner = value.owner
    if isinstance(owner, ir.Block) or operation_name(owner.operation) not in names:
        return None
    return owner.operation


def users(value: ir.Value) -> list[ir.Operation]:
    """The operations that take a value, each once."""
    return list(dict.fromkeys(use.owner.operation for use in value.uses))


def only_user(value: ir.Value, *names: str) -> ir.Operation | None:
    """The one operation that takes a value, if there is one only and it has one of these names."""
    found = users(value)
    return found[0] if len(found) == 1 and operation_name(found[0]) in names else None


def constants(value: ir.Value) -> list[Constant | None]:
    """The members of a list that is built of values; empty for anything else."""
    built = producer(value, "torch.prim.ListConstruct")
    return [] if built is None else [read_constant(member) for member in built.operands]


def tensor_type(value: ir.Value) -> TensorType:
    """The type of a torch tensor, as a builtin one.

    Raises:
        CompileError: it is not a ranked tensor.
    """
    return TensorType.parse(str(value.type))


def torch_type(shape: Sequence[int | None], element: str) -> ir.Type:
    """A torch tensor type; integers of 8 bits are unsigned, others signed."""
    dimensions = ",".join(map(extent, shape))
    return ir.Type.parse(f"!torch.vtensor<[{dimensions}],{_TORCH_ELEMENTS.get(element, element)}>")


def create(
    name: str,
    operands: Iterable[ir.Value],
    results: Sequence[ir.Type],
    attributes: Mapping[str, Constant] | None = None,
) -> ir.Operation:
    """Build an operation where the insertion point is; of an `llmir` op, "llmir.<op>", constants become attributes."""
    built = {key: _attribute(value) for key, value in (attributes or {}).items()}
    if name.startswith("llmir."):
        built["name"] = ir.StringAttr.get(PREFIX + name.removeprefix("llmir."))
        name = OPERATOR
    return ir.Operation.create(name, results=list(results), operands=list(operands), attributes=built)


def attributes_of(operation: ir.Operation) -> dict[str, Constant]:
    """The constants of a fused op."""
    return {name: plain(operation.attributes[name]) for name in operation.attributes if name != "name"}


def torch_int(value: int) -> ir.Value:
    """A constant operand."""
    return create("torch.constant.int", (), (ir.Type.parse("!torch.int"),), {"value": value}).result


def torch_bool(value: bool) -> ir.Value:
    """A constant operand."""
    return create("torch.constant.bool", (), (ir.Type.parse("!torch.bool"),), {"value": value}).result


def torch_str(value: str) -> ir.Value:
    """A constant operand."""
    return create("torch.constant.str", (), (ir.Type.parse("!torch.str"),), {"value": value}).result


def none() -> ir.Value:
    """The constant that stands for an argument that is not given."""
    return create("torch.constant.none", (), (ir.Type.parse("!torch.none"),)).result


def torch_list(members: Sequence[ir.Value], kind: str) -> ir.Value:
    """A list operand; the kind is that of its members, "int" or "vtensor"."""
    return create("torch.prim.ListConstruct", members, (ir.Type.parse(f"!torch.list<{kind}>"),)).result


def torch_element(value: ir.Value) -> str:
    """The element type of a torch tensor, as torch writes it: with signs.

    Raises:
        CompileError: it is not a ranked tensor.
    """
    tensor_type(value)
    return str(value.type).rpartition(",")[2].removesuffix(">")


def convert(value: ir.Value, element: str) -> ir.Value:
    """The value with another element type of `SCALAR_TYPES`, where the insertion point is."""
    if torch_element(value) == element:
        return value
    kind = torch_type(tensor_type(value).shape, element)
    plain_copy = (torch_bool(False), torch_bool(False), none())
    return create("torch.aten.to.dtype", (value, torch_int(SCALAR_TYPES[element]), *plain_copy), (kind,)).result


def erase_assertions(module: ir.Module) -> None:
    """Erase torch.export's checks of types and devices that are known: they would keep what a pass replaces."""
    for operation in operations(module, "torch.aten._assert_tensor_metadata"):
        operation.erase()


def replace(operation: ir.Operation, *values: ir.Value) -> None:
    """Let values stand in for an operation's results, then erase it and all that was there for it alone."""
    for old, new in zip(operation.results, values, strict=True):
        old.replace_all_uses_with(new)
    _erase_unused(operation)


def _erase_unused(operation: ir.Operation) -> None:
    # By hash, which is taken while an operation is there: it may be waiting twice, and be gone the second time.
    waiting = [(hash(operation), operation)]
    erased: set[int] = set()
    while waiting:
        key, operation = waiting.pop()
        if key in erased or not str(operation.name).startswith(_PURE):
            continue
        if any(True for result in operation.results for _ in result.uses):
            continue
        owners = [operand.owner for operand in operation.operands if not isinstance(operand.owner, ir.Block)]
        waiting += [(hash(owner.operation), owner.operation) for owner in owners]
        operation.erase()
        erased.add(key)


def _attribute(value: Constant) -> ir.Attribute:
    if isinstance(value, str):
        return ir.StringAttr.get(value)
    if isinstance(value, float):
        return ir.FloatAttr.get_f64(value)
    if isinstance(value, bool):
        return ir.BoolAttr.get(value)
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)
