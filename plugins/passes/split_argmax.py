"""split-argmax: replaces the arg-max over the vocabulary by two reductions, for targets that cannot compile it whole.

Before: `torch.aten.argmax` of float32 [batch, vocab] along the vocabulary.
After: on cuda and rocm, a `util.call` of a private function; elsewhere, and for other shapes, nothing changed.

IREE's GPU code generation fails to distribute `iree_linalg_ext.arg_compare` for many vocabulary sizes (32000, 49152).
SPIR-V targets are the other way round: they compile that op, and not the reductions.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import TensorType, append_definitions, call_definition, walk
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.portable import definitions

ARGMAX = "torch.aten.argmax"
TARGETS = frozenset({"cuda", "rocm"})


def split_argmax(module: ir.Module, lowering: Lowering) -> None:
    """Split every arg-max over [batch, vocab], in place."""
    if lowering.target.family not in TARGETS:
        return
    functions: dict[str, str] = {}
    for operation in [operation for operation in walk(module.operation) if operation.name == ARGMAX]:
        shape = _static_matrix(operation)
        if shape is None:
            continue
        symbol = f"llmir_argmax_{shape[0]}x{shape[1]}"
        functions[symbol] = definitions.argmax(symbol, *shape)
        call_definition(operation, symbol, [operation.operands[0]])
    append_definitions(module, functions)


def _static_matrix(operation: ir.Operation) -> tuple[int, int] | None:
    """The operand's [batch, vocab] if it is a float32 matrix of known size, reduced along its last dimension."""
    try:
        operand = TensorType.parse(str(operation.operands[0].type))
        result = TensorType.parse(str(operation.results[0].type))
    except CompileError:
        return None
    if operand.element != "f32" or len(operand.shape) != 2 or result.shape != operand.shape[:1]:
        return None
    batch, vocab = operand.shape
    return None if batch is None or vocab is None else (batch, vocab)
