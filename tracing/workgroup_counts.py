"""Reads how many workgroups an export declares: the binary alone does not tell, the host computes them."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.ir_values import Evaluator
from llmir_iree.tracing.stream_copies import walk

_EXECUTABLE = "hal.executable"
_EXPORT = "hal.executable.export"
_RETURN = "hal.return"


def declared_workgroups(
    targets_ir: str, executable: str, export: str, workload: Sequence[int | None]
) -> tuple[int, int, int] | None:
    """The workgroup count that an export computes from a workload.

    Args:
        targets_ir: the module once its executables are translated, iree-compile's phase "executable-targets".
        executable: symbol of the executable.
        export: symbol of the export in it.
        workload: what a dispatch passes to it, None for a value that is not known.

    Returns:
        None if there is no such export, or if its count is not known: it depends on a value that is not, or is computed
        by ops that are not understood.

    Raises:
        CaptureError: the text is not MLIR.
    """
    with ir.Context():
        try:
            module = ir.Module.parse(targets_ir)
        except ir.MLIRError as error:
            raise CaptureError(f"the IR of executables cannot be read: {str(error).splitlines()[0]}") from None
        for view in module.body.operations:
            if view.operation.name == _EXECUTABLE and _symbol(view.operation) == executable:
                for operation in walk(view.operation):
                    if operation.name == _EXPORT and _symbol(operation) == export:
                        return _count(operation, workload)
    return None


def _count(export: ir.Operation, workload: Sequence[int | None]) -> tuple[int, int, int] | None:
    """The count that an export's region returns, whose arguments are the device and the workload."""
    for region in export.regions:
        for block in region.blocks:
            _device, *arguments = block.arguments
            if len(arguments) != len(workload):
                return None
            evaluate = Evaluator(dict(zip(arguments, workload, strict=True)))
            for view in block.operations:
                if view.operation.name == _RETURN:
                    counts = [evaluate(operand) for operand in view.operation.operands]
                    x, y, z = (*counts, None, None, None)[:3]
                    return None if x is None or y is None or z is None else (x, y, z)
    return None


def _symbol(operation: ir.Operation) -> str:
    return str(ir.StringAttr(operation.attributes["sym_name"]).value)
