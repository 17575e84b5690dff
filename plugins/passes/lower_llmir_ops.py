"""lower-llmir-ops: replaces every `llmir` op by a call of the definition that the seam chooses for the target.

Before: a module in the torch dialect with `torch.operator "torch.llmir.*"`.
After: no such op is left; each became a `util.call` of a private function on builtin tensors, one function for every
distinct combination of types and constants.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import Site, find_calls
from llmir_iree.plugins.seam import choose


def lower_llmir_ops(module: ir.Module, target: str) -> None:
    """Lower every `llmir` op of a module, in place.

    Raises:
        CompileError: an op without an implementation for the target, or a definition that is not valid MLIR.
    """
    definitions: dict[str, str] = {}
    for site in find_calls(module):
        definitions.update(choose(site.call, target).emit(site.call))
        _replace_by_call(site)
    _append(module, definitions)


def _replace_by_call(site: Site) -> None:
    call = site.call
    with ir.InsertionPoint(site.operation), site.operation.location:
        operands = [
            ir.Operation.create(
                "torch_c.to_builtin_tensor", results=[ir.Type.parse(str(builtin))], operands=[tensor]
            ).result
            for tensor, builtin in zip(site.tensors, call.operands, strict=True)
        ]
        if call.layer is not None:
            layer = ir.IntegerAttr.get(ir.IndexType.get(), call.layer)
            operands.append(
                ir.Operation.create("arith.constant", results=[ir.IndexType.get()], attributes={"value": layer}).result
            )
        replacement = ir.Operation.create(
            "util.call",
            results=[ir.Type.parse(str(result)) for result in call.results],
            operands=operands,
            attributes={"callee": ir.FlatSymbolRefAttr.get(call.symbol)},
        )
        for old, new in zip(site.operation.results, replacement.results, strict=True):
            torch_value = ir.Operation.create("torch_c.from_builtin_tensor", results=[old.type], operands=[new])
            old.replace_all_uses_with(torch_value.result)
    site.operation.erase()


def _append(module: ir.Module, definitions: dict[str, str]) -> None:
    try:
        parsed = ir.Module.parse("\n".join(definitions.values()))
    except ir.MLIRError as error:
        raise CompileError(f"a definition among {', '.join(definitions)} is not valid MLIR: {error}") from None
    for function in list(parsed.body.operations):
        module.body.append(function.operation.detach_from_parent())
