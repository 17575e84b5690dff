"""The seam: which implementation stands in for an `llmir` op on a target.

One table, op by op, in order of preference: the first implementation that accepts the target and the shapes is taken.
The last of each is portable and accepts everything, so that a module compiles where no kernel exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import FUSED_OPS, LlmirCall
from llmir_iree.plugins.gpu import attention as gpu_attention
from llmir_iree.plugins.gpu import formulations
from llmir_iree.plugins.gpu import matmul as gpu_matmul
from llmir_iree.plugins.kernels import definitions as kernels
from llmir_iree.plugins.lowering import Lowering, Preference, Target
from llmir_iree.plugins.portable import definitions as portable

Kind = Literal["object", "kernel", "formulation", "portable"]
"""What an implementation is: C, compiled to objects; a GPU kernel in MLIR; a form that the compiler makes one good
dispatch of; or one that compiles for every target."""

_KINDS: dict[Preference, frozenset[Kind]] = {
    "best": frozenset({"object", "kernel", "formulation", "portable"}),
    "kernels": frozenset({"object", "kernel", "portable"}),
    "formulations": frozenset({"object", "kernel", "formulation", "portable"}),
    "portable": frozenset({"portable"}),
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `emit` gives the MLIR of the definition by symbol: private `util.func`s and what they need, such as executables.
    Of these `call.symbol` takes the call's tensors as builtin tensors, then the layer as an index if the op has one,
    and gives the op's results.
    """

    name: str
    emit: Callable[[LlmirCall, Target], dict[str, str]]
    accepts: Callable[[LlmirCall, Target], bool] = lambda _call, _target: True
    kind: Kind = "portable"

    @property
    def is_portable(self) -> bool:
        """Whether no target has anything better."""
        return self.kind == "portable"

    @property
    def has_fused_forms(self) -> bool:
        """Whether ops that passes make of this one, and of what surrounds it, have an implementation of this kind."""
        return self.kind == "object"


def _portable(
    name: str,
    emit: Callable[[LlmirCall], dict[str, str]],
    accepts: Callable[[LlmirCall], bool] = lambda _: True,
    families: frozenset[str] | None = None,
) -> Implementation:
    return Implementation(
        name,
        lambda call, _: emit(call),
        lambda call, target: (families is None or target.family in families) and accepts(call),
    )


_Emit = Callable[[LlmirCall, Target], dict[str, str]]
_Accepts = Callable[[LlmirCall, Target], bool]


def _object(emit: _Emit, accepts: _Accepts) -> Implementation:
    return Implementation("cpu-kernels", emit, accepts, "object")


def _gpu_kernel(emit: _Emit, accepts: _Accepts) -> Implementation:
    return Implementation("gpu-kernels", emit, accepts, "kernel")


def _formulation(name: str, emit: _Emit, accepts: _Accepts) -> Implementation:
    return Implementation(name, emit, accepts, "formulation")


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "append_kv": (
        _object(kernels.append_kv, kernels.accepts_append_kv),
        _gpu_kernel(gpu_attention.append_kv, gpu_attention.accepts_append_kv),
        _portable("portable", portable.append_kv),
    ),
    "paged_attention": (
        _object(kernels.paged_attention, kernels.accepts_paged_attention),
        _formulation("gpu-matrix", formulations.paged_attention, formulations.accepts_prefill_attention),
        _gpu_kernel(gpu_attention.paged_attention, gpu_attention.accepts_paged_attention),
        _formulation("gpu-lanes", formulations.paged_attention, formulations.accepts_decode_attention),
        _portable("portable", portable.paged_attention),
    ),
    "quantized_matmul": (
        _object(kernels.quantized_matmul, kernels.accepts_quantized_matmul),
        _formulation("gpu-matrix", formulations.quantized_matmul, formulations.accepts_quantized_matmul),
        _gpu_kernel(gpu_matmul.quantized_matmul, gpu_matmul.accepts_quantized_matmul),
        _formulation("gpu-lanes", formulations.multiply_few_rows, formulations.accepts_few_rows),
        # SPIR-V targets cannot legalise the fused form: its vectorised indices want workgroup memory of type index.
        _portable(
            "portable-fused",
            portable.quantized_matmul_fused,
            portable.gains_from_fusion,
            families=frozenset({"llvm-cpu", "cuda", "rocm"}),
        ),
        _portable("portable", portable.quantized_matmul),
    ),
    # Passes make these of ops that kernels serve, and of no others.
    **{op: (_object(getattr(kernels, op), lambda _call, _target: True),) for op in FUSED_OPS},
}


def choose(call: LlmirCall, lowering: Lowering) -> Implementation:
    """The first implementation that serves a call.

    Raises:
        CompileError: none does, or a size is not known that must be.
    """
    _check_sizes(call)
    implementations = IMPLEMENTATIONS[call.op]
    if lowering.preference == "formulations":
        implementations = tuple(sorted(implementations, key=lambda one: one.kind != "formulation"))
    for implementation in implementations:
        if implementation.kind in _KINDS[lowering.preference] and implementation.accepts(call, lowering.target):
            return implementation
    raise CompileError(f"llmir.{call.op} has no implementation for {lowering.target.name}, operands {call.operands}")


# Where dimensions stand, among an op's operands, that need not be known: of the query or the activations the tokens, of
# the cache the pages, of the table the entries.
_DYNAMIC: dict[str, tuple[frozenset[int], ...]] = {
    "append_kv": tuple(map(frozenset, ({0}, {1}, {1}, {1}, {1}))),
    "paged_attention": tuple(map(frozenset, ({1}, {0}, {1}, {1}))),
    "quantized_matmul": (frozenset({1}),),
}


def _check_sizes(call: LlmirCall) -> None:
    for index, (operand, dynamic) in enumerate(zip(call.operands, _DYNAMIC.get(call.op, ()), strict=False)):
        if unknown := [dim for dim, size in enumerate(operand.shape) if size is None and dim not in dynamic]:
            raise CompileError(f"llmir.{call.op}: size {unknown[0]} of operand {index} must be known, it is {operand}")
