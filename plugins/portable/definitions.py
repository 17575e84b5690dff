"""Fills the portable templates: shapes and names are decided here, what is computed stands in the `.mlir` files."""

from __future__ import annotations

from importlib.resources import files
from string import Template

from llmir_iree.params.errors import CompileError
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import TILE16, TILE_ROWS, layout_of
from llmir_iree.plugins.calls import LlmirCall, TensorType, extent

_NO_WINDOW = 2**31 - 1

# Of several rows the compiler makes tiles, and dequantises anew for every tile: slower than doing it once, beforehand,
# but it needs no memory for the floats. A large output head is worth that.
_MOST_FUSED_ROWS = 16
_LARGE_WEIGHTS = 64 << 20

_BITS = {"bf16": 16, "f16": 16, "f32": 32}

# How a template shapes the weights of one block: the dimensions of the float32 tensor it gives, after the row, which is
# a tile and a lane for formats in layout tile16.
_BLOCK_SHAPES: dict[str, tuple[int, ...]] = {
    "q4_0": (4, 2, 4),
    "q4_1": (4, 2, 4),
    "q8_0": (8, 4),
    "q4_k": (8, 4, 2, 4),
    "q5_k": (8, 4, 2, 4),
    "q6_k": (8, 2, 2, 2, 4),
}
_TEMPLATES = {"f16": "dequantize_plain", "bf16": "dequantize_plain"}


def append_kv(call: LlmirCall) -> dict[str, str]:
    """Definition of `append_kv`: scatters the new tokens into the cache."""
    cache, key, _value, table, positions = call.operands
    batch, seq, kv_heads, _ = key.shape
    stored = TensorType(key.shape, cache.element)
    text = _fill(
        "append_kv",
        name=call.symbol,
        cache=cache,
        new=key,
        table=table,
        positions=positions,
        stored=stored,
        batch=extent(batch),
        seq=extent(seq),
        kv_heads=extent(kv_heads),
        seq_dim=_operand(seq, "%seq"),
        seq_sizes=_sizes(seq, "%seq"),
        page_size=extent(cache.shape[4]),
        new_dtype=key.element,
        cache_dtype=cache.element,
        store=_conversion(key.element, cache.element),
    )
    return {call.symbol: text}


def paged_attention(call: LlmirCall) -> dict[str, str]:
    """Definition of `paged_attention`: gathers a layer's pages, then scores, softmax and sum as separate stages."""
    query, cache, table, positions = call.operands
    batch, seq, heads, head_dim = query.shape
    pages, layers, _, kv_heads, page_size, _ = cache.shape
    entries = table.shape[1]
    assert heads is not None
    assert kv_heads is not None
    assert page_size is not None
    group = heads // kv_heads
    stored = None if entries is None else entries * page_size
    softcap = float(call.constant("softcap"))
    text = _fill(
        "paged_attention",
        name=call.symbol,
        query=query,
        cache=cache,
        table=table,
        positions=positions,
        gathered=TensorType((batch, kv_heads, entries, page_size, head_dim), "f32"),
        flat=TensorType((batch, kv_heads, stored, head_dim), "f32"),
        grouped=TensorType((batch, seq, kv_heads, group, head_dim), "f32"),
        scores=TensorType((batch, kv_heads, group, seq, stored), "f32"),
        batch=extent(batch),
        layers=extent(layers),
        kv_heads=kv_heads,
        group=group,
        page_size=page_size,
        head_dim=extent(head_dim),
        seq_dim=_operand(seq, "%seq"),
        seq_extent=_operand(seq, "%seq") or extent(seq),
        page_sizes=_sizes(pages, "%pages"),
        page_counts=_sizes(pages, "%page_count"),
        page_extent=_operand(pages, "%page_count") or extent(pages),
        table_sizes=_sizes(entries, "%table"),
        table_counts=_sizes(entries, "%table_size"),
        table_size=_operand(entries, "%table_size"),
        table_extent=_operand(entries, "%table_size") or extent(entries),
        score_dims=_operands((seq, "%seq"), (stored, "%positions_stored")),
        scale=_float(call.constant("scale")),
        has_softcap="true" if softcap else "false",
        softcap=_float(softcap or 1.0),
        window=int(call.constant("window")) or _NO_WINDOW,
        cache_dtype=cache.element,
        load=_conversion(cache.element, "f32"),
    )
    return {call.symbol: text}


def quantized_matmul(call: LlmirCall) -> dict[str, str]:
    """Definition of `quantized_matmul` that dequantises the weights, if they are not float32, then multiplies."""
    is_float = call.constant("format") == "f32"
    return _quantized_matmul(call, "quantized_matmul_fused" if is_float else "quantized_matmul")


def quantized_matmul_fused(call: LlmirCall) -> dict[str, str]:
    """Definition of `quantized_matmul` that dequantises as it multiplies; for what `gains_from_fusion` accepts."""
    return _quantized_matmul(call, "quantized_matmul_fused")


def gains_from_fusion(call: LlmirCall) -> bool:
    """Whether to dequantise inside the contraction: for one row, and for a few if the weights as floats are large."""
    (batch, seq, columns), rows = call.operands[0].shape, int(call.constant("out_features"))
    if batch is None or seq is None or columns is None:
        return False
    return batch * seq == 1 or (batch * seq <= _MOST_FUSED_ROWS and 4 * rows * columns > _LARGE_WEIGHTS)


def _quantized_matmul(call: LlmirCall, template: str) -> dict[str, str]:
    weight_format = str(call.constant("format"))
    x, *planes = call.operands
    if weight_format not in FORMATS:
        raise CompileError(f"llmir.quantized_matmul: unknown format {weight_format!r}; known: {', '.join(FORMATS)}")
    layout = layout_of(weight_format)
    if call.constant("layout") != layout.name:
        raise CompileError(
            f"llmir.quantized_matmul: {weight_format} is read in layout {layout.name}, not {call.constant('layout')}"
        )
    if len(x.shape) != 3 or x.element != "f32":
        raise CompileError(f"llmir.quantized_matmul: x must be float32 [batch, seq, in_features], it is {x}")
    batch, seq, columns = x.shape
    rows = int(call.constant("out_features"))
    assert batch is not None
    assert columns is not None
    tile_shape = (-(-rows // TILE_ROWS), TILE_ROWS) if layout == TILE16 else (rows,)
    block_size = FORMATS[weight_format].block_size
    block_shape = _BLOCK_SHAPES.get(weight_format)
    row_shape = (columns,) if block_shape is None else (columns // block_size, *block_shape)
    weights = TensorType((*tile_shape, *row_shape), "f32")
    activation_rows = None if seq is None else batch * seq
    rows_extent = _operand(activation_rows, "%rows") or extent(activation_rows)
    product = TensorType((activation_rows, *tile_shape), "f32")
    join, joined = _join_tiles(product, rows, rows_extent)
    # The slice that cuts the last token out of a prefill is fused into the product of the head otherwise, where IREE
    # 3.13 reads another row on SPIR-V targets.
    is_cut_off = seq == 1
    names = [plane.name for plane in FORMATS[weight_format].planes]
    n = [f"n{index}" for index in range(len(tile_shape))]
    k = [f"k{index}" for index in range(len(row_shape))]
    dequantize_symbol = f"llmir_dequantize_{weight_format}_{rows}x{columns}"
    text = _fill(
        template,
        name=call.symbol,
        x=x,
        cut=f"%whole = util.optimization_barrier %x : {x}" if is_cut_off else "",
        input="%whole" if is_cut_off else "%x",
        y=TensorType((batch, seq, rows), "f32"),
        plane_arguments=", ".join(f"%{name}: {plane}" for name, plane in zip(names, planes, strict=True)),
        plane_operands=", ".join(f"%{name}" for name in names),
        plane_types=", ".join(map(str, planes)),
        dequantize=dequantize_symbol,
        weights=weights,
        flat=TensorType((activation_rows, columns), "f32"),
        blocked=TensorType((activation_rows, *row_shape), "f32"),
        product=product,
        join=join,
        columns=joined,
        columns_type=TensorType((activation_rows, rows), "f32"),
        x_reassociation=list(range(1, 1 + len(row_shape))),
        batch=batch,
        seq_extent=_operand(seq, "%seq") or extent(seq),
        rows_dim=_operand(activation_rows, "%rows"),
        rows_sizes=_sizes(activation_rows, "%rows"),
        rows_extent=rows_extent,
        block_extents=", ".join(map(str, row_shape)),
        n=", ".join(n),
        parallels=", ".join('"parallel"' for _ in n),
        k=", ".join(k),
        reductions=", ".join('"reduction"' for _ in k),
        out_features=rows,
    )
    return {**_dequantize(weight_format, dequantize_symbol, planes, weights), call.symbol: text}


def _join_tiles(product: TensorType, columns: int, rows_extent: str) -> tuple[str, str]:
    """Operations that turn a product [rows, tiles, lanes] into [rows, columns], and the value that they give."""
    if len(product.shape) == 2:
        return "", "%product"
    rows, tiles, lanes = product.shape
    assert tiles is not None
    assert lanes is not None
    padded = TensorType((rows, tiles * lanes), product.element)
    joined = f"%padded = tensor.collapse_shape %product [[0], [1, 2]] : {product} into {padded}"
    if padded.shape[1] == columns:
        return joined, "%padded"
    whole = TensorType((rows, columns), product.element)
    cut = f"%columns = tensor.extract_slice %padded[0, 0] [{rows_extent}, {columns}] [1, 1] : {padded} to {whole}"
    return f"{joined}\n  {cut}", "%columns"


def argmax(symbol: str, batch: int, vocab: int) -> str:
    """Definition of an arg-max over the rows of float32 [batch, vocab], as int64 [batch]."""
    return _fill(
        "argmax",
        name=symbol,
        x=TensorType((batch, vocab), "f32"),
        largest=TensorType((batch,), "f32"),
        least=TensorType((batch,), "i32"),
        indices=TensorType((batch,), "i64"),
        last=vocab - 1,
    )


def _dequantize(weight_format: str, symbol: str, planes: list[TensorType], weights: TensorType) -> dict[str, str]:
    names = [plane.name for plane in FORMATS[weight_format].planes]
    tiles = weights.shape[0]
    blocks = weights.shape[2 if layout_of(weight_format) == TILE16 else 1]
    values = {
        **dict(zip(names, planes, strict=True)),
        "name": symbol,
        "weights": weights,
        "tiles": extent(tiles),
        "blocks": extent(blocks),
        "dtype": planes[0].element,
        "group_scales": TensorType((tiles, blocks, 8, TILE_ROWS), "f32"),
        "scales_name": f"llmir_k_scales_{tiles}x{blocks}",
    }
    functions = {symbol: _fill(_TEMPLATES.get(weight_format, f"dequantize_{weight_format}"), **values)}
    if "dmin" in names:
        scales_name = str(values["scales_name"])
        functions[scales_name] = _fill("dequantize_k_scales", **{**values, "name": scales_name})
    return functions


def _fill(template: str, **values: object) -> str:
    text = (files(__package__) / f"{template}.mlir").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _operand(dimension: int | None, name: str) -> str:
    """The operand that gives a dimension its size: nothing where the type says it."""
    return name if dimension is None else ""


def _sizes(dimension: int | None, name: str) -> str:
    """The braces behind a type of which one dimension is dynamic."""
    return f"{{{name}}}" if dimension is None else ""


def _operands(*dimensions: tuple[int | None, str]) -> str:
    return ", ".join(name for dimension, name in dimensions if dimension is None)


def _conversion(source: str, target: str) -> str:
    """The `arith` op that converts a float; where there is nothing to convert, one that folds away."""
    if source == target:
        return "arith.bitcast"
    return "arith.truncf" if _BITS[target] < _BITS[source] else "arith.extf"


def _float(value: int | float | str) -> str:
    return f"{float(value):.9e}"
