"""share-quantization: takes the quantisation of activations out of the matmuls, so that matmuls can share it.

Before: `llmir.quantized_matmul`s, each of which a kernel is going to compute from float32.
After: one `llmir.quantize_activations` for each tensor that they take, and a `llmir.multiply` for each of them.

Activations that become queries, keys or values are quantised to two terms, the codes and the codes of what is left: an
error there is raised to a power by the softmax. With one term for all, the cosine of SmolLM2's logits to the exact ones
falls to 0.990 at a few positions, and with two terms here it stays above 0.997.
"""

from __future__ import annotations

from iree.compiler import ir

from llmir_iree.params.formats import FORMATS
from llmir_iree.plugins.calls import Site, find_calls
from llmir_iree.plugins.kernels.definitions import quantized_type
from llmir_iree.plugins.lowering import Lowering
from llmir_iree.plugins.matching import (
    create,
    operation_name,
    producer,
    replace,
    tensor_type,
    torch_type,
    users,
)
from llmir_iree.plugins.seam import choose

ATTENTION = frozenset({"llmir.append_kv", "llmir.rope_append", "llmir.rope_attend", "llmir.rope_append_attend"})
"""Takes queries or keys."""

MATMUL = "llmir.quantized_matmul"

# Between a projection and attention: shapes, rotary embedding, biases, head norms.
_MOST_STEPS = 12


def share_quantization(module: ir.Module, lowering: Lowering) -> None:
    """Quantise every tensor of activations once, in place.

    Raises:
        CompileError: an op without an implementation for the target.
    """
    shared: dict[tuple[ir.Value, int], ir.Value] = {}
    for site in find_calls(module):
        if site.call.op != "quantized_matmul" or not _quantizes(site, lowering):
            continue
        x = _without_whole_slices(site.tensors[0])
        terms = 2 if _reaches_attention(site.operation, _MOST_STEPS) else 1
        with ir.InsertionPoint(site.operation), site.operation.location:
            if (x, terms) not in shared:
                shared[x, terms] = _quantize(x, terms)
            constants = {name: site.call.constant(name) for name in ("format", "layout", "out_features")}
            product = create(
                "llmir.multiply",
                (shared[x, terms], *site.tensors[1:]),
                (site.operation.results[0].type,),
                {**constants, "terms": terms},
            )
        replace(site.operation, product.result)


def _quantizes(site: Site, lowering: Lowering) -> bool:
    return FORMATS[str(site.call.constant("format"))].is_quantized and not choose(site.call, lowering).is_portable


def _without_whole_slices(x: ir.Value) -> ir.Value:
    """What slices were taken of, as long as they are all of it, as the last position of a decode is."""
    part = producer(x, "torch.aten.slice.Tensor")
    while part is not None and part.operands[0].type == x.type and None not in tensor_type(x).shape:
        x = part.operands[0]
        part = producer(x, "torch.aten.slice.Tensor")
    return x


def _quantize(x: ir.Value, terms: int) -> ir.Value:
    codes = quantized_type(tensor_type(x), terms)
    return create(
        "llmir.quantize_activations", (x,), (torch_type(codes.shape, codes.element),), {"terms": terms}
    ).result


def _reaches_attention(operation: ir.Operation, steps: int) -> bool:
    """Whether a result goes to attention by less than `steps` operations, none of them a matmul."""
    following = [user for result in operation.results for user in users(result)]
    names = {operation_name(user) for user in following}
    if names & ATTENTION or "llmir.paged_attention" in names:
        return True
    return steps > 1 and any(
        _reaches_attention(user, steps - 1) for user in following if operation_name(user) != MATMUL
    )
