"""fold-silu-mul: lets the matmul of gate and up write silu(gate) * up, quantised for the matmul that takes it.

Before: a `llmir.multiply` by merged weights, whose two halves meet in silu and mul, and a `llmir.quantize_activations`.
After: one `llmir.gated_multiply`, which gives the codes.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.params.layouts import GROUP
from llmir_iree.plugins.calls import read_constant
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import attributes_of, create, only_user, operations, producer, replace, users

LAST = 2**63 - 1
"""The end of a slice that has none, in torch."""


def fold_silu_mul(module: ir.Module, _lowering: Lowering) -> None:
    """Fold every silu and mul between two matmuls, in place."""
    for quantization in operations(module, "llmir.quantize_activations"):
        product = _gated_product(quantization)
        if product is None:
            continue
        attributes = attributes_of(product)
        attributes["out_features"] = int(attributes["out_features"]) // 2
        with ir.InsertionPoint(quantization), quantization.location:
            gated = create("llmir.gated_multiply", product.operands, (quantization.results[0].type,), attributes)
        replace(quantization, gated.result)


def _gated_product(quantization: ir.Operation) -> ir.Operation | None:
    """The matmul of gate and up that a quantised tensor comes from, if nobody else needs what is between."""
    both = producer(quantization.operands[0], "torch.aten.mul.Tensor")
    if both is None or only_user(both.results[0], "llmir.quantize_activations") is None:
        return None
    silu = producer(both.operands[0], "torch.aten.silu")
    up = producer(both.operands[1], "torch.aten.slice.Tensor")
    gate = None if silu is None else producer(silu.operands[0], "torch.aten.slice.Tensor")
    if silu is None or gate is None or up is None or gate.operands[0] != up.operands[0]:
        return None
    product = producer(gate.operands[0], "llmir.multiply")
    if product is None or len(users(product.results[0])) != 2:
        return None
    columns = int(attributes_of(product)["out_features"])
    half = columns // 2
    if half % GROUP or _bounds(gate) != [2, 0, half, 1] or _bounds(up) != [2, half, columns, 1]:
        return None
    alone = only_user(gate.results[0], "torch.aten.silu") and only_user(silu.results[0], "torch.aten.mul.Tensor")
    return product if alone and only_user(up.results[0], "torch.aten.mul.Tensor") else None


def _bounds(slice_: ir.Operation) -> list[object]:
    return [read_constant(operand) for operand in list(slice_.operands)[1:]]
