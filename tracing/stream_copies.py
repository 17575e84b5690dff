"""Finds the copies in a module at IREE's stream level, and tells those of whole arguments from the small ones.

A cache that goes in as an argument and comes out as a result is updated in place only if the compiler sees no second
reader of any of its versions. Where it sees one, it copies the whole cache in every call, which no test of results
notices. The stream level (`--compile-to=stream`) is where such a copy first stands in the IR.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from iree.compiler import ir

_COPIES = ("stream.cmd.copy", "stream.async.copy", "stream.async.clone")
_IMPORT = "stream.tensor.import"


@dataclass(frozen=True)
class Copy:
    """A copy on the device.

    Attributes:
        function: where it stands.
        op: which op it is.
        nbytes: its length if that is a constant.
        whole_argument: type of the imported argument whose full length it has, if there is one.
    """

    function: str
    op: str
    nbytes: int | None
    whole_argument: str | None


def find_copies(stream_ir: str) -> list[Copy]:
    """All copies of a module at stream level, in program order.

    Args:
        stream_ir: what `iree-compile --compile-to=stream` printed.
    """
    with ir.Context() as context:
        context.allow_unregistered_dialects = False
        module = ir.Module.parse(stream_ir)
        return [copy for function in module.body.operations for copy in _copies_in(function.operation)]


def _copies_in(function: ir.Operation) -> Iterator[Copy]:
    if "sym_name" not in function.attributes:
        return
    name = ir.StringAttr(function.attributes["sym_name"]).value
    imports: dict[str, str] = {}
    for operation in walk(function):
        if operation.name == _IMPORT:
            # Equal sizes are one value after CSE.
            imports[_key(_last_operand(operation))] = str(ir.TypeAttr(operation.attributes["result_encoding"]).value)
        elif operation.name in _COPIES:
            length = _last_operand(operation)
            yield Copy(name, operation.name, _constant(length), imports.get(_key(length)))


def walk(operation: ir.Operation) -> Iterator[ir.Operation]:
    """Every operation inside another one, outer before inner."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from walk(inner.operation)


def _last_operand(operation: ir.Operation) -> ir.Value:
    """The size, in bytes: it comes last in copies and imports alike."""
    return operation.operands[len(operation.operands) - 1]


def _key(value: ir.Value) -> str:
    return str(value.get_name())


def _constant(value: ir.Value) -> int | None:
    owner = value.owner
    if isinstance(owner, ir.Block) or "value" not in owner.attributes:
        return None
    return int(ir.IntegerAttr(owner.attributes["value"]).value)
