"""Definitions of `llmir` ops that call the kernels in C."""

from __future__ import annotations

from importlib.resources import files
from string import Template

from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import GROUP, TILE16, TILE_ROWS, has_tile16, tile16_shapes
from llmir_iree.plugins.calls import LlmirCall, TensorType, extent
from llmir_iree.plugins.kernels.executables import (
    Buffer,
    Kernel,
    executable,
    find_variants,
    read_executable_target,
)
from llmir_iree.plugins.kernels.objects import find_object
from llmir_iree.plugins.lowering import Target

# Bytes of an activation group, see activations.h.
_GROUP_BYTES = 40

# Of one workgroup. Few enough tiles that their weights fit the second cache, few enough for all cores to have some.
_MAX_TILES = 16
_MIN_WORKGROUPS = 8
_QUANTIZED_ROWS = 8
_APPENDED_TOKENS = 8

# What paged_attention.c is written for.
_ATTENDED_QUERIES = 16
_LARGEST_HEAD = 256

QUANTIZE = Kernel(
    "llmir_quantize_activations",
    "quantize_activations",
    (Buffer("f32"), Buffer("i8", writes=True)),
    ("rows", "columns", "workgroup_x", "rows_per_workgroup"),
)

APPEND = Kernel(
    "llmir_append_kv_f16",
    "append_kv",
    (Buffer("f16", writes=True), Buffer("f32"), Buffer("f32"), Buffer("i32"), Buffer("i32")),
    (
        *("batch", "seq", "kv_heads", "head_dim", "page_size", "table", "layers", "layer"),
        *("workgroup_x", "tokens_per_workgroup"),
    ),
)
# It writes no cache, but a tied result is what a dispatch may write.
ATTEND = Kernel(
    "llmir_paged_attention_f16",
    "paged_attention",
    (Buffer("f32"), Buffer("f16", writes=True), Buffer("i32"), Buffer("i32"), Buffer("f32", writes=True)),
    (
        *("seq", "heads", "kv_heads", "head_dim", "page_size", "table", "layers", "layer", "window", "scale"),
        *("softcap", "workgroup_x", "workgroup_y", "workgroup_z"),
    ),
    floats=frozenset({"scale", "softcap"}),
)

_ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "uint8": "i8", "int8": "i8"}


def multiply(weight_format: str) -> Kernel:
    """The kernel that multiplies a format's tiles: with activation groups, or with float32 if weights are plain."""
    is_quantized = FORMATS[weight_format].is_quantized
    planes = tuple(Buffer(_ELEMENTS[plane.dtype.name]) for plane in FORMATS[weight_format].planes)
    return Kernel(
        f"llmir_quantized_matmul_{weight_format}",
        "quantized_matmul" if is_quantized else "plain_matmul",
        (*planes, Buffer("i8" if is_quantized else "f32"), Buffer("f32", writes=True)),
        ("rows", "columns", "depth", "workgroup_x", "tiles_per_workgroup"),
    )


def accepts_quantized_matmul(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, and the call's planes are tiles."""
    weight_format = str(call.constant("format"))
    x, *planes = call.operands
    columns, depth = int(call.constant("out_features")), x.shape[-1]
    if call.constant("layout") != TILE16.name or len(x.shape) != 3 or depth is None or not has_tile16(weight_format):
        return False
    if [plane.shape for plane in planes] != list(tile16_shapes(weight_format, columns, depth).values()):
        return False
    return _has_kernels(target)


def quantized_matmul(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `quantized_matmul` on planes in layout tile16, and the executables that it dispatches.

    Args:
        call: one that `accepts_quantized_matmul` on the target.
        target: what the module is compiled for.

    Raises:
        CompileError: the kernels are not compiled, and cannot be.
    """
    weight_format = str(call.constant("format"))
    x, *planes = call.operands
    batch, seq, depth = x.shape
    assert batch is not None
    assert depth is not None
    columns = int(call.constant("out_features"))
    tiles = -(-columns // TILE_ROWS)
    # Even, because kernels take tiles in pairs.
    tiles_per_workgroup = min(_MAX_TILES, max(2, tiles // _MIN_WORKGROUPS // 2 * 2))
    names = [plane.name for plane in FORMATS[weight_format].planes]
    kernel = multiply(weight_format)
    is_quantized = FORMATS[weight_format].is_quantized
    definition = _fill(
        "quantized_matmul" if is_quantized else "plain_matmul",
        name=call.symbol,
        x=x,
        y=call.results[0],
        plane_arguments=", ".join(f"%{name}: {plane}" for name, plane in zip(names, planes, strict=True)),
        plane_operands=", ".join(f"%{name}" for name in names),
        plane_types=", ".join(map(str, planes)),
        seq_dim="{%seq}" if seq is None else "",
        batch=extent(batch),
        columns=columns,
        depth=depth,
        groups=depth // GROUP,
        row_bytes=depth // GROUP * _GROUP_BYTES,
        rows_per_workgroup=_QUANTIZED_ROWS,
        tile_workgroups=-(-tiles // tiles_per_workgroup),
        tiles_per_workgroup=tiles_per_workgroup,
        quantize=QUANTIZE.entry,
        multiply=kernel.entry,
    )
    kernels = (QUANTIZE, kernel) if is_quantized else (kernel,)
    return {**_executables(target, *kernels), call.symbol: definition}


def accepts_append_kv(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, and float32 goes into a cache of float16."""
    cache, key, *_ = call.operands
    return (cache.element, key.element) == ("f16", "f32") and _has_kernels(target)


def append_kv(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `append_kv`, and the executable that it dispatches; raises as `quantized_matmul` does."""
    cache, key, _value, table, positions = call.operands
    definition = _fill(
        "append_kv",
        name=call.symbol,
        new=key,
        batch=extent(key.shape[0]),
        tokens_per_workgroup=_APPENDED_TOKENS,
        append=APPEND.entry,
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, APPEND), call.symbol: definition}


def accepts_paged_attention(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, the cache float16, and heads no larger than theirs."""
    query, cache, *_ = call.operands
    head_dim = query.shape[3]
    if head_dim is None or head_dim > _LARGEST_HEAD:
        return False
    return (query.element, cache.element) == ("f32", "f16") and _has_kernels(target)


def paged_attention(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `paged_attention`, and the executable that it dispatches; raises as `quantized_matmul` does."""
    query, cache, table, positions = call.operands
    batch, _, heads, _ = query.shape
    kv_heads = cache.shape[3]
    assert heads is not None
    assert kv_heads is not None
    definition = _fill(
        "paged_attention",
        name=call.symbol,
        query=query,
        batch=extent(batch),
        heads=heads,
        group=heads // kv_heads,
        queries=_ATTENDED_QUERIES,
        scale=f"{float(call.constant('scale')):.9e}",
        softcap=f"{float(call.constant('softcap')):.9e}",
        window=int(call.constant("window")),
        attend=ATTEND.entry,
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, ATTEND), call.symbol: definition}


def _cache_values(cache: TensorType, table: TensorType, positions: TensorType) -> dict[str, object]:
    """What both templates say of the cache; braces stand behind types of which a dimension is dynamic."""
    _, layers, _, kv_heads, page_size, head_dim = map(extent, cache.shape)
    return {
        "cache": cache,
        "table": table,
        "positions": positions,
        "layers": layers,
        "kv_heads": kv_heads,
        "page_size": page_size,
        "head_dim": head_dim,
        "page_sizes": "{%pages}" if cache.shape[0] is None else "",
        "entry_sizes": "{%entries}" if table.shape[1] is None else "",
        "seq_sizes": "{%seq}" if positions.shape[1] is None else "",
    }


def _fill(template: str, **values: object) -> str:
    text = (files(__package__) / f"{template}.mlir").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _has_kernels(target: Target) -> bool:
    if target.family != "llvm-cpu":
        return False
    return bool(find_variants(read_executable_target(target.flags)))


def _executables(target: Target, *kernels: Kernel) -> dict[str, str]:
    executable_target = read_executable_target(target.flags)
    variants = find_variants(executable_target)
    return {
        kernel.name: executable(
            kernel, executable_target, {variant: find_object(variant, kernel.object) for variant in variants}
        )
        for kernel in kernels
    }
