"""The seam: which implementation stands in for an `llmir` op on a target.

One table, op by op, in order of preference: the first implementation that accepts the target and the shapes is taken.
The last of each is portable and accepts everything, so that a module compiles where no kernel exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.calls import LlmirCall
from llmir_iree.plugins.portable import definitions as portable


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `emit` gives the MLIR of the definition by symbol: private `util.func`s, of which `call.symbol` takes the call's
    tensors as builtin tensors, then the layer as an index if the op has one, and gives the op's results.
    """

    name: str
    emit: Callable[[LlmirCall], dict[str, str]]
    targets: frozenset[str] | None = None
    accepts: Callable[[LlmirCall], bool] = lambda _: True

    def serves(self, call: LlmirCall, target: str) -> bool:
        """Whether this implementation can stand in for the call on the target."""
        return (self.targets is None or target in self.targets) and self.accepts(call)


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "append_kv": (Implementation("portable", portable.append_kv),),
    "paged_attention": (Implementation("portable", portable.paged_attention),),
    "quantized_matmul": (
        # SPIR-V targets cannot legalise the fused form: its vectorised indices want workgroup memory of type index.
        Implementation(
            "portable-fused",
            portable.quantized_matmul_fused,
            targets=frozenset({"llvm-cpu", "cuda", "rocm"}),
            accepts=portable.gains_from_fusion,
        ),
        Implementation("portable", portable.quantized_matmul),
    ),
}


def choose(call: LlmirCall, target: str) -> Implementation:
    """The first implementation that serves a call on a target.

    Raises:
        CompileError: none does.
    """
    for implementation in IMPLEMENTATIONS[call.op]:
        if implementation.serves(call, target):
            return implementation
    raise CompileError(f"llmir.{call.op} has no implementation for {target} with operands {call.operands}")
