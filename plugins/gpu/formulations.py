"""Definitions that name no threads: forms of ops that iree-compile itself turns into one good dispatch on a GPU.

How to tile them, and how lanes share them, it is told where its own choice is bad. Those of decodes stand behind the
kernels in the seam; docs/path-of-data.md says by which figures.
"""

from __future__ import annotations

import math

from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import GROUP, TILE_ROWS
from llmir_iree.plugins.calls import LlmirCall
from llmir_iree.plugins.gpu import attention, matmul
from llmir_iree.plugins.gpu.device import Device, read_device
from llmir_iree.plugins.gpu.templates import Value, render
from llmir_iree.plugins.lowering import Target

# Elsewhere iree-compile has no matrix instructions, or does not take this form to them.
FAMILIES = frozenset({"cuda", "rocm"})

# With fewer rows most of a matrix instruction computes nothing.
_FEWEST_ROWS = 32

_LARGEST = {"f16": 65504.0, "bf16": 3.3895314e38}

# Registers do not hold what the compiler's own tiles want: on RDNA, and of Blackwell's smaller chips ptxas spills where
# of the others it does not. Less deep tiles fit, on RDNA of fewer columns a subgroup. By the beginning of the
# instruction's name, or of the architecture's.
_SMALL_REGISTERS = {"WMMA": "2, 2, 1", "sm_12": "2, 4, 1"}
_COMPILATION_INFO = (
    "\n            attrs = {{compilation_info = #iree_codegen.compilation_info<"
    "lowering_config = #iree_gpu.lowering_config<{{mma_kind = #iree_gpu.mma_layout<{instruction}>, "
    "promote_operands = [0, 1], reduction = [0, 0, 0, {groups}, 2], subgroup = [{subgroup_tile}, 0, 0], "
    "workgroup = [64, 4, 16, 0, 0]}}>, "
    "translation_info = #iree_codegen.translation_info<pipeline = #iree_gpu.pipeline<TileAndFuse> "
    "workgroup_size = [128, 1, 1] subgroup_size = {subgroup}, {{gpu_pipeline_options = #iree_gpu.pipeline_options<"
    "prefetch_num_stages = 2, no_reduce_shared_memory_bank_conflicts = false>}}>>}}"
)

# Of how many rows a reduction by rows keeps sums in registers, and in which formats a step of 8 columns is whole words.
_MOST_ROWS = 8
_ROW_FORMATS = ("f16", "bf16", "q4_0", "q4_1", "q8_0")
_LANES_PER_GROUP = 16
_MOST_SUBGROUPS = 4

# The compiler's own tiles of an attention are of half a head's values, and so compute every score twice, or do not fit
# RDNA's registers. These are of whole heads; four subgroups take 16 tokens each.
_QUERY_TILE = 64
_LEAST_PAGE = 16
_HEADS = (32, 64, 128)
# By instruction: how many positions a tile has at least and at most, and in which order of rows and columns the scores
# that one product leaves in registers are what the next one takes.
_ATTENTION_KINDS = {
    "NV_MMA_SYNC_F32_16x8x16": (16, 32, ""),
    "MFMA_F32_16x16x16": (16, 32, ", col_major = true"),
    "MFMA_F32_16x16x32": (32, 32, ", col_major = true"),
    "WMMAR3_F32_16x16x16": (16, 16, ""),
    "WMMAR4_F32_16x16x16": (16, 16, ""),
}
# A lane of a decode holds sums of this many heads.
_MOST_HEADS_EACH = 4
_LANE_COLUMNS = 8


def accepts_quantized_matmul(call: LlmirCall, target: Target) -> bool:
    """Whether the device multiplies matrices, and the call has a known number of rows that is worth it."""
    if target.family not in FAMILIES or not matmul.accepts_quantized_matmul(call, target):
        return False
    batch, seq, _ = call.operands[0].shape
    if batch is None or seq is None or batch * seq < _FEWEST_ROWS:
        return False
    return _unit(call) in read_device(target).matrix_instructions


def quantized_matmul(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `quantized_matmul` as a contraction of 16-bit floats that matrix instructions add up in float32.

    Activations and weights are rounded to float16, or bfloat16 if the weights are, each by 2 ** -11 (2 ** -8) of its
    value at most.

    Raises:
        CompileError: iree-compile does not know the target's device.
    """
    values = {
        **_matmul_values(call),
        "unit": _unit(call),
        "largest": f"{_LARGEST[_unit(call)]:.9e}",
        "attributes": _attributes(call, read_device(target)),
    }
    return {call.symbol: render("multiply_matrix", **values)}


def accepts_few_rows(call: LlmirCall, target: Target) -> bool:
    """Whether a `quantized_matmul` has a few rows of a simple format, and columns that subgroups share evenly."""
    if target.family not in FAMILIES or not matmul.accepts_quantized_matmul(call, target):
        return False
    batch, seq, depth = call.operands[0].shape
    if batch is None or seq is None or depth is None or batch * seq > _MOST_ROWS:
        return False
    lanes_of_groups = read_device(target).subgroup // _LANES_PER_GROUP
    return call.constant("format") in _ROW_FORMATS and depth // GROUP % lanes_of_groups == 0


def multiply_few_rows(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `quantized_matmul` as a reduction in float32 of which the compiler is told how lanes share it.

    Raises:
        CompileError: iree-compile does not know the target's device.
    """
    values = {**_matmul_values(call), **_subgroups(call, read_device(target))}
    return {call.symbol: render("multiply_rows", **values)}


def _matmul_values(call: LlmirCall) -> dict[str, Value]:
    """What all templates of a `quantized_matmul` with a known number of rows take."""
    weight_format, columns = str(call.constant("format")), int(call.constant("out_features"))
    x, *planes = call.operands
    batch, seq, depth = x.shape
    assert batch is not None
    assert seq is not None
    assert depth is not None
    names = [plane.name for plane in FORMATS[weight_format].planes]
    return {
        "symbol": call.symbol,
        "x": x,
        "y": call.results[0],
        "format": weight_format,
        "batch": batch,
        "rows": batch * seq,
        "groups": depth // GROUP,
        "tiles": -(-columns // TILE_ROWS),
        "out_features": columns,
        "planes": tuple(zip(names, planes, strict=True)),
        "plane_arguments": ", ".join(f"%{name}: {plane}" for name, plane in zip(names, planes, strict=True)),
    }


def _subgroups(call: LlmirCall, device: Device) -> dict[str, Value]:
    """How many subgroups share a reduction: as many as find the same to do."""
    depth = call.operands[0].shape[-1]
    assert depth is not None
    rounds = depth // GROUP * _LANES_PER_GROUP // device.subgroup
    subgroups = next(number for number in range(_MOST_SUBGROUPS, 0, -1) if rounds % number == 0)
    return {"subgroups": subgroups, "subgroup": device.subgroup}


def accepts_prefill_attention(call: LlmirCall, target: Target) -> bool:
    """Whether the device multiplies matrices in a way that is known, and tokens, heads and pages are whole tiles."""
    seq = call.operands[0].shape[1]
    return seq is not None and seq % _QUERY_TILE == 0 and _accepts_attention(call, target)


def accepts_decode_attention(call: LlmirCall, target: Target) -> bool:
    """Whether a call is of one token a row, and heads and pages are whole tiles."""
    return call.operands[0].shape[1] == 1 and _accepts_attention(call, target)


def paged_attention(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `paged_attention` as an attention op of 16-bit floats that are added up in float32.

    Queries, and the weights that softmax gives, are rounded to the cache's float16 or bfloat16, each by 2 ** -11
    (2 ** -8) of its value at most.

    Raises:
        CompileError: iree-compile does not know the target's device.
    """
    query, cache, table, positions = call.operands
    batch, seq, heads, head_dim = query.shape
    _, layers, _, kv_heads, page_size, _ = cache.shape
    softcap = float(call.constant("softcap"))
    values: dict[str, Value] = {
        "element": cache.element,
        "largest": f"{_LARGEST[cache.element]:.9e}",
        "batch": batch or 0,
        "seq": seq or 0,
        "heads": heads or 0,
        "kv_heads": kv_heads or 0,
        "head_dim": head_dim or 0,
        "layers": layers or 0,
        "page_size": page_size or 0,
        "window": int(call.constant("window")),
        "scale_log2e": f"{float(call.constant('scale')) * math.log2(math.e):.9e}",
        "softcap": softcap,
        "softcap_log2e": f"{softcap * math.log2(math.e):.9e}",
        **(_attention_tiles(call, read_device(target)) or {"tiling": "", "key_tile": 0}),
    }
    types = {"query": query, "cache": cache, "table": table, "positions": positions}
    return {call.symbol: render("attend_fused", symbol=call.symbol, **types, **values)}


def _accepts_attention(call: LlmirCall, target: Target) -> bool:
    if target.family not in FAMILIES or not attention.accepts_paged_attention(call, target):
        return False
    query, cache, *_ = call.operands
    page_size = cache.shape[4]
    if cache.element not in _LARGEST or page_size is None or page_size % _LEAST_PAGE:
        return False
    return query.shape[3] in _HEADS and _attention_tiles(call, read_device(target)) is not None


def _attention_tiles(call: LlmirCall, device: Device) -> dict[str, Value] | None:
    """How to tile an attention; None where that has not been tried."""
    query, cache, *_ = call.operands
    _, seq, heads, head_dim = query.shape
    kv_heads, page_size = cache.shape[3:5]
    assert heads is not None
    assert head_dim is not None
    assert kv_heads is not None
    assert page_size is not None
    if seq == 1:
        group = heads // kv_heads
        return {
            "tiling": "lanes",
            "subgroup": device.subgroup,
            "key_tile": device.subgroup * _LANE_COLUMNS // head_dim,
            "heads_each": next(number for number in range(_MOST_HEADS_EACH, 0, -1) if group % number == 0),
        }
    instruction = device.matrix_instructions.get(cache.element, "")
    kind = next((kind for kind in _ATTENTION_KINDS if instruction.startswith(kind)), None)
    if kind is None:
        return None
    least, most, order = _ATTENTION_KINDS[kind]
    if page_size < least:
        return None
    return {
        "tiling": "matrix",
        "subgroup": device.subgroup,
        "instruction": instruction + order,
        "query_tile": _QUERY_TILE,
        # tanh wants registers of its own.
        "key_tile": least if float(call.constant("softcap")) else min(page_size, most),
    }


def _unit(call: LlmirCall) -> str:
    """The 16-bit float that both sides are rounded to."""
    return "bf16" if call.constant("format") == "bf16" else "f16"


def _attributes(call: LlmirCall, device: Device) -> str:
    """How to tile the contraction, where the compiler's own choice is bad."""
    instruction = device.matrix_instructions.get(_unit(call), "")
    batch, seq, depth = call.operands[0].shape
    rows, tiles, groups = (batch or 0) * (seq or 0), (call.operands[1].shape[0] or 0), (depth or 0) // GROUP
    tile = _tile_of_small_registers(instruction, device.architecture)
    if tile is None or rows % 64 or tiles % 4:
        return ""
    return _COMPILATION_INFO.format(
        instruction=instruction, groups=2 if groups % 2 == 0 else 1, subgroup_tile=tile, subgroup=device.subgroup
    )


def _tile_of_small_registers(*names: str) -> str | None:
    """What a subgroup takes on a device where the compiler's own tiles are too large; None where they are not."""
    fitting = (tile for start, tile in _SMALL_REGISTERS.items() if any(name.startswith(start) for name in names))
    return next(fitting, None)
