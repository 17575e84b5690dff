"""share-quantization: takes the quantisation of activations out of the matmuls, so that matmuls can share it.

Before: `llmir.quantized_matmul`s, each of which a kernel is going to compute from float32.
After: one `llmir.quantize_activations` for each tensor that they take, and a `llmir.multiply` for each of them.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.params.formats import FORMATS
from llmir_iree.plugins.calls import Site, find_calls
from llmir_iree.plugins.kernels.definitions import quantized_type
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import create, producer, replace, tensor_type, torch_type
from llmir_iree.plugins.seam import choose


def share_quantization(module: ir.Module, lowering: Lowering) -> None:
    """Quantise every tensor of activations once, in place.

    Raises:
        CompileError: an op without an implementation for the target.
    """
    shared: dict[ir.Value, ir.Value] = {}
    for site in find_calls(module):
        if site.call.op != "quantized_matmul" or not _quantizes(site, lowering):
            continue
        x = _without_whole_slices(site.tensors[0])
        with ir.InsertionPoint(site.operation), site.operation.location:
            if x not in shared:
                shared[x] = _quantize(x)
            constants = {name: site.call.constant(name) for name in ("format", "layout", "out_features")}
            operands = (shared[x], *site.tensors[1:])
            product = create("llmir.multiply", operands, (site.operation.results[0].type,), constants)
        replace(site.operation, product.result)


def _quantizes(site: Site, lowering: Lowering) -> bool:
    return choose(site.call, lowering).has_fused_forms and FORMATS[str(site.call.constant("format"))].is_quantized


def _without_whole_slices(x: ir.Value) -> ir.Value:
    """What slices were taken of, as long as they are all of it, as the last position of a decode is."""
    part = producer(x, "torch.aten.slice.Tensor")
    while part is not None and part.operands[0].type == x.type and None not in tensor_type(x).shape:
        x = part.operands[0]
        part = producer(x, "torch.aten.slice.Tensor")
    return x


def _quantize(x: ir.Value) -> ir.Value:
    codes = quantized_type(tensor_type(x))
    return create("llmir.quantize_activations", (x,), (torch_type(codes.shape, codes.element),)).result
