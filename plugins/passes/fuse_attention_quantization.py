"""fuse-attention-quantization: lets attention of one new token a row write codes for the matmul that takes its output.

Before: `llmir.quantize_activations` of what `llmir.rope_append_attend` gives.
After: `llmir.rope_append_attend` gives the codes.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.params.layouts import GROUP
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import attributes_of, create, only_user, operations, producer, replace, tensor_type

ATTENTION = "llmir.rope_append_attend"


def fuse_attention_quantization(module: ir.Module, _lowering: Lowering) -> None:
    """Fuse every quantisation of an attention's output, in place."""
    for quantization in operations(module, "llmir.quantize_activations"):
        output = quantization.operands[0]
        attention = producer(output, ATTENTION)
        if attention is None or only_user(output, "llmir.quantize_activations") is None:
            continue
        columns = tensor_type(output).shape[-1] or 0
        head_dim = columns // int(attributes_of(attention)["heads"])
        if head_dim % GROUP:
            continue
        with ir.InsertionPoint(attention), attention.location:
            types = (quantization.results[0].type, attention.results[1].type)
            fused = create(ATTENTION, attention.operands, types, attributes_of(attention))
        attention.results[1].replace_all_uses_with(fused.results[1])
        replace(quantization, fused.results[0])
