"""Lists what a function of a compiled module dispatches, and finds dispatches that undo what kernels are for.

Everything is read at IREE's stream level, where dispatches are formed and all their buffers have sizes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from llmir_iree.params.formats import FORMATS
from llmir_iree.tracing.ir_values import Shape
from llmir_iree.tracing.op_costs import Kernel, parse_key
from llmir_iree.tracing.stream_sites import Binding, StreamSite, read_stream_sites

# So many that a buffer for all pages of a table is larger than anything else that a dispatch writes, and so odd a
# number of pages that no other buffer is as large as the cache.
TABLE_ENTRIES = 1024
PAGES = 4099

_ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
_PRODUCT_BYTES = 4

# An instruction whose result is a 16-bit float. What only moves, rounds, widens or bounds numbers is none of these.
_HALF = r"(?:vector<[\dx]+x)?b?f16>?"
_HALF_ARITHMETIC = re.compile(
    rf"^\s*%\S+ = (?P<op>arith\.(?:add|sub|mul|div)f|math\.\w+) [^\n]*: {_HALF}$"
    rf"|(?P<named>linalg\.(?:\w*matmul\w*|\w*matvec\w*|vecmat|dot|softmax|reduce|contract)) "
    r"[^\n]*outs\([^)\n]*xb?f16>\)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Sizes:
    """What a function works on, as far as the sizes of its buffers depend on it.

    Attributes:
        batch, tokens: rows, and new tokens of each.
        page_shape: [layers, 2, kv_heads, page_size, head_dim].
        cache_dtype: of the cache.
        columns: of the narrowest matrix.
        formats: in which matrices are.
    """

    batch: int
    tokens: int
    page_shape: tuple[int, ...]
    cache_dtype: str
    columns: int
    formats: tuple[str, ...]

    @property
    def arguments(self) -> tuple[Shape, ...]:
        """Shapes of what the function is called with."""
        batch = (self.batch,)
        return (self.batch, self.tokens), batch, batch, (self.batch, TABLE_ENTRIES), (PAGES, *self.page_shape)

    @property
    def cache_bytes(self) -> int:
        """Of the whole cache."""
        return PAGES * prod(self.page_shape) * _ITEM_BYTES[self.cache_dtype]

    @property
    def gathered(self) -> int:
        """How many numbers the keys of all pages of the table are, of one layer; and as many its values."""
        return self.batch * TABLE_ENTRIES * prod(self.page_shape[2:])


@dataclass(frozen=True)
class DispatchList:
    """What a function dispatches in one call.

    Attributes:
        kinds: how often, by kind: what a kernel of ours does, or what the compiler calls a dispatch of its own; of
            these, the ones that read a matrix of weights are told apart.
        weight_readers: how many dispatches read each matrix, by its name in the archive.
        kernels: how often each injected kernel is dispatched, by the name of its export.
        readers: the same of what reads a matrix, be it injected or the compiler's own.
        cache_users: the same of what touches the cache.
        faults: dispatches that store weights unpacked, or pages side by side.
    """

    function: str
    kinds: Mapping[str, int]
    weight_readers: Mapping[str, int]
    kernels: Mapping[str, int]
    readers: Mapping[str, int]
    cache_users: Mapping[str, int]
    faults: tuple[str, ...]

    @property
    def total(self) -> int:
        """All dispatches."""
        return sum(self.kinds.values())

    @property
    def hot(self) -> set[str]:
        """Exports that move most of the bytes: they read a matrix or touch the cache."""
        return {*self.readers, *self.cache_users}


def list_dispatches(
    stream_ir: str, function: str, sizes: Sizes, known: Mapping[str, Kernel] | None = None
) -> DispatchList:
    """List the dispatches of a function.

    A dispatch *unpacks weights* if it reads a matrix and writes a byte or more for every weight in it: the product with
    a few rows is smaller. A dispatch *gathers pages* if it has the cache and writes a byte or more for every number of
    the keys that the page table names: what a split of a decode gives is smaller.

    Args:
        stream_ir: what iree-compile printed of the stream level.
        function: name of an exported function.
        sizes: what it works on.
        known: kernels that may have been injected, by the symbol of their executable.

    Raises:
        CaptureError: the text is not MLIR.
    """
    known = known or {}
    kinds: Counter[str] = Counter()
    weight_readers: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    readers: Counter[str] = Counter()
    cache_users: Counter[str] = Counter()
    faults: list[str] = []
    for site in read_stream_sites(stream_ir, function, sizes.arguments):
        matrices = _matrices(site.bindings, sizes.formats)
        weight_readers.update(matrices.keys())
        has_cache = any(binding.nbytes == sizes.cache_bytes for binding in site.bindings)
        kernels.update([site.key] if site.executable in known else [])
        readers.update([site.key] if matrices else [])
        cache_users.update([site.key] if has_cache else [])
        kinds[_kind(site, known, bool(matrices))] += 1
        faults.extend(_faults(site, matrices, sizes, has_cache=has_cache))
    found = tuple(dict.fromkeys(faults))
    return DispatchList(
        function=function,
        kinds=dict(kinds.most_common()),
        weight_readers=dict(weight_readers),
        kernels=dict(kernels),
        readers=dict(readers),
        cache_users=dict(cache_users),
        faults=found,
    )


def find_half_arithmetic(mlir: str) -> Counter[str]:
    """Operations that compute in 16-bit floats, such as sums of a norm or of a softmax, by name.

    Matrix instructions multiply such numbers, but the IR has them widened to float32 in front of the product.

    Args:
        mlir: a module at stream level, kernels in it.
    """
    return Counter(match["op"] or match["named"] for match in _HALF_ARITHMETIC.finditer(mlir))


def _kind(site: StreamSite, kernels: Mapping[str, Kernel], reads_weights: bool) -> str:
    kernel = kernels.get(site.executable)
    if kernel is not None:
        return kernel.kind
    kind, _ = parse_key(site.key)
    return f"{kind} of weights" if reads_weights else kind


def _faults(site: StreamSite, matrices: Mapping[str, int], sizes: Sizes, *, has_cache: bool) -> Iterator[str]:
    if not matrices and not has_cache:
        return
    largest = _largest_result(site, sizes)
    if largest is None:
        yield f"{site.key}: how much it writes is not known"
        return
    # Narrower matrices are no larger than their product, so that sizes tell nothing.
    is_telling = sizes.columns > _PRODUCT_BYTES * sizes.batch * sizes.tokens
    for name, weights in matrices.items():
        if is_telling and largest >= weights:
            yield f"{site.key}: unpacks {name}: writes {largest} bytes for {weights} weights"
    if has_cache and largest >= sizes.gathered:
        yield f"{site.key}: gathers pages: writes {largest} bytes for {sizes.gathered} keys"


def _largest_result(site: StreamSite, sizes: Sizes) -> int | None:
    """Bytes of the largest buffer that a dispatch writes beside the cache, or of all together; None if not known.

    Dispatches of the compiler's own making share a buffer of which they write parts: their IR tells of these.
    """
    if site.work is not None:
        return site.work.bytes_written
    results = [binding.nbytes for binding in site.bindings if binding.access != "read"]
    known = [nbytes for nbytes in results if nbytes is not None and nbytes != sizes.cache_bytes]
    return None if None in results else max(known, default=0)


def _matrices(bindings: Sequence[Binding], formats: Collection[str]) -> dict[str, int]:
    """The matrices of weights that a dispatch reads, and how many weights each has."""
    planes: dict[str, dict[str, int]] = {}
    for binding in bindings:
        parent, _, plane = (binding.parameter or "").rpartition(".")
        if parent.endswith(".weight") and binding.nbytes is not None:
            found = planes.setdefault(parent, {})
            found[plane] = max(found.get(plane, 0), binding.nbytes)
    return {parent: weights for parent, found in planes.items() if (weights := _count_weights(found, formats))}


def _count_weights(planes: Mapping[str, int], formats: Collection[str]) -> int:
    """How many weights planes of so many bytes hold, at least."""
    counts = []
    for name in formats:
        known = {plane.name: plane for plane in FORMATS[name].planes}
        if set(planes) <= set(known):
            blocks = (nbytes // (known[plane].dtype.itemsize * known[plane].length) for plane, nbytes in planes.items())
            counts.append(max(blocks) * FORMATS[name].block_size)
    return min(counts, default=0)
