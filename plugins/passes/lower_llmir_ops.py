"""lower-llmir-ops: replaces every `llmir` op by a call of the definition that the seam chooses for the target.

Before: a module in the torch dialect with `torch.operator "torch.llmir.*"`.
After: no such op is left; each became a `util.call` of a private function on builtin tensors, one function for every
distinct combination of types and constants. Executables that functions dispatch stand beside them, once each.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.plugins.calls import append_definitions, call_definition, find_calls
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.seam import choose


def lower_llmir_ops(module: ir.Module, lowering: Lowering) -> None:
    """Lower every `llmir` op of a module, in place.

    Raises:
        CompileError: an op without an implementation for the target, or a definition that is not valid MLIR.
    """
    functions: dict[str, str] = {}
    for site in find_calls(module):
        implementation = choose(site.call, lowering)
        lowering.record(site.call.op, implementation.name)
        if site.call.symbol not in functions:
            functions.update(implementation.emit(site.call, lowering.target))
        call_definition(site.operation, site.call.symbol, site.tensors, site.call.layer)
    append_definitions(module, functions)
