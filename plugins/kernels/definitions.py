"""Definitions of `llmir` ops that call the kernels in C."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
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

# Of a group of quantised activations, two records: see activations.h.
_GROUP_BYTES = 96
_COMPARED_GROUPS = 4  # COMPARED in gated_matmul.c

# Workers of IREE claim workgroups one at a time as long as there are less than 8 for each of them, else 8 at a time.
_WORKERS = os.cpu_count() or 1
_CLAIMED_SINGLY = 8 * _WORKERS - 1

_QUANTIZED_ROWS = 8
_APPENDED_TOKENS = 8

# What the kernels of attention are written for.
_CACHE_ELEMENTS = ("f16", "bf16")
_ATTENDED_QUERIES = 32
_LARGEST_HEAD = 256

_ACTIVATIONS = Buffer("i8", writes=True)
_ROWS = ("workgroup_x", "rows_per_workgroup")


# A split is long enough to be worth its partial results.
_POSITIONS_PER_SPLIT = 256
_MOST_SPLITS = 16
_MERGED_COLUMNS = 512

_CACHE_SIZES = ("kv_heads", "head_dim", "page_size", "table", "layers", "layer")
_WORKGROUPS = ("workgroup_x", "workgroup_y", "workgroup_z")
_FLOATS = frozenset({"scale", "softcap"})

QUANTIZE = Kernel(
    "llmir_quantize_activations",
    "quantize_activations",
    (Buffer("f32"), _ACTIVATIONS),
    ("rows", "columns", *_ROWS),
)
NORM_QUANTIZE = Kernel(
    "llmir_norm_quantize",
    "quantize_activations",
    (Buffer("f32"), Buffer("f32"), _ACTIVATIONS),
    ("rows", "columns", "epsilon", *_ROWS),
    floats=frozenset({"epsilon"}),
)
ADD_NORM_QUANTIZE = Kernel(
    "llmir_add_norm_quantize",
    "quantize_activations",
    (Buffer("f32"), Buffer("f32"), Buffer("f32"), Buffer("f32", writes=True), _ACTIVATIONS),
    ("rows", "columns", "epsilon", *_ROWS),
    floats=frozenset({"epsilon"}),
)

MERGE = Kernel(
    "llmir_merge_attention",
    "merge_attention",
    (Buffer("f32"), Buffer("f32", writes=True)),
    ("heads", "head_dim", "splits", "workgroup_x", "workgroup_y", "columns_per_workgroup"),
)

MERGE_QUANTIZE = Kernel(
    "llmir_merge_attention_quantize",
    "merge_attention",
    (Buffer("f32"), _ACTIVATIONS),
    ("rows", *MERGE.sizes),
)

_ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "uint8": "i8", "int8": "i8"}


def multiply_kernel(weight_format: str) -> Kernel:
    """The kernel that multiplies a format's tiles: with quantised activations, or with float32 if weights are plain."""
    planes = tuple(Buffer(_ELEMENTS[plane.dtype.name]) for plane in FORMATS[weight_format].planes)
    is_quantized = FORMATS[weight_format].is_quantized
    return Kernel(
        f"llmir_quantized_matmul_{weight_format}",
        "quantized_matmul" if is_quantized else "plain_matmul",
        (*planes, Buffer("i8" if is_quantized else "f32"), Buffer("f32", writes=True)),
        ("rows", "columns", "depth", "workgroup_x", "workgroup_count"),
    )


def gated_kernel(weight_format: str) -> Kernel:
    """The kernel that multiplies the tiles of gates and of what they gate."""
    planes = tuple(Buffer(_ELEMENTS[plane.dtype.name]) for plane in FORMATS[weight_format].planes)
    return Kernel(
        f"llmir_gated_matmul_{weight_format}",
        "gated_matmul",
        (*planes, Buffer("i8"), _ACTIVATIONS),
        ("rows", "columns", "depth", "workgroup_x", "workgroup_count"),
    )


def quantized_type(x: TensorType) -> TensorType:
    """The type of x [.., K] once it is quantised: the last dimension counts the bytes of all records of a row."""
    *outer, depth = x.shape
    assert depth is not None
    return TensorType((*outer, depth // GROUP * _GROUP_BYTES), "i8")


def append_kernel(element: str) -> Kernel:
    """The kernel that stores keys and values in a cache of an element type."""
    return Kernel(
        f"llmir_append_kv_{element}",
        "append_kv",
        (Buffer(element, writes=True), Buffer("f32"), Buffer("f32"), Buffer("i32"), Buffer("i32")),
        ("batch", "seq", *_CACHE_SIZES, "workgroup_x", "tokens_per_workgroup"),
    )


def attend_kernel(element: str) -> Kernel:
    """The kernel that attends over a cache. It writes no cache, but a tied result is what a dispatch may write."""
    return Kernel(
        f"llmir_paged_attention_{element}",
        "paged_attention",
        (Buffer("f32"), Buffer(element, writes=True), Buffer("i32"), Buffer("i32"), Buffer("f32", writes=True)),
        ("seq", "heads", *_CACHE_SIZES, "window", "scale", "softcap", *_WORKGROUPS),
        floats=_FLOATS,
    )


def rope_append_kernel(element: str) -> Kernel:
    """`append_kernel`, for keys that it rotates."""
    return Kernel(
        f"llmir_rope_append_{element}",
        "append_kv",
        (*append_kernel(element).buffers, Buffer("f32"), Buffer("f32")),
        (
            *("batch", "seq", *_CACHE_SIZES, "key_stride", "key_first", "value_stride", "value_first"),
            *("workgroup_x", "tokens_per_workgroup"),
        ),
    )


def rope_attend_kernel(element: str) -> Kernel:
    """`attend_kernel`, for queries that it rotates."""
    *inputs, output = attend_kernel(element).buffers
    return Kernel(
        f"llmir_rope_attend_{element}",
        "paged_attention",
        (*inputs, Buffer("f32"), Buffer("f32"), output),
        (
            *("seq", "heads", *_CACHE_SIZES, "query_stride", "query_first", "window", "scale", "softcap"),
            *_WORKGROUPS,
        ),
        floats=_FLOATS,
    )


def rope_append_attend_kernel(element: str) -> Kernel:
    """The kernel that rotates, stores and attends for one new token a row."""
    inputs = (Buffer("f32"), Buffer("f32"), Buffer("f32"), Buffer("i32"), Buffer("i32"), Buffer("f32"), Buffer("f32"))
    return Kernel(
        f"llmir_rope_append_attend_{element}",
        "rope_append_attend",
        (Buffer(element, writes=True), *inputs, Buffer("f32", writes=True)),
        (
            *("heads", *_CACHE_SIZES, "query_stride", "query_first", "key_stride", "key_first"),
            *("value_stride", "value_first", "window", "scale", "softcap", "splits", *_WORKGROUPS),
        ),
        floats=_FLOATS,
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
    if not FORMATS[weight_format].is_quantized:
        return _multiply(call, target, call.operands[0].shape[-1])
    x, *planes = call.operands
    quantize = LlmirCall("quantize_activations", (x,), (quantized_type(x),), ())
    constants = (("format", weight_format), ("out_features", call.constant("out_features")))
    product = LlmirCall("multiply", (*quantize.results, *planes), call.results, constants)
    names = [plane.name for plane in FORMATS[weight_format].planes]
    definition = _fill(
        "quantized_matmul",
        name=call.symbol,
        x=x,
        y=call.results[0],
        codes=quantize.results[0],
        plane_arguments=", ".join(f"%{name}: {plane}" for name, plane in zip(names, planes, strict=True)),
        plane_operands=", ".join(f"%{name}" for name in names),
        plane_types=", ".join(map(str, planes)),
        quantize=quantize.symbol,
        multiply=product.symbol,
    )
    return {**quantize_activations(quantize, target), **multiply(product, target), call.symbol: definition}


# The parts that fused layers are made of. Quantised activations are tensors of `quantized_type`.


def quantize_activations(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `quantize_activations(x) -> codes`, and the executable that it dispatches.

    Raises:
        CompileError: the kernels are not compiled, and cannot be. The same goes for the parts that follow.
    """
    return _by_rows(QUANTIZE, call, target, {})


def norm_quantize(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `norm_quantize(x, weight; epsilon) -> codes`: x is divided by its root mean square."""
    return _by_rows(NORM_QUANTIZE, call, target, {"epsilon": float(call.constant("epsilon"))})


def add_norm_quantize(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `add_norm_quantize(x, residual, weight; epsilon) -> (sum, codes)`."""
    return _by_rows(ADD_NORM_QUANTIZE, call, target, {"epsilon": float(call.constant("epsilon"))})


def multiply(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `multiply(codes, planes; format, out_features) -> y`."""
    return _multiply(call, target, _quantized_depth(call.operands[0]))


def gated_multiply(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `gated_multiply(codes, planes; format, out_features) -> codes`.

    The planes are those of 2 * `out_features` rows, the gates and then what they gate.
    """
    columns, depth = int(call.constant("out_features")), _quantized_depth(call.operands[0])
    workgroups = _workgroups(-(-columns // GROUP // _COMPARED_GROUPS))
    sizes = {"columns": columns, "depth": depth, "workgroup_count": workgroups}
    return _dispatch(gated_kernel(str(call.constant("format"))), call, target, sizes, workgroups)


def _by_rows(kernel: Kernel, call: LlmirCall, target: Target, sizes: Mapping[str, float]) -> dict[str, str]:
    """A definition whose workgroups take some rows of x each."""
    columns = call.operands[0].shape[-1]
    assert columns is not None
    share = {"rows_per_workgroup": _QUANTIZED_ROWS}
    return _dispatch(kernel, call, target, {"columns": columns, **sizes, **share}, None)


def _multiply(call: LlmirCall, target: Target, depth: int | None) -> dict[str, str]:
    """A definition whose workgroups take some tiles of the weights each."""
    assert depth is not None
    columns = int(call.constant("out_features"))
    # Kernels take tiles in pairs.
    workgroups = _workgroups(-(-columns // TILE_ROWS // 2))
    sizes = {"columns": columns, "depth": depth, "workgroup_count": workgroups}
    return _dispatch(multiply_kernel(str(call.constant("format"))), call, target, sizes, workgroups)


def _workgroups(units: int) -> int:
    """Among how many workgroups kernels divide units."""
    return min(units, _CLAIMED_SINGLY)


def _most_splits(units: int) -> int:
    """In how many splits at most so many units are attended: workers claim them one at a time, and all get as many."""
    most = min(_MOST_SPLITS, max(1, _CLAIMED_SINGLY // units))
    return max((splits for splits in range(1, most + 1) if splits * units % _WORKERS == 0), default=most)


def _quantized_depth(codes: TensorType) -> int:
    row_bytes = codes.shape[-1]
    assert row_bytes is not None
    return row_bytes // _GROUP_BYTES * GROUP


def _dispatch(
    kernel: Kernel, call: LlmirCall, target: Target, sizes: Mapping[str, float], workgroups: int | None
) -> dict[str, str]:
    """A definition that is one dispatch, and its executable.

    Args:
        kernel: what to dispatch; of its constants, `rows` come from the first operand that is not a plane.
        call: its operands and results have [batch, seq] in front, or are static.
        target: what the module is compiled for.
        sizes: the other constants.
        workgroups: how many, or None for one for every `rows_per_workgroup` rows.
    """
    operands = [f"%operand{index}" for index in range(len(call.operands))]
    x = call.operands[0]
    assert x.shape[0] is not None
    # Kernels take weights first.
    is_matmul = "depth" in kernel.sizes
    order = [*range(1, len(operands)), 0] if is_matmul else range(len(operands))
    definition = _fill(
        "dispatch",
        name=call.symbol,
        arguments=", ".join(f"{name}: {kind}" for name, kind in zip(operands, call.operands, strict=True)),
        x=x,
        batch=x.shape[0],
        workgroups=f"arith.constant {workgroups} : index"
        if workgroups
        else "arith.ceildivui %row_count, %share : index",
        share=_QUANTIZED_ROWS,
        sizes="\n  ".join(f"%{name} = arith.constant {_bits(size)} : i32" for name, size in sizes.items()),
        entry=kernel.entry,
        operands=", ".join([f"%{size}" for size in kernel.constants] + [operands[index] for index in order]),
        operand_types=", ".join(["i32"] * len(kernel.constants) + [_sized(call.operands[index]) for index in order]),
        results=", ".join(f"%result{index}" for index in range(len(call.results))),
        result_types=", ".join(map(str, call.results)),
        sized_result_types=", ".join(map(_sized, call.results)),
    )
    return {**_executables(target, kernel), call.symbol: definition}


def _sized(tensor: TensorType) -> str:
    """A type as dispatches want it, with the value of a dimension that is dynamic: the sequence length."""
    return f"{tensor}{{%seq}}" if None in tensor.shape else str(tensor)


def _bits(size: float) -> int:
    """A constant of a dispatch as i32."""
    bits: int = struct.unpack("<i", struct.pack("<f", size))[0] if isinstance(size, float) else size
    return bits


def accepts_append_kv(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, and float32 goes into a cache of 16-bit floats."""
    cache, key, *_ = call.operands
    return cache.element in _CACHE_ELEMENTS and key.element == "f32" and _has_kernels(target)


def append_kv(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `append_kv`, and the executable that it dispatches; raises as `quantized_matmul` does."""
    cache, key, _value, table, positions = call.operands
    kernel = append_kernel(cache.element)
    definition = _fill(
        "append_kv",
        name=call.symbol,
        new=key,
        batch=extent(key.shape[0]),
        tokens_per_workgroup=_APPENDED_TOKENS,
        append=kernel.entry,
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, kernel), call.symbol: definition}


def accepts_paged_attention(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, the cache 16-bit, and heads no larger than theirs."""
    query, cache, *_ = call.operands
    head_dim = query.shape[3]
    if head_dim is None or head_dim > _LARGEST_HEAD:
        return False
    return query.element == "f32" and cache.element in _CACHE_ELEMENTS and _has_kernels(target)


def paged_attention(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `paged_attention`, and the executable that it dispatches; raises as `quantized_matmul` does."""
    query, cache, table, positions = call.operands
    batch, _, heads, _ = query.shape
    assert heads is not None
    kernel = attend_kernel(cache.element)
    definition = _fill(
        "paged_attention",
        name=call.symbol,
        query=query,
        batch=extent(batch),
        queries=_ATTENDED_QUERIES,
        attend=kernel.entry,
        **_attention_values(call, cache, heads),
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, kernel), call.symbol: definition}


def accepts_rope(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a CPU that kernels are compiled for, and the cache of an op with a rotary embedding theirs.

    The other floats of these ops are float32, and have heads of the cache's size.
    """
    cache = next(operand for operand in call.operands if len(operand.shape) == 6)
    head_dim = cache.shape[5]
    if head_dim is None or head_dim > _LARGEST_HEAD or head_dim % 2:
        return False
    return cache.element in _CACHE_ELEMENTS and _has_kernels(target)


def rope_append(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `rope_append`, and the executable that it dispatches; raises as `quantized_matmul` does."""
    cache, key, value, table, positions, cosines, _sines = call.operands
    kernel = rope_append_kernel(cache.element)
    definition = _fill(
        "rope_append",
        name=call.symbol,
        angles=cosines,
        batch=extent(key.shape[0]),
        tokens_per_workgroup=_APPENDED_TOKENS,
        append=kernel.entry,
        **_place("key", key, call.constant("k_first")),
        **_place("value", value, call.constant("v_first")),
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, kernel), call.symbol: definition}


def rope_attend(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `rope_attend`, and the executable that it dispatches; raises as `quantized_matmul` does."""
    query, cache, table, positions, cosines, _sines = call.operands
    kernel = rope_attend_kernel(cache.element)
    definition = _fill(
        "rope_attend",
        name=call.symbol,
        angles=cosines,
        output=call.results[0],
        batch=extent(query.shape[0]),
        queries=_ATTENDED_QUERIES,
        attend=kernel.entry,
        **_place("query", query, call.constant("q_first")),
        **_attention_values(call, cache, int(call.constant("heads"))),
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, kernel), call.symbol: definition}


def rope_append_attend(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `rope_append_attend`, and the executables that it dispatches; raises as `quantized_matmul` does.

    Its first result is float32, or quantised activations.
    """
    cache, query, key, value, table, positions, cosines, _sines = call.operands
    batch, heads, head_dim = query.shape[0], int(call.constant("heads")), cache.shape[5]
    kv_heads = cache.shape[3]
    assert head_dim is not None
    assert kv_heads is not None
    kernel = rope_append_attend_kernel(cache.element)
    merge = MERGE if call.results[0].element == "f32" else MERGE_QUANTIZE
    definition = _fill(
        "rope_append_attend",
        name=call.symbol,
        angles=cosines,
        output=call.results[0],
        partials=TensorType((batch, heads, None, head_dim + 2), "f32"),
        batch=extent(batch),
        positions_per_split=_POSITIONS_PER_SPLIT,
        most_splits=_most_splits((batch or 1) * kv_heads),
        column_workgroups=-(-heads * head_dim // _MERGED_COLUMNS),
        columns_per_workgroup=_MERGED_COLUMNS,
        attend=kernel.entry,
        merge=merge.entry,
        merge_sizes=", ".join(f"%{size}" for size in merge.constants),
        merge_types=", ".join(["i32"] * len(merge.constants)),
        **_place("query", query, call.constant("q_first")),
        **_place("key", key, call.constant("k_first")),
        **_place("value", value, call.constant("v_first")),
        **_attention_values(call, cache, heads),
        **_cache_values(cache, table, positions),
    )
    return {**_executables(target, kernel, merge), call.symbol: definition}


def _place(name: str, operand: TensorType, first: int | float | str) -> dict[str, object]:
    """Where heads stand in a tensor [batch, seq, columns]."""
    return {name: operand, f"{name}_stride": extent(operand.shape[2]), f"{name}_first": int(first)}


def _attention_values(call: LlmirCall, cache: TensorType, heads: int) -> dict[str, object]:
    """What all templates that attend say of it."""
    kv_heads = cache.shape[3]
    assert kv_heads is not None
    return {
        "heads": heads,
        "group": heads // kv_heads,
        "scale": f"{float(call.constant('scale')):.9e}",
        "softcap": f"{float(call.constant('softcap')):.9e}",
        "window": int(call.constant("window")),
    }


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
