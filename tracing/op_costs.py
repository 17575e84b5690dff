"""What a dispatch has to move and to compute, at least: bytes from its buffers, operations from its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmir_iree.tracing.stream_sites import StreamSite

# The compiler names a dispatch of its own <function>_dispatch_<n>_<op>_<shape>_<types>; the last three may be missing.
_EXPORT = re.compile(r"_dispatch_\d+(?:_(?P<op>[a-z]\w*?))??(?:_(?P<shape>[\dD]+(?:x[\dD]+)*)(?:[x_].*)?)?$")

_ROW_FLOPS = {"quantize_activations": 2, "norm_quantize": 6, "add_norm_quantize": 7}
"""For every element of a row: its largest value and a product; its square, its sum and two products; one sum more."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that a bundle's modules dispatch by name.

    Attributes:
        kind: what it does, as `Site.kind` has it.
        constants: names of the scalars that a dispatch of it is passed, in order.
        cache_item_bytes: of one element of the cache that it reads, None if it reads none.
        sizes: what it is not passed because it is made for nothing else.
    """

    kind: str
    constants: tuple[str, ...]
    cache_item_bytes: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one call of a bundle's function worked on: sequences, new tokens of each, and tokens before those."""

    batch: int
    tokens: int
    context: int

    @property
    def new(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.tokens

    def attended(self, window: int) -> int:
        """Pairs of a new token and a token that it attends to, in all sequences."""
        positions = range(self.context + 1, self.context + self.tokens + 1)
        return self.batch * sum(min(position, window) if window else position for position in positions)

    def cached(self, window: int) -> int:
        """Tokens in the cache that are attended to, in all sequences."""
        total = self.context + self.tokens
        return self.batch * (min(total, window + self.tokens - 1) if window else total)


@dataclass(frozen=True)
class Cost:
    """What is known of a dispatch: see `Site` for each."""

    kind: str
    shape: str | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    flops: int | None = None


def cost_of(site: StreamSite, kernels: Mapping[str, Kernel], step: Step | None) -> Cost:
    """Kind, shape and least work of a dispatch.

    Args:
        site: where it stands.
        kernels: those that a bundle brings with it, by the symbol of their executable.
        step: what the call worked on, as far as that is known: kernels that read a cache read by it, and where the IR
            leaves the number of rows open, it is that of the new tokens.
    """
    kernel = kernels.get(site.executable)
    if kernel is not None:
        return _kernel_cost(site, kernel, step)
    kind, shape = parse_key(site.key)
    if site.work is None:
        return Cost(kind, shape)
    return Cost(kind, shape, site.work.bytes_read, site.work.bytes_written, site.work.flops)


def parse_key(key: str) -> tuple[str, str | None]:
    """Kind and shape that an export's name tells, such as ("matmul", "64x32xD"); "other" if it tells none."""
    match = _EXPORT.search(key)
    if match is None:
        return re.sub(r"_dispatch$", "", key), None
    return match["op"] or "other", match["shape"]


def _kernel_cost(site: StreamSite, kernel: Kernel, step: Step | None) -> Cost:
    values: dict[str, int | None] = {**kernel.sizes, **dict(zip(kernel.constants, site.scalars, strict=True))}
    if "rows" in values and values["rows"] is None and step is not None:
        values["rows"] = step.new
    if "seq" in values and values["seq"] is None and step is not None:
        values["seq"] = step.tokens
    read, written = _moved(site)
    if kernel.cache_item_bytes is not None:
        # Of the cache's buffer only some tokens' keys and values are touched, of one layer.
        each = _product(2, values.get("kv_heads"), values.get("head_dim"), kernel.cache_item_bytes)
        attends = "heads" in values
        appends = kernel.kind.startswith(("append", "rope_append"))
        window = values.get("window") or 0
        tokens = None if step is None else step.cached(window) - (step.new if appends else 0)
        read = _sum(read, _product(each, tokens) if attends else 0)
        written = _sum(written, _product(each, None if step is None else step.new) if appends else 0)
    shape, flops = _SHAPES_AND_FLOPS[kernel.kind](kernel.kind, values, step)
    return Cost(kernel.kind, shape, read, written, flops)


def _moved(site: StreamSite) -> tuple[int | None, int | None]:
    """Bytes of the buffers that are read, each once, and of those that are written; without those that are updated."""
    read = {binding.buffer: binding.nbytes for binding in site.bindings if binding.access == "read"}
    return _sum(*read.values()), _sum(*(binding.nbytes for binding in site.bindings if binding.access == "write"))


Values = Mapping[str, int | None]


def _matmul(kind: str, values: Values, _step: Step | None) -> tuple[str | None, int | None]:
    columns = _product(values["columns"], 2 if kind == "gated_matmul" else 1)
    flops = _product(2, values["rows"], columns, values["depth"])
    return _shape(values["rows"], columns, values["depth"]), flops


def _rows(kind: str, values: Values, _step: Step | None) -> tuple[str | None, int | None]:
    return _shape(values["rows"], values["columns"]), _product(_ROW_FLOPS[kind], values["rows"], values["columns"])


def _append(kind: str, values: Values, step: Step | None) -> tuple[str | None, int | None]:
    new = None if step is None else step.new
    # A rotation takes two products and a sum for every element of the keys.
    flops = _product(3 if kind == "rope_append" else 0, new, values["kv_heads"], values["head_dim"])
    return _shape(new, values["kv_heads"], values["head_dim"]), flops


def _attention(_kind: str, values: Values, step: Step | None) -> tuple[str | None, int | None]:
    heads, head_dim = values["heads"], values["head_dim"]
    if step is None:
        return None, None
    total = step.context + step.tokens
    pairs = step.attended(values.get("window") or 0)
    # A product with a key and one with a value for every pair.
    return _shape(step.batch, heads, step.tokens, total, head_dim), _product(4, pairs, heads, head_dim)


def _merge(_kind: str, values: Values, step: Step | None) -> tuple[str | None, int | None]:
    rows = None if step is None else step.batch
    sizes = (rows, values["heads"], values["splits"], values["head_dim"])
    return _shape(*sizes), _product(2, *sizes)


_SHAPES_AND_FLOPS: Mapping[str, Callable[[str, Values, Step | None], tuple[str | None, int | None]]] = {
    "matmul": _matmul,
    "quantized_matmul": _matmul,
    "gated_matmul": _matmul,
    "quantize_activations": _rows,
    "norm_quantize": _rows,
    "add_norm_quantize": _rows,
    "append_kv": _append,
    "rope_append": _append,
    "paged_attention": _attention,
    "rope_attend": _attention,
    "rope_append_attend": _attention,
    "merge_attention": _merge,
    "merge_attention_quantize": _merge,
}
KERNEL_KINDS = tuple(_SHAPES_AND_FLOPS)
"""The kinds of kernels whose cost is known."""


def _shape(*sizes: int | None) -> str | None:
    return None if None in sizes else "x".join(map(str, sizes))


def _product(*factors: int | None) -> int | None:
    result = 1
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


def _sum(*terms: int | None) -> int | None:
    total = 0
    for term in terms:
        if term is None:
            return None
        total += term
    return total
