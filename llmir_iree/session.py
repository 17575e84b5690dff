"""A session: one bundle's modules loaded on one device, one paged cache, and calls into them."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import iree.runtime as rt
import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmir_iree.bundle import CACHE_ITEM_BYTES, PARAMETER_SCOPE, Bundle, CacheDtype, Phase
from llmir_iree.devices import IREE_ERRORS, choose_target, driver_of, first_line, open_device, to_host
from llmir_iree.machine import available_memory
from llmir_iree.pages import PADDING_PAGE, PagePool, Sequence
from llmir_iree.params.errors import BundleError, LlmirError, RequestError, TargetError
from llmir_iree.params.memory import read_ahead
from llmir_iree.scheduling import behind_workers
from llmir_iree.zones import zone

IntArray = npt.NDArray[np.int32]

CACHE_DTYPES: dict[CacheDtype, np.dtype] = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
}
_ELEMENT_TYPES: dict[CacheDtype, rt.HalElementType] = {
    "f16": rt.HalElementType.FLOAT_16,
    "bf16": rt.HalElementType.BFLOAT_16,
    "f32": rt.HalElementType.FLOAT_32,
}
_DEVICE_LOCAL = int(rt.MemoryType.DEVICE_LOCAL)
_HOST_VISIBLE = int(rt.MemoryType.HOST_VISIBLE)
_USAGE = int(rt.BufferUsage.DEFAULT)
_MAPPED_USAGE = _USAGE | int(rt.BufferUsage.MAPPING)

# torch.export has no dynamic dimension of size 1: a prefill has 2 columns and a page table 2 entries at least.
_MIN_SEQ = 2
_MIN_TABLE = 2

PREFILL_TOKENS = 512
"""Most tokens that one call takes of a prompt if its modules take any number; a longer one runs in pieces."""

# An estimate of what a call needs beside weights and cache: the interpreter with its libraries, some dequantised
# matrices, and for every token of a piece a few f32 activations of the hidden size and of the (usually 4 times larger)
# inner size, and the scores of all heads against a whole sequence.
_BASE_BYTES = 200 << 20
_ESTIMATE_HIDDENS = 16


@dataclass(frozen=True)
class MemoryPlan:
    """What a session is going to need, in bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace

    def check(self, available: int) -> None:
        """Compare the plan with the memory there is.

        Raises:
            RequestError: it is not enough; the message says what would need less.
        """
        if self.total > available:
            raise RequestError(
                f"not enough memory: weights {_mib(self.weights)}, cache {_mib(self.cache)}, workspace "
                f"{_mib(self.workspace)}, {_mib(available)} available; use fewer pages or a smaller --max-seq-len, "
                f"or export with a smaller kv dtype or smaller weights"
            )


class StepResult:
    """What one call gave; read back from the device only when asked for.

    Attributes:
        seconds: how long the call took, from its arguments' upload to its results being there.
    """

    def __init__(
        self,
        read: Callable[[rt.HalBufferView], npt.NDArray[Any]],
        logits: rt.HalBufferView,
        next_token: rt.HalBufferView,
        seconds: float,
    ) -> None:
        self._read = read
        self._views = (logits, next_token)
        self.seconds = seconds

    def logits(self) -> npt.NDArray[np.float32]:
        """f32 [batch, vocab]: logits of each row's last position; meaningless in idle rows."""
        return self._logits

    def next_token(self) -> IntArray:
        """i32 [batch]: the arg-max of each row's logits; meaningless in idle rows."""
        return self._next_token

    @cached_property
    def _logits(self) -> npt.NDArray[np.float32]:
        return self._read(self._views[0])

    @cached_property
    def _next_token(self) -> IntArray:
        return self._read(self._views[1])


@dataclass(frozen=True)
class Row:
    """New tokens of one sequence, the input of a step.

    Attributes:
        sequence: what the cache holds already; grows by `tokens` when the step is done.
        tokens: at least one; exactly one in a decode.
    """

    sequence: Sequence
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise RequestError("a step needs at least one new token for every row")


@dataclass(frozen=True)
class RowResult:
    """One row's share of a step."""

    step: StepResult
    index: int

    @property
    def next_token(self) -> int:
        """The likeliest next token."""
        return int(self.step.next_token()[self.index])

    def logits(self) -> npt.NDArray[np.float32]:
        """f32 [vocab], read back from the device on the first call of the step's rows."""
        logits: npt.NDArray[np.float32] = self.step.logits()[self.index]
        return logits


class Session:
    """Loaded modules, their parameters and a cache: everything that a call needs, set up once.

    The weights stay in the archive's mapping; nothing here copies them. Not for several threads at once: there is one
    cache, and every call changes it.

    Attributes:
        pool: the pages of the cache.
        max_seq_len: most tokens a sequence may hold.
        load_seconds: how long the set-up took.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str | None = None,
        device: str | None = None,
        pages: int | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        """Check the bundle's files, then load them.

        Args:
            bundle: what to run.
            target: name of a compiled target; may be left out if there is one only, or only one for the device.
            device: an IREE device URI such as "local-task" or "cuda://0"; the target's driver if left out.
            pages: pages of the cache, the padding page included; enough for one sequence of `max_seq_len` if left out.
            max_seq_len: most tokens a sequence may hold; the model's if left out.

        Raises:
            BundleError: files missing, changed, or of another bundle.
            TargetError: no such target or device, or one on which the modules do not run.
            RequestError: options out of range, or more memory needed than there is.
        """
        start = time.perf_counter()
        manifest = bundle.manifest
        self.bundle = bundle
        self.target, self.device_uri = choose_target(bundle, target, device)
        self.max_seq_len = _checked_seq_len(max_seq_len, manifest.model.max_seq_len)
        if pages is None:
            pages = 1 + manifest.cache.pages_for(self.max_seq_len)
        self.pool = PagePool(pages, manifest.cache.page_size)

        files = {phase: bundle.checked_module(self.target, phase) for phase in self.target.phases}
        archive = bundle.checked_parameters()
        self.memory_plan = self._plan_memory()
        if self._is_local:  # Elsewhere weights and cache lie in the device's own memory.
            self.memory_plan.check(available_memory())

        self._device = open_device(self.device_uri)
        self._load(archive, files)
        self._cache = self._allocate_cache()
        self.load_seconds = time.perf_counter() - start

    def prefill(self, rows: Rows[Row]) -> list[RowResult]:
        """Run the new tokens of each row, one row after another: prompts differ in length, and padding costs time.

        A long prompt runs in pieces of `prefill_tokens`: of a size that the modules have, padding included, or of one
        that bounds the scores that a call holds in memory.

        Raises:
            RequestError: out of pages, or a sequence would grow beyond `max_seq_len`.
        """
        phase, most = self.target.prefill_phase, self.prefill_tokens
        batch_size = self.bundle.manifest.batch_sizes(phase)[0]
        results = []
        for row in rows:
            self._reserve(row.sequence, len(row.sequence) + len(row.tokens))
            for start in range(0, len(row.tokens), most):
                piece = Row(row.sequence, row.tokens[start : start + most])
                [result] = self._step(phase, batch_size, [piece])
            results.append(result)
        return results

    def decode(self, rows: Rows[Row]) -> list[RowResult]:
        """Run one new token of each row, in as few calls as the exported batch sizes allow; unused rows idle.

        Raises:
            RequestError: out of pages, or a sequence would grow beyond `max_seq_len`.
        """
        sizes = self.bundle.manifest.batch_sizes("decode")
        results: list[RowResult] = []
        while len(results) < len(rows):
            waiting = rows[len(results) :]
            batch_size = next((size for size in sizes if size >= len(waiting)), sizes[-1])
            results += self._step("decode", batch_size, waiting[:batch_size])
        return results

    def _reserve(self, sequence: Sequence, length: int) -> None:
        if length > self.max_seq_len:
            raise RequestError(f"{length} tokens do not fit a sequence; max_seq_len is {self.max_seq_len}")
        sequence.reserve(length)

    def _step(self, phase: Phase, batch_size: int, rows: Rows[Row]) -> list[RowResult]:
        """One call for at most `batch_size` rows."""
        lengths_after = [len(row.sequence) + len(row.tokens) for row in rows]
        for row, length in zip(rows, lengths_after, strict=True):
            self._reserve(row.sequence, length)

        # No wider than needed, however many pages are reserved: a module may look at every entry of its table.
        entries = max(_MIN_TABLE, self.pool.pages_for(max(lengths_after)))
        columns = self._columns(phase, batch_size)
        seq = max(_MIN_SEQ, *(len(row.tokens) for row in rows)) if columns is None else columns
        tokens = np.zeros((batch_size, seq), np.int32)
        starts = np.zeros(batch_size, np.int32)
        lengths = np.zeros(batch_size, np.int32)
        page_table = np.full((batch_size, entries), PADDING_PAGE, np.int32)
        for index, row in enumerate(rows):
            tokens[index, seq - len(row.tokens) :] = row.tokens
            starts[index] = len(row.sequence)
            lengths[index] = len(row.tokens)
            pages = row.sequence.pages[:entries]
            page_table[index, : len(pages)] = pages

        result = self.run(phase, batch_size, tokens, starts, lengths, page_table)
        for row in rows:
            row.sequence.append(row.tokens)
        return [RowResult(result, index) for index in range(len(rows))]

    def run(
        self,
        phase: Phase,
        batch_size: int,
        tokens: IntArray,
        starts: IntArray,
        lengths: IntArray,
        page_table: IntArray,
    ) -> StepResult:
        """Call an exported function with explicit arrays; `prefill` and `decode` are made of it.

        Args:
            phase: which module.
            batch_size: one that the bundle was exported for.
            tokens: i32 [batch, seq], right-aligned: row b's new tokens are its last `lengths[b]` columns. `seq` is 1 in
                a decode, at least 2 in a prefill, and in a chunk of one what the function takes.
            starts: i32 [batch], tokens that the cache holds already.
            lengths: i32 [batch], new tokens; 0 makes the row idle.
            page_table: i32 [batch, entries], entry i names the page of positions i * page_size and on. At least 2
                entries; those beyond a row's tokens may name any page.

        Raises:
            BundleError: the bundle was not exported for this batch size.
            RequestError: an array of the wrong type or shape, or values that point outside the cache.
        """
        function = self._function(phase, batch_size)
        inputs = {"tokens": tokens, "starts": starts, "lengths": lengths, "page_table": page_table}
        self._check_inputs(phase, batch_size, inputs)

        start = time.perf_counter()
        arguments = rt.VmVariantList(len(inputs) + 1)
        for array in inputs.values():
            arguments.push_ref(self._upload(array))
        arguments.push_ref(self._cache)
        results = rt.VmVariantList(3)
        try:
            with behind_workers(), zone(function.name):
                self._context.invoke(function, arguments, results)
        except IREE_ERRORS as error:
            raise LlmirError(f"{phase} for batch size {batch_size} failed: {first_line(error)}") from None
        logits, next_token, cache = (results.get_as_object(index, rt.HalBufferView) for index in range(3))
        # A view of the same buffer, as the modules update it in place.
        self._cache = cache
        return StepResult(self._read, logits, next_token, time.perf_counter() - start)

    def read_cache(self) -> npt.NDArray[np.generic]:
        """Copy of the whole cache: [pages, layers, 2, kv_heads, page_size, head_dim]; meant for tests."""
        return self._read(self._cache)

    def write_cache(self, values: npt.NDArray[np.generic]) -> None:
        """Replace the whole cache; meant for tests.

        Args:
            values: of the cache's dtype and shape.

        Raises:
            RequestError: another dtype or shape.
        """
        cache = self.bundle.manifest.cache
        if values.shape != self._cache_shape or values.dtype != CACHE_DTYPES[cache.dtype]:
            raise RequestError(
                f"the cache is {cache.dtype} {self._cache_shape}, got {values.dtype.name} {values.shape}"
            )
        self._cache = self._allocate_cache(values)

    @property
    def prefill_tokens(self) -> int:
        """Most tokens of a prompt that one call takes."""
        phase = self.target.prefill_phase
        return self._columns(phase, self.bundle.manifest.batch_sizes(phase)[0]) or PREFILL_TOKENS

    @property
    def _is_local(self) -> bool:
        """Whether the device is the CPU, whose memory is the program's own."""
        return driver_of(self.device_uri).startswith("local")

    def _read(self, view: rt.HalBufferView) -> npt.NDArray[Any]:
        return to_host(self._device, self.device_uri, view)

    @property
    def _cache_shape(self) -> tuple[int, ...]:
        return (self.pool.pages, *self.bundle.manifest.cache.page_shape)

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of the cache that one token takes, and that a decode reads for it."""
        cache = self.bundle.manifest.cache
        return cache.page_bytes // cache.page_size

    def _plan_memory(self) -> MemoryPlan:
        manifest = self.bundle.manifest
        model = manifest.model
        token = model.hidden_size * _ESTIMATE_HIDDENS + 2 * model.heads * self.max_seq_len
        activations = min(self.max_seq_len, self.prefill_tokens) * token
        logits = max(manifest.batch_sizes("decode")) * manifest.model.vocab_size
        return MemoryPlan(
            weights=manifest.parameters.nbytes,
            cache=self.pool.pages * manifest.cache.page_bytes,
            workspace=_BASE_BYTES + (activations + logits) * CACHE_ITEM_BYTES["f32"],
        )

    def _load(self, archive: Path, files: dict[Phase, Path]) -> None:
        """Map the archive and the modules, and link them in one context, so that both modules share the weights."""
        instance = rt.VmInstance()
        index = rt.ParameterIndex()
        try:
            read_ahead(archive)
            index.load(str(archive), mmap=True)
        except (OSError, *IREE_ERRORS) as error:
            raise BundleError(f"{archive}: not a parameter archive: {first_line(error)}") from None
        provider = index.create_provider(scope=PARAMETER_SCOPE)
        modules = {phase: _map_module(instance, file) for phase, file in files.items()}
        self._functions = self._find_functions(modules)
        shared = [rt.create_hal_module(instance, self._device), rt.create_io_parameters_module(instance, provider)]
        try:
            self._context = rt.VmContext(instance, [*shared, *modules.values()])
        except IREE_ERRORS as error:
            raise TargetError(
                f"the modules for {self.target.target} do not load on {self.device_uri}: {first_line(error)}"
            ) from None

    def _find_functions(self, modules: dict[Phase, rt.VmModule]) -> dict[tuple[Phase, int], rt.VmFunction]:
        functions = {}
        for info in self.bundle.manifest.functions:
            if info.phase not in modules:
                continue
            module = modules[info.phase]
            name = info.name.rpartition(".")[2]
            if name not in module.function_names:
                file = self.target.modules[info.phase].file
                known = ", ".join(known for known in module.function_names if not known.startswith("__"))
                raise BundleError(f"{self.bundle.path(file)}: no function {name}; it has {known or 'none'}")
            functions[info.phase, info.batch_size] = module.lookup_function(name)
        return functions

    def _columns(self, phase: Phase, batch_size: int) -> int | None:
        """New tokens of a row that a function takes, padding included; None for any number."""
        return 1 if phase == "decode" else self.bundle.manifest.function(phase, batch_size).columns

    def _function(self, phase: Phase, batch_size: int) -> rt.VmFunction:
        self.bundle.manifest.function(phase, batch_size)
        if phase not in self.target.modules:
            known = ", ".join(self.target.modules)
            raise BundleError(f"the modules for {self.target.target} have no {phase}; they have {known}")
        function: rt.VmFunction = self._functions[phase, batch_size]
        return function

    def _check_inputs(self, phase: Phase, batch_size: int, inputs: dict[str, IntArray]) -> None:
        """Refuse what a module would not notice: it reads and writes where the numbers point."""
        for name, array in inputs.items():
            shape = (batch_size,) if name in ("starts", "lengths") else (batch_size, "any")
            if array.dtype != np.int32 or array.ndim != len(shape) or array.shape[0] != batch_size:
                raise RequestError(f"{phase}: {name} is {array.dtype.name} {array.shape}, expected int32 {shape}")
        tokens, starts, lengths, page_table = inputs.values()
        seq, entries = tokens.shape[1], page_table.shape[1]
        columns = self._columns(phase, batch_size)
        if seq < _MIN_SEQ if columns is None else seq != columns:
            expected = f"at least {_MIN_SEQ}" if columns is None else columns
            raise RequestError(f"{phase}: tokens has {seq} columns, expected {expected}")
        if entries < _MIN_TABLE:
            raise RequestError(f"{phase}: page_table has {entries} entries a row, expected at least {_MIN_TABLE}")
        if lengths.min() < 0 or lengths.max() > seq:
            raise RequestError(f"{phase}: lengths are {lengths.tolist()}, expected 0 to {seq}")
        covered = entries * self.pool.page_size
        if starts.min() < 0 or (starts + lengths).max() > covered:
            ends = (starts + lengths).tolist()
            raise RequestError(f"{phase}: rows end at {ends}, the page table covers {covered} tokens")
        if page_table.min() < 0 or page_table.max() >= self.pool.pages:
            raise RequestError(f"{phase}: the page table names pages outside 0 to {self.pool.pages - 1}")
        vocab = self.bundle.manifest.model.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise RequestError(f"{phase}: tokens outside 0 to {vocab - 1}")

    def _upload(
        self, array: npt.NDArray[np.generic], element_type: rt.HalElementType = rt.HalElementType.SINT_32
    ) -> rt.HalBufferView:
        """A device copy of an array."""
        contiguous = np.ascontiguousarray(array)
        usage = _MAPPED_USAGE if self._is_local else _USAGE
        buffer = self._device.allocator.allocate_buffer_copy(
            memory_type=_DEVICE_LOCAL,
            allowed_usage=usage,
            device=self._device,
            # The bindings take no extension types such as bfloat16; bytes pass.
            buffer=contiguous.view(np.uint8),
        )
        return rt.HalBufferView(buffer, array.shape, element_type)

    def _allocate_cache(self, values: npt.NDArray[np.generic] | None = None) -> rt.HalBufferView:
        """A cache that holds values, or zeros.

        On the CPU it is an anonymous mapping that the runtime imports: zero without being written, so that memory is
        taken as the cache fills, not all at once.
        """
        cache = self.bundle.manifest.cache
        element_type = _ELEMENT_TYPES[cache.dtype]
        nbytes = self.pool.pages * cache.page_bytes
        if self._is_local:
            memory = _map_memory(nbytes)
            if values is not None:
                np.frombuffer(memory, values.dtype).reshape(values.shape)[...] = values
            buffer = self._device.allocator.import_host_allocation(
                memory,
                memory_type=_DEVICE_LOCAL | _HOST_VISIBLE,
                allowed_usage=_MAPPED_USAGE,
            )
            # Owned here: the runtime borrows the memory, and a view of it does not keep it.
            self._cache_memory = memory
            return rt.HalBufferView(buffer, self._cache_shape, element_type)
        if values is None:
            values = np.zeros(self._cache_shape, CACHE_DTYPES[cache.dtype])
        return self._upload(values, element_type)


def _map_memory(nbytes: int) -> mmap.mmap:
    """Anonymous memory in large pages, where the system has them: a long context touches thousands of small ones."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without large pages refuses the advice.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _checked_seq_len(asked: int | None, longest: int) -> int:
    if asked is None:
        return longest
    if not 2 <= asked <= longest:
        raise RequestError(f"max_seq_len is {asked}; this bundle takes 2 to {longest}")
    return asked


def _map_module(instance: rt.VmInstance, file: Path) -> rt.VmModule:
    """Map a compiled module.

    `VmModule.mmap` would open the file for writing, which an installed bundle need not allow.

    Raises:
        BundleError: not a module.
    """
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return rt.VmModule.wrap_buffer(instance, mapped)
    except IREE_ERRORS as error:
        raise BundleError(f"{file}: not a compiled module: {first_line(error)}") from None


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
