"""The seam: which implementation stands in for an `llmir` op on a target.

One table, op by op, in order of preference: the first implementation that accepts the target and the shapes is taken.
The last of each is portable and accepts everything, so that a module compiles where no kernel exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import FUSED_OPS, LlmirCall
from llmir_iree.plugins.kernels import definitions as kernels
from llmir_iree.plugins.lowering import Lowering, Target
from llmir_iree.plugins.portable import definitions as portable


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
    is_portable: bool = True


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


def _kernel(
    emit: Callable[[LlmirCall, Target], dict[str, str]], accepts: Callable[[LlmirCall, Target], bool]
) -> Implementation:
    return Implementation("cpu-kernels", emit, accepts, is_portable=False)


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "append_kv": (
        _kernel(kernels.append_kv, kernels.accepts_append_kv),
        _portable("portable", portable.append_kv),
    ),
    "paged_attention": (
        _kernel(kernels.paged_attention, kernels.accepts_paged_attention),
        _portable("portable", portable.paged_attention),
    ),
    "quantized_matmul": (
        _kernel(kernels.quantized_matmul, kernels.accepts_quantized_matmul),
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
    **{op: (_kernel(getattr(kernels, op), lambda _call, _target: True),) for op in FUSED_OPS},
}


def choose(call: LlmirCall, lowering: Lowering) -> Implementation:
    """The first implementation that serves a call.

    Raises:
        CompileError: none does.
    """
    for implementation in IMPLEMENTATIONS[call.op]:
        is_wanted = implementation.is_portable or lowering.preference == "best"
        if is_wanted and implementation.accepts(call, lowering.target):
            return implementation
    raise CompileError(f"llmir.{call.op} has no implementation for {lowering.target.name}, operands {call.operands}")
