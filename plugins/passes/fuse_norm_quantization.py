"""fuse-norm-quantization: one dispatch for a residual add, the RMSNorm of the sum, and the quantisation of the norm.

Before: `llmir.quantize_activations` of weight * (x * rsqrt(mean(x ** 2) + epsilon)).
After: `llmir.norm_quantize` of x, or, if x is a sum of two tensors, `llmir.add_norm_quantize`, which gives it as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.plugins.calls import read_constant
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import (
    constants,
    create,
    only_user,
    operations,
    producer,
    replace,
    tensor_type,
    users,
)


@dataclass(frozen=True)
class _Norm:
    """weight * (x * rsqrt(mean(x ** 2) + epsilon)), and the operations that x goes through."""

    x: ir.Value
    weight: ir.Value
    epsilon: float
    takers: tuple[ir.Operation, ...]


def fuse_norm_quantization(module: ir.Module, _lowering: Lowering) -> None:
    """Fuse every norm whose result is quantised and not used otherwise, in place."""
    for quantization in operations(module, "llmir.quantize_activations"):
        norm = _match(quantization.operands[0])
        if norm is None:
            continue
        attributes = {"epsilon": norm.epsilon}
        codes = quantization.results[0].type
        total = producer(norm.x, "torch.aten.add.Tensor")
        with ir.InsertionPoint(quantization), quantization.location:
            if total is None or not _can_move(total, norm, quantization):
                fused = create("llmir.norm_quantize", (norm.x, norm.weight), (codes,), attributes)
                replace(quantization, fused.result)
                continue
            operands = (*list(total.operands)[:2], norm.weight)
            fused = create("llmir.add_norm_quantize", operands, (norm.x.type, codes), attributes)
        # The sum first: the norm may be the only one that takes it, and would take it along.
        replace(total, fused.results[0])
        replace(quantization, fused.results[1])


def _match(value: ir.Value) -> _Norm | None:
    scaled = producer(value, "torch.aten.mul.Tensor")
    if scaled is None or only_user(value, "llmir.quantize_activations") is None:
        return None
    weight, normed = scaled.operands
    product = producer(normed, "torch.aten.mul.Tensor")
    if product is None or len(tensor_type(weight).shape) != 1:
        return None
    x, inverse = product.operands
    root = producer(inverse, "torch.aten.rsqrt")
    shifted = None if root is None else producer(root.operands[0], "torch.aten.add.Scalar")
    mean = None if shifted is None else producer(shifted.operands[0], "torch.aten.mean.dim")
    square = None if mean is None else producer(mean.operands[0], "torch.aten.pow.Tensor_Scalar")
    if shifted is None or mean is None or square is None:
        return None
    epsilon = read_constant(shifted.operands[1])
    is_last_mean = constants(mean.operands[1]) == [-1] and read_constant(mean.operands[2]) == 1
    is_square = square.operands[0] == x and read_constant(square.operands[1]) == 2
    if not is_last_mean or not is_square or not isinstance(epsilon, float) or read_constant(shifted.operands[2]) != 1:
        return None
    inner = (root, shifted, mean, square, product)
    if any(len(users(operation.results[0])) != 1 for operation in inner if operation is not None):
        return None
    return _Norm(x, weight, epsilon, (square, product))


def _can_move(total: ir.Operation, norm: _Norm, quantization: ir.Operation) -> bool:
    """Whether a sum of equal shapes may be taken where the norm is quantised, before anyone else asks for it."""
    left, right, _alpha = total.operands
    is_plain = tensor_type(left) == tensor_type(right) == tensor_type(norm.x) and read_constant(total.operands[2]) == 1
    others = [user for user in users(norm.x) if user not in norm.takers]
    return is_plain and all(quantization.is_before_in_block(user) for user in others)
