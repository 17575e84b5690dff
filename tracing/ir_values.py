"""Computes integers of IREE's modules, such as sizes and counts, from those that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from iree.compiler import ir

Shape = tuple[int, ...]


class Evaluator:
    """Computes integers of a module from those that are known."""

    def __init__(self, known: Mapping[ir.Value, int | None], shapes: Mapping[ir.Value, Shape | None] = {}) -> None:
        """Begin with what is known.

        Args:
            known: values, None for one that is not known.
            shapes: of buffer views, None for those that are not known.
        """
        self._values: dict[ir.Value, int | None] = dict(known)
        self._shapes = shapes

    def __call__(self, value: ir.Value) -> int | None:
        """The value, or None if it depends on something that is not known."""
        if value not in self._values:
            self._values[value] = None if isinstance(value.owner, ir.Block) else self._compute(value)
        return self._values[value]

    def _compute(self, value: ir.Value) -> int | None:
        operation = value.owner
        name = operation.name
        if name == "arith.constant":
            attribute = operation.attributes["value"]
            return int(attribute.value) if isinstance(attribute, ir.IntegerAttr) else None
        if name == "hal.buffer_view.dim":
            shape = self._shapes.get(operation.operands[0])
            axis = int(operation.attributes["index"].value)
            return shape[axis] if shape is not None and axis < len(shape) else None
        operands = [self(operand) for operand in operation.operands]
        if name == "util.assume.int":
            number: int = ir.OpResult(value).result_number
            return operands[number]
        if name == "arith.select":
            condition = operands[0]
            return None if condition is None else operands[1 if condition else 2]
        if name == "arith.cmpi":
            return _compare(int(operation.attributes["predicate"].value), operands)
        compute = _ARITHMETIC.get(name)
        if compute is None or any(operand is None for operand in operands):
            return None
        return compute(*operands)


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divui": lambda a, b: a // b if b else 0,
    "arith.divsi": lambda a, b: a // b if b else 0,
    "arith.remui": lambda a, b: a % b if b else 0,
    "arith.ceildivui": lambda a, b: -(-a // b) if b else 0,
    "arith.ceildivsi": lambda a, b: -(-a // b) if b else 0,
    "arith.minui": min,
    "arith.minsi": min,
    "arith.maxui": max,
    "arith.maxsi": max,
    "arith.shli": lambda a, b: a << b,
    "arith.shrui": lambda a, b: a >> b,
    "arith.ori": lambda a, b: a | b,
    "arith.extui": lambda a: a,
    "arith.extsi": lambda a: a,
    "arith.trunci": lambda a: a & 0xFFFFFFFF,
    "arith.index_cast": lambda a: a,
    "arith.index_castui": lambda a: a,
    "util.align": lambda a, b: -(-a // b) * b,
    "iree_tensor_ext.dispatch.workload.ordinal": lambda a: a,
}


def _compare(predicate: int, operands: Sequence[int | None]) -> int | None:
    left, right = operands
    if left is None or right is None:
        return None
    # eq, ne, then less and greater, signed and unsigned: sizes are never negative.
    results = (left == right, left != right, *(left < right, left <= right, left > right, left >= right) * 2)
    return int(results[predicate])
