"""Definitions of `append_kv` and `paged_attention` by GPU kernels: sizes are decided here, templates compute."""

from __future__ import annotations

from llmir_iree.plugins.calls import LlmirCall
from llmir_iree.plugins.gpu.device import FAMILIES, Device, read_device
from llmir_iree.plugins.gpu.templates import Value, kernel_name, render
from llmir_iree.plugins.lowering import Target

CACHE_ELEMENTS = ("f16", "bf16", "f32")
LARGEST_HEAD = 256

_APPEND_THREADS = 64
_WORD_BYTES = 16
_QUAD = 4

# A lane of a decode holds queries and sums of this many heads at most: they fill its registers.
_MOST_HEADS_EACH = 8
_MOST_NUMBERS_EACH = 64

# What every device lets a workgroup share.
_SHARED_BYTES = 32 << 10

# The positions are split as soon as there are too few workgroups to keep a large device busy, but no shorter than pays.
_WANTED_WORKGROUPS = 256
_POSITIONS_PER_SPLIT = 64
_MOST_SPLITS = 32

# Of a prefill: what a lane holds of a query, how many queries a team takes, and the tile in shared memory.
_PREFILL_NUMBERS = 16
_PREFILL_ROWS = 2
_TILE_BYTES = 16 << 10
_LARGEST_TILE = 32
_KEYS_PER_STEP = 4


def accepts_append_kv(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a GPU, and the cache and the new tokens are such as the kernel reads."""
    cache, key, *_ = call.operands
    head_dim = cache.shape[5] or 0
    is_supported = key.element == "f32" and cache.element in CACHE_ELEMENTS and key.shape[0] is not None
    return target.family in FAMILIES and is_supported and head_dim > 0 and head_dim % _QUAD == 0


def append_kv(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `append_kv`, and the executable that it dispatches.

    Raises:
        CompileError: iree-compile does not know the target's device.
    """
    cache, key, _value, table, positions = call.operands
    values: dict[str, Value] = {
        **_cache_sizes(call),
        "batch": key.shape[0] or 0,
        "threads": _APPEND_THREADS,
        "subgroup": read_device(target).subgroup,
    }
    name = kernel_name("append_kv", **values)
    types = {"cache": cache, "key": key, "table": table, "positions": positions}
    return {call.symbol: render("append_kv", name=name, symbol=call.symbol, **types, **values)}


def accepts_paged_attention(call: LlmirCall, target: Target) -> bool:
    """Whether the target is a GPU, the cache's element known, and its heads whole 16-byte words up to 256 numbers."""
    query, cache, *_ = call.operands
    head_dim = query.shape[3] or 0
    if target.family not in FAMILIES or query.element != "f32" or cache.element not in CACHE_ELEMENTS:
        return False
    return query.shape[0] is not None and 0 < head_dim <= LARGEST_HEAD and head_dim % _word_numbers(cache.element) == 0


def paged_attention(call: LlmirCall, target: Target) -> dict[str, str]:
    """Definition of `paged_attention`, and the executables that it dispatches; raises as `append_kv` does.

    One new token a row is a decode, anything else a prefill.
    """
    query, cache, table, positions = call.operands
    batch, seq, heads, _ = query.shape
    device = read_device(target)
    values: dict[str, Value] = {
        **_cache_sizes(call),
        "batch": batch or 0,
        "heads": heads or 0,
        "scale": _float(call.constant("scale")),
        "softcap": _float(call.constant("softcap")) if float(call.constant("softcap")) else "",
        "window": int(call.constant("window")),
        "threads": device.threads,
        "subgroup": device.subgroup,
    }
    types = {"query": query, "cache": cache, "table": table, "positions": positions}
    names: dict[str, Value]
    if seq == 1:
        values |= _decode_sizes(call, device)
        name, merge = kernel_name("decode_attention", **values), kernel_name("merge_attention", **values)
        names = {"name": name, "merge": merge, "is_decode": True, "positions_per_split": _POSITIONS_PER_SPLIT}
        executables = {name: render("decode_attention", name=name, **values)}
        if values["splits"]:
            executables[merge] = render("merge_attention", merge=merge, **values)
    else:
        values |= _prefill_sizes(call, device)
        name = kernel_name("prefill_attention", **values)
        names = {"name": name, "is_decode": False}
        executables = {name: render("prefill_attention", name=name, **values)}
    definition = render("paged_attention", symbol=call.symbol, **names, **types, **values)
    return {**executables, call.symbol: definition}


def _cache_sizes(call: LlmirCall) -> dict[str, Value]:
    cache = next(operand for operand in call.operands if len(operand.shape) == 6)
    _, layers, _, kv_heads, page_size, head_dim = cache.shape
    return {
        "element": cache.element,
        "layers": layers or 0,
        "kv_heads": kv_heads or 0,
        "page_size": page_size or 0,
        "head_dim": head_dim or 0,
    }


def _decode_sizes(call: LlmirCall, device: Device) -> dict[str, Value]:
    query, cache, *_ = call.operands
    batch, _, heads, head_dim = query.shape
    kv_heads = cache.shape[3]
    assert batch is not None
    assert heads is not None
    assert kv_heads is not None
    assert head_dim is not None
    words = head_dim // _word_numbers(cache.element)
    lanes = _largest_power(words, device.subgroup)
    shared_per_head = device.threads // device.subgroup * 4 * (head_dim + 2)
    most_heads = min(_MOST_HEADS_EACH, _MOST_NUMBERS_EACH * lanes // head_dim, _SHARED_BYTES // shared_per_head)
    heads_each = _largest_divisor(heads // kv_heads, max(1, most_heads))
    workgroups = batch * heads // heads_each
    splits = min(_MOST_SPLITS, _WANTED_WORKGROUPS // workgroups)
    return {"lanes": lanes, "heads_each": heads_each, "splits": splits if splits > 1 else 0}


def _prefill_sizes(call: LlmirCall, device: Device) -> dict[str, Value]:
    head_dim = call.operands[0].shape[3]
    assert head_dim is not None
    lanes = _largest_power(head_dim // _QUAD, min(device.subgroup, max(1, head_dim // _PREFILL_NUMBERS)))
    tile = _LARGEST_TILE
    while tile > _KEYS_PER_STEP and 2 * 4 * tile * head_dim > _TILE_BYTES:
        tile //= 2
    return {
        "lanes": lanes,
        "rows_per_team": _PREFILL_ROWS,
        "rows_each": _PREFILL_ROWS * device.threads // lanes,
        "tile": tile,
        "step": _KEYS_PER_STEP,
    }


def _word_numbers(element: str) -> int:
    """How many numbers 16 bytes hold."""
    return _WORD_BYTES // (4 if element == "f32" else 2)


def _largest_power(number: int, most: int) -> int:
    """The largest power of two that divides a number and is no larger than another."""
    power = 1
    while power * 2 <= most and number % (power * 2) == 0:
        power *= 2
    return power


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def _float(value: int | float | str) -> str:
    return f"{float(value):.9e}"
