"""The pipeline of the plugin: named passes over a portable module, in order, for a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.lowering import Lowering, Preference, Target
from llmir_iree.plugins.passes.lower_llmir_ops import lower_llmir_ops
from llmir_iree.plugins.passes.split_argmax import split_argmax


@dataclass(frozen=True)
class Pass:
    """A rewrite of a whole module."""

    name: str
    summary: str
    apply: Callable[[ir.Module, Lowering], None]


PIPELINE: tuple[Pass, ...] = (
    Pass("split-argmax", "replace the arg-max by two reductions on targets that cannot compile it", split_argmax),
    Pass("lower-llmir-ops", "replace each llmir op by the definition that the seam chooses", lower_llmir_ops),
)


@dataclass(frozen=True)
class Lowered:
    """What the pipeline made of a portable module: MLIR for iree-compile, the passes that ran, and what they chose.

    `implementations` says of every op how many calls each implementation stands in for.
    """

    text: str
    passes: tuple[str, ...]
    implementations: dict[str, dict[str, int]]


def lower(portable: str, target: Target, preference: Preference = "portable") -> Lowered:
    """Run the pipeline over a portable module.

    Args:
        portable: MLIR of the torch dialect with `llmir` ops, as the export writes it.
        target: what the module is compiled for, with all flags of the compiler; the seam chooses by it.
        preference: which implementations the seam may choose.

    Raises:
        CompileError: the text is not MLIR, or a pass left a module that does not verify.
    """
    lowering = Lowering(target, preference)
    with ir.Context(), ir.Location.unknown():
        try:
            module = ir.Module.parse(portable)
        except ir.MLIRError as error:
            raise CompileError(f"the portable module is not valid MLIR: {error}") from None
        for step in PIPELINE:
            step.apply(module, lowering)
            try:
                module.operation.verify()
            except ir.MLIRError as error:
                raise CompileError(f"pass {step.name} left an invalid module: {error}") from None
        implementations = {op: dict(names) for op, names in lowering.implementations.items()}
        return Lowered(str(module), tuple(step.name for step in PIPELINE), implementations)
