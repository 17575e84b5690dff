"""Gives the planes of weights that another program has row after row: in tiles, as kernels read them.

What a module holds is put into tiles once, when it is loaded: into globals of its own. What it is given is put into
tiles in each call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from iree.compiler import ir

from llmir_iree.plugins.calls import TensorType
from llmir_iree.plugins.matching import create, producer, tensor_type, torch_element, torch_type
from llmir_iree.plugins.portable import tiles
from llmir_iree.plugins.portable.tiles import NibbleOrder

# Initializers have no symbol.
_INITIALIZER = ""


class TiledWeights:
    """Planes in layout tile16, made where the insertion point is; one global for each that a module holds."""

    def __init__(self, module: ir.Module) -> None:
        self._module = module
        self._constants = {
            str(ir.StringAttr(operation.attributes["sym_name"]).value)
            for operation in (operation.operation for operation in module.body.operations)
            if operation.name == "util.global" and "is_mutable" not in operation.attributes
        }
        self._declared: set[str] = set()

    def codes(self, packed: ir.Value, rows: int, columns: int, order: NibbleOrder) -> ir.Value:
        """The plane `qs` of q4_0 or q4_1."""
        kind = _builtin(packed)
        symbol = _symbol("nibbles", order, rows, columns, kind)
        definition = tiles.tile_nibbles(symbol, kind, rows, columns, order)
        return self._made(symbol, {symbol: definition}, [packed])

    def scales(self, scales: ir.Value, rows: int, count: int, columns: int) -> ir.Value:
        """The plane `d` or `m` of q4_0 or q4_1."""
        symbol, definitions = _tiled_scales(_builtin(scales), rows, count, columns)
        return self._made(symbol, definitions, [scales])

    def minima(self, scales: ir.Value, zeros: ir.Value, rows: int, count: int, columns: int) -> ir.Value:
        """The plane `m` of q4_1 for weights that have zero points."""
        element, kinds = torch_element(zeros), (_builtin(scales), _builtin(zeros))
        minima = _symbol("minima", element, rows, count, *kinds)
        matrix = TensorType((rows, count), "f16")
        tiled, definitions = _tiled_scales(matrix, rows, count, columns)
        definitions[minima] = tiles.minima_of_zeros(minima, *kinds, element, rows, count)
        symbol = _symbol("tiled_minima", minima, tiled)
        result = _result_type(definitions[tiled])
        definitions[symbol] = (
            f"util.func private @{symbol}(%scales: {kinds[0]}, %zeros: {kinds[1]}) -> {result} {{\n"
            f"  %minima = util.call @{minima}(%scales, %zeros) : ({kinds[0]}, {kinds[1]}) -> {matrix}\n"
            f"  %tiled = util.call @{tiled}(%minima) : ({matrix}) -> {result}\n"
            f"  util.return %tiled : {result}\n}}\n"
        )
        return self._made(symbol, definitions, [scales, zeros])

    def _made(self, symbol: str, definitions: Mapping[str, str], values: Sequence[ir.Value]) -> ir.Value:
        """What a function makes of values: a global if they are constants, else the result of a call."""
        result = _result_type(definitions[symbol])
        sources = [self._constant(value) for value in values]
        self._declare(definitions)
        if None in sources:
            operands = [
                create("torch_c.to_builtin_tensor", (value,), (ir.Type.parse(str(_builtin(value))),)).result
                for value in values
            ]
            made = ir.Operation.create(
                "util.call",
                results=[ir.Type.parse(result)],
                operands=operands,
                attributes={"callee": ir.FlatSymbolRefAttr.get(symbol)},
            )
        else:
            held = [(source, _builtin(value)) for source, value in zip(sources, values, strict=True) if source]
            made = ir.Operation.create(
                "util.global.load",
                results=[ir.Type.parse(result)],
                attributes={"global": ir.FlatSymbolRefAttr.get(self._held(symbol, definitions, held, result))},
            )
        shape = tuple(ir.RankedTensorType(made.result.type).shape)
        torch_tensor = torch_type(shape, str(ir.RankedTensorType(made.result.type).element_type))
        return create("torch_c.from_builtin_tensor", (made.result,), (torch_tensor,)).result

    def _constant(self, value: ir.Value) -> str | None:
        """The global that a value is loaded from, if nothing changes it."""
        cast = producer(value, "torch_c.from_builtin_tensor")
        load = None if cast is None else producer(cast.operands[0], "util.global.load")
        name = None if load is None else str(ir.FlatSymbolRefAttr(load.attributes["global"]).value)
        return name if name in self._constants else None

    def _declare(self, definitions: Mapping[str, str]) -> None:
        missing = [name for name in definitions if name not in self._declared]
        self._declared.update(missing)
        if missing:
            self._insert("\n".join(definitions.values()), set(missing), ir.InsertionPoint(self._module.body))

    def _held(
        self, symbol: str, definitions: Mapping[str, str], sources: Sequence[tuple[str, TensorType]], result: str
    ) -> str:
        """The global that holds what a function makes of others, filled by an initializer behind them.

        Both stand before all functions: IREE 3.13 fails to convert loads of globals that come later.
        """
        name = _symbol("tiles", symbol, *(source for source, _ in sources))
        if name in self._declared:
            return name
        self._declared.add(name)
        loads = [f'  %{n} = util.global.load @"{source}" : {kind}' for n, (source, kind) in enumerate(sources)]
        arguments = ", ".join(f"%{n}" for n in range(len(sources)))
        kinds = ", ".join(str(kind) for _, kind in sources)
        text = "\n".join(
            [
                *definitions.values(),
                *dict.fromkeys(f'util.global private @"{source}" : {kind}' for source, kind in sources),
                f"util.global private @{name} : {result}",
                "util.initializer {",
                *loads,
                f"  %tiled = util.call @{symbol}({arguments}) : ({kinds}) -> {result}",
                f"  util.global.store %tiled, @{name} : {result}",
                "  util.return",
                "}",
            ]
        )
        functions = [op.operation for op in self._module.body.operations if str(op.operation.name).endswith(".func")]
        self._insert(text, {name, _INITIALIZER}, ir.InsertionPoint(functions[0]))
        return name

    def _insert(self, text: str, wanted: set[str], place: ir.InsertionPoint) -> None:
        """Insert those operations of a module whose symbols are wanted."""
        parsed = ir.Module.parse(text)  # Operations of a module that is gone are gone too.
        for operation in list(parsed.body.operations):
            attributes = operation.operation.attributes
            symbol = str(ir.StringAttr(attributes["sym_name"]).value) if "sym_name" in attributes else _INITIALIZER
            if symbol in wanted:
                place.insert(operation.operation.detach_from_parent())


def _tiled_scales(kind: TensorType, rows: int, count: int, columns: int) -> tuple[str, dict[str, str]]:
    symbol = _symbol("scales", rows, count, columns, kind)
    return symbol, {symbol: tiles.tile_scales(symbol, kind, rows, count, columns)}


def _builtin(value: ir.Value) -> TensorType:
    return tensor_type(value)


def _symbol(purpose: str, *parts: object) -> str:
    key = " ".join(map(str, parts))
    return f"llmir_{purpose}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _result_type(definition: str) -> str:
    """The type that a definition of one result gives."""
    with_type = definition[definition.index(") -> ") + len(") -> ") :]
    return with_type[: with_type.index(" {")]
