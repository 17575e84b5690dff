"""merge-sibling-matmuls: one matmul instead of several of the same input, where the archive has their weights in a row.

Before: `llmir.quantized_matmul`s of the same activations, by weights that lie one behind the other in the archive.
After: one of them, by a parameter that spans all those weights, and a slice of its result for each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.plugins.calls import Site, TensorType, find_calls
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import create, producer, replace, torch_int, torch_type
from llmir_iree.plugins.seam import choose

_PARAMETER = re.compile(r'#flow\.parameter\.named<"(?P<scope>[^"]*)"::"(?P<name>[^"]*)">')


@dataclass(frozen=True)
class _Parameter:
    scope: str
    name: str

    @property
    def weight(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def plane(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class _Matmul:
    """A matmul, the parameters that its planes are, and where it stands among all calls."""

    site: Site
    planes: tuple[_Parameter, ...]
    position: int

    @property
    def rows(self) -> int:
        return int(self.site.call.constant("out_features"))


def merge_sibling_matmuls(module: ir.Module, lowering: Lowering) -> None:
    """Merge matmuls that kernels compute, in place, as the archive allows.

    Raises:
        CompileError: an op without an implementation for the target.
    """
    sources = {
        ir.StringAttr(operation.attributes["sym_name"]).value: operation
        for operation in (operation.operation for operation in module.body.operations)
        if operation.name == "util.global"
    }
    of_input: dict[ir.Value, dict[str, _Matmul]] = {}
    for position, site in enumerate(find_calls(module)):
        if site.call.op != "quantized_matmul" or choose(site.call, lowering).is_portable:
            continue
        planes = tuple(found for plane in site.tensors[1:] if (found := _parameter(plane, sources)) is not None)
        if len(planes) == len(site.tensors) - 1:
            of_input.setdefault(site.tensors[0], {})[planes[0].weight] = _Matmul(site, planes, position)
    declared: set[str] = set()
    for matmuls in of_input.values():
        for merged, names in lowering.merged.items():
            if set(names) <= set(matmuls):
                _merge(module, merged, [matmuls[name] for name in names], declared)


def _merge(module: ir.Module, merged: str, siblings: Sequence[_Matmul], declared: set[str]) -> None:
    """Put one matmul where the first of its siblings stands, and slices of it in the place of all."""
    first = min(siblings, key=lambda sibling: sibling.position).site
    rows = sum(sibling.rows for sibling in siblings)
    with ir.InsertionPoint(first.operation), first.operation.location:
        planes = []
        for index, parameter in enumerate(siblings[0].planes):
            parts = [sibling.site.call.operands[1 + index] for sibling in siblings]
            joined = TensorType((sum(part.shape[0] or 0 for part in parts), *parts[0].shape[1:]), parts[0].element)
            name = f"{merged}.{parameter.plane}"
            if name not in declared:
                _declare(module, name, parameter.scope, joined)
                declared.add(name)
            planes.append(_load(name, joined, like=first.tensors[1 + index]))
        listed = create("torch.prim.ListConstruct", planes, (ir.Type.parse("!torch.list<vtensor>"),)).result
        # Format and layout are the same for all.
        _, _, format_, layout, _ = first.operation.operands
        product = ir.Operation.create(
            first.operation.name,
            results=[torch_type((*first.call.results[0].shape[:-1], rows), "f32")],
            operands=[first.tensors[0], listed, format_, layout, torch_int(rows)],
            attributes={"name": first.operation.attributes["name"]},
        ).result
        slices = []
        start = 0
        for sibling in siblings:
            bounds = [torch_int(value) for value in (2, start, start + sibling.rows, 1)]
            part = create("torch.aten.slice.Tensor", (product, *bounds), (sibling.site.operation.results[0].type,))
            slices.append(part.result)
            start += sibling.rows
    for sibling, part in zip(siblings, slices, strict=True):
        replace(sibling.site.operation, part)


def _parameter(plane: ir.Value, sources: dict[str, ir.Operation]) -> _Parameter | None:
    """Which parameter a plane is loaded from."""
    cast = producer(plane, "torch_c.from_builtin_tensor")
    load = None if cast is None else producer(cast.operands[0], "util.global.load")
    if load is None:
        return None
    source = sources[ir.FlatSymbolRefAttr(load.attributes["global"]).value]
    match = _PARAMETER.match(str(source.attributes["initial_value"])) if "initial_value" in source.attributes else None
    return None if match is None else _Parameter(match["scope"], match["name"])


def _declare(module: ir.Module, name: str, scope: str, tensor: TensorType) -> None:
    text = f'util.global private @"{name}" = #flow.parameter.named<"{scope}"::"{name}"> : {tensor}'
    parsed = ir.Module.parse(text)
    declaration = parsed.body.operations[0].operation.detach_from_parent()
    ir.InsertionPoint.at_block_begin(module.body).insert(declaration)


def _load(name: str, tensor: TensorType, like: ir.Value) -> ir.Value:
    load = ir.Operation.create(
        "util.global.load",
        results=[ir.Type.parse(str(tensor))],
        attributes={"global": ir.FlatSymbolRefAttr.get(name)},
    )
    # torch tells signed from unsigned integers.
    element = str(like.type).rpartition(",")[2].removesuffix(">")
    torch_tensor = ir.Type.parse(f"!torch.vtensor<[{','.join(map(str, tensor.shape))}],{element}>")
    return create("torch_c.from_builtin_tensor", (load.result,), (torch_tensor,)).result
