"""The engines that a benchmark runs, ours and its peers, behind one interface: token ids in, a step done."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmir_iree.bundle import Bundle, Phase
from llmir_iree.machine import available_memory
from llmir_iree.pages import PADDING_PAGE
from llmir_iree.params.errors import RequestError, SourceError
from llmir_iree.session import CACHE_DTYPES, Session, StepResult

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

_SEED = 20

# The session refuses narrower ones.
_MIN_SEQ = 2
_MIN_TABLE = 2

# llama.cpp rounds a sequence's context up to this.
_LLAMA_CONTEXT_STEP = 256
# GGML_LOG_LEVEL_ERROR of the version that pyproject.toml pins; llama-cpp-python's own table is of an older one.
_GGML_LOG_ERROR = 4


class Engine(ABC):
    """Something that runs the model, on sequences of equal length side by side.

    Attributes:
        name: what a report calls it.
        versions: of the packages that do the work.
        vocab_size: token ids are below it.
    """

    name: str
    versions: dict[str, str]
    vocab_size: int

    @abstractmethod
    def start(self, batch: int, length: int, context: int = 0) -> None:
        """Empty the cache and make room for `batch` sequences of `length` tokens.

        With `context`, go on as behind so many tokens; which ones, no one is to know.
        """

    @abstractmethod
    def step(self, tokens: IntArray) -> None:
        """Append tokens i32 [batch, n] to the sequences, and return when the last position's logits are there."""

    @abstractmethod
    def logits(self) -> FloatArray:
        """f32 [batch, vocab]: logits after the last step."""

    def losses(self, tokens: IntArray, first: int) -> npt.NDArray[np.float64]:
        """How much each token surprises: -log p of it behind those before it.

        Args:
            tokens: i32 [batch, n], from an empty cache on.
            first: tokens up to this one, counted from 0, are context only.

        Returns:
            f64 [batch, n - 1 - first].
        """
        batch, count = tokens.shape
        self.start(batch, count)
        self.step(tokens[:, :first])
        losses = []
        for index in range(first, count - 1):
            self.step(tokens[:, index : index + 1])
            losses.append(token_losses(self.logits(), tokens[:, index + 1]))
        return np.stack(losses, axis=1)

    def close(self) -> None:  # noqa: B027  most have nothing to do
        """Give memory back; the engine is of no more use."""


def token_losses(logits: FloatArray, tokens: IntArray) -> npt.NDArray[np.float64]:
    """-log of the probability that logits f32 [rows, vocab] give to one token each, i32 [rows]: f64 [rows]."""
    largest = logits.max(axis=1, keepdims=True)
    totals = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, tokens[:, None].astype(np.int64), axis=1) - largest
    losses: npt.NDArray[np.float64] = np.log(totals) - chosen[:, 0]
    return losses


class BundleEngine(Engine):
    """The bundle's compiled modules."""

    name = "llmir-iree"

    def __init__(
        self, bundle: Bundle, target: str | None, device: str | None, rooms: Iterable[tuple[int, int]]
    ) -> None:
        """Load the modules.

        Args:
            bundle: what to run.
            target: as `Session` takes it.
            device: as `Session` takes it.
            rooms: every batch and length that `start` is going to be asked for.

        Raises:
            LlmirError: whatever `Session` refuses.
        """
        pages_for = bundle.manifest.cache.pages_for
        pages = max(batch * max(_MIN_TABLE, pages_for(length)) for batch, length in rooms)
        self.session = Session(bundle, target, device, pages=PADDING_PAGE + 1 + pages)
        self.versions = {"llmir-iree": version("llmir-iree"), "iree-base-runtime": version("iree-base-runtime")}
        self.vocab_size = bundle.manifest.model.vocab_size
        self._position = 0
        self._page_table = np.zeros((0, 0), np.int32)
        self._results: list[StepResult] = []
        self._is_filled = False

    def start(self, batch: int, length: int, context: int = 0) -> None:
        """Deal the pages out; what they still hold lies beyond the sequences' ends, or is the context."""
        entries = max(_MIN_TABLE, self.session.pool.pages_for(length))
        pages = np.arange(batch * entries, dtype=np.int32) + PADDING_PAGE + 1
        self._page_table = pages.reshape(batch, entries)
        if context and not self._is_filled:
            self._fill_cache()
        self._position = context

    def step(self, tokens: IntArray) -> None:
        """A first token is a prefill, as in `Session`'s own use, where decode only ever goes on from one."""
        batch, count = tokens.shape
        phase = "decode" if count == 1 and self._position else self.session.target.prefill_phase
        if phase == "prefill_chunk":
            self._results = [self._run_chunks(tokens[row], self._page_table[row]) for row in range(batch)]
        else:
            if phase == "prefill" and count < _MIN_SEQ:
                tokens = np.pad(tokens, ((0, 0), (_MIN_SEQ - count, 0)))
            self._results = [self._run(phase, tokens, self._position, count, self._page_table)]
        for result in self._results:
            result.next_token()  # Waits for the device.
        self._position += count

    def logits(self) -> FloatArray:
        """f32 [batch, vocab]."""
        if len(self._results) == 1:
            return self._results[0].logits()
        return np.concatenate([result.logits()[:1] for result in self._results])

    def _run_chunks(self, tokens: IntArray, pages: IntArray) -> StepResult:
        """A row's prompt i32 [n], chunk by chunk, in the first row of a function for as few as there is; the last."""
        rows = self.session.bundle.manifest.batch_sizes("prefill_chunk")[0]
        columns = self.session.prefill_tokens
        page_table = np.full((rows, len(pages)), PADDING_PAGE, np.int32)
        page_table[0] = pages
        for start in range(0, len(tokens), columns):
            piece = tokens[start : start + columns]
            padded = np.zeros((rows, columns), np.int32)
            padded[0, columns - len(piece) :] = piece
            result = self._run("prefill_chunk", padded, self._position + start, len(piece), page_table)
        return result

    def _run(self, phase: Phase, tokens: IntArray, start: int, count: int, page_table: IntArray) -> StepResult:
        """One call for rows that all go on from the same position."""
        batch = len(tokens)
        entries = max(_MIN_TABLE, self.session.pool.pages_for(start + count))
        starts, lengths = np.full(batch, start, np.int32), np.full(batch, count, np.int32)
        if phase == "prefill_chunk":
            starts[1:] = lengths[1:] = 0
        return self.session.run(phase, batch, tokens, starts, lengths, page_table[:, :entries])

    def _fill_cache(self) -> None:
        """Write random numbers into every page, the same into each."""
        cache = self.session.bundle.manifest.cache
        page = (
            np.random.default_rng(_SEED).standard_normal(cache.page_shape, np.float32).astype(CACHE_DTYPES[cache.dtype])
        )
        self.session.write_cache(np.broadcast_to(page, (self.session.pool.pages, *page.shape)))
        self._is_filled = True


class TransformersEngine(Engine):
    """transformers in eager float32, on the checkpoint's dequantised weights."""

    name = "transformers"

    def __init__(self, file: Path, threads: int) -> None:
        """Read and dequantise the checkpoint.

        Raises:
            LlmirError: it cannot be read, or does not fit into memory as float32.
        """
        import torch
        import transformers

        from llmir_iree.export.model import load_config, weight_specs
        from llmir_iree.params.checkpoint import open_checkpoint
        from llmir_iree.params.plan import plan_weights
        from llmir_iree.params.quantize import dequantize

        self.versions = {"torch": version("torch"), "transformers": version("transformers")}
        torch.set_num_threads(threads)
        needed = transformers_bytes(file)
        if needed > available_memory():
            raise RequestError(
                f"transformers needs {needed / 2**20:,.0f} MiB for {file} in float32, "
                f"{available_memory() / 2**20:,.0f} MiB are available; compare with llama.cpp alone"
            )
        with open_checkpoint(file) as checkpoint, torch.inference_mode():
            config = load_config(checkpoint.config)
            plan_weights(checkpoint, weight_specs(config))  # Refuses missing tensors and other shapes.
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                info = checkpoint.info(name)
                values = dequantize(checkpoint.read(name), info.encoding, info.shape)
                # A tensor may not be a view of the checkpoint's read-only mapping.
                parameter.copy_(torch.from_numpy(np.require(values, requirements="W")))
        self.vocab_size = config.vocab_size
        self._torch = torch
        self._transformers = transformers
        self._model = model.eval()
        self._cache: Any = None
        self._logits: Any = None

    def start(self, batch: int, length: int, context: int = 0) -> None:
        """Drop the cache; transformers grows a new one as it goes, here behind random keys and values."""
        self._cache = None
        if context:
            config = self._model.config
            shape = (batch, config.num_key_value_heads, context, config.head_dim)
            random = self._torch.Generator().manual_seed(_SEED)
            self._cache = self._transformers.DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                keys, values = (self._torch.randn(shape, generator=random) for _ in range(2))
                self._cache.update(keys, values, layer)

    def step(self, tokens: IntArray) -> None:
        """One forward pass that computes the last position's logits only."""
        with self._torch.inference_mode():
            ids = self._torch.from_numpy(tokens.astype(np.int64))
            output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self._logits = output.logits[:, -1]

    def logits(self) -> FloatArray:
        """f32 [batch, vocab]."""
        values: FloatArray = self._logits.float().numpy()
        return values


def transformers_bytes(file: Path) -> int:
    """Bytes that a checkpoint's weights take in float32.

    Raises:
        SourceError: the checkpoint cannot be read.
    """
    from llmir_iree.params.checkpoint import open_checkpoint

    with open_checkpoint(file) as checkpoint:
        return sum(4 * int(np.prod(info.shape)) for info in checkpoint.tensors.values())


@dataclass(frozen=True)
class LlamaCppLog:
    """The errors that llama.cpp logs: one list for the whole process, as it has one log.

    `callback` is held because the library keeps only the pointer, and calls it as long as it runs.
    """

    callback: Any
    errors: list[str]

    def first_error(self) -> str:
        """The log's first error, which is the cause; those after it say what it led to."""
        return self.errors[0] if self.errors else "it does not say why"


def import_llama_cpp() -> tuple[Any, LlamaCppLog]:
    """The package llama-cpp-python, and its log, empty.

    Raises:
        RequestError: it is not installed.
    """
    try:
        llama = import_module("llama_cpp")
    except ImportError:
        raise RequestError(
            'llama.cpp is not installed; pip install "llmir-iree[bench]" (it compiles for some minutes)'
        ) from None
    log = _take_log(llama)
    log.errors.clear()
    return llama, log


@cache
def _take_log(llama: Any) -> LlamaCppLog:
    errors: list[str] = []

    def take(level: int, text: bytes, _data: object) -> None:
        if level == _GGML_LOG_ERROR:
            errors.append(text.decode(errors="replace").strip())

    log = LlamaCppLog(llama.llama_log_callback(take), errors)
    llama.llama_log_set(log.callback, ctypes.c_void_p(0))
    return log


class LlamaCppEngine(Engine):
    """llama.cpp on the CPU through llama-cpp-python's low-level calls, without its tokenizer and its samplers."""

    name = "llama.cpp"

    def __init__(self, file: Path, threads: int) -> None:
        """Load the file.

        Raises:
            RequestError: the package is not installed.
            SourceError: llama.cpp refuses the file.
        """
        self._llama, self._log = import_llama_cpp()
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self._llama.llama_backend_init()

        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise SourceError(f"llama.cpp cannot load {file}: {self._log.first_error()}")
        self._threads = threads
        self.vocab_size = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self._shape = (0, 0)
        self._context: Any = None
        self._batch: Any = None
        self._position = 0
        self._count = 0
        self._held = 0  # Tokens of the context that the cache holds from an earlier start.

    def start(self, batch: int, length: int, context: int = 0) -> None:
        """Clear the cache but for the context; llama.cpp's own is made anew for another shape, with its defaults.

        llama.cpp takes no keys and values from outside, so a context is a prompt of random tokens, and kept.
        """
        room = -(-length // _LLAMA_CONTEXT_STEP) * _LLAMA_CONTEXT_STEP
        if self._shape != (batch, room):
            self._free_context()
            params = self._llama.llama_context_default_params()
            params.n_ctx = params.n_batch = batch * room  # The context is split evenly among the sequences.
            params.n_seq_max = batch
            params.n_threads = params.n_threads_batch = self._threads
            params.offload_kqv = params.op_offload = False  # A build for GPUs would use one even without layers there.
            self._context = self._llama.llama_init_from_model(self._model, params)
            if not self._context:
                raise RequestError(f"llama.cpp has no room for {batch} x {room} tokens: {self._log.first_error()}")
            self._batch = self._llama.llama_batch_init(batch * room, 0, 1)
            self._shape = (batch, room)
            self._held = 0
        memory = self._llama.llama_get_memory(self._context)
        if context and self._held == context:
            self._llama.llama_memory_seq_rm(memory, -1, context, -1)
        else:
            self._llama.llama_memory_clear(memory, False)
            self._position = 0
            if context:
                self.step(np.random.default_rng(_SEED).integers(self.vocab_size, size=(batch, context), dtype=np.int32))
        self._held = self._position = context

    def step(self, tokens: IntArray) -> None:
        """One llama_decode of all sequences' tokens, with logits for each sequence's last one."""
        self._decode(tokens, tokens.shape[1] - 1)

    def losses(self, tokens: IntArray, first: int) -> npt.NDArray[np.float64]:
        """As llama.cpp's perplexity does it: all tokens at once, with logits for the second half's."""
        batch, count = tokens.shape
        self.start(batch, count)
        self._decode(tokens, first)
        return np.stack(
            [
                token_losses(
                    np.stack([self._logits(row * count + index) for row in range(batch)]), tokens[:, index + 1]
                )
                for index in range(first, count - 1)
            ],
            axis=1,
        )

    def _decode(self, tokens: IntArray, first: int) -> None:
        """Append tokens; there are logits for those from `first` on."""
        rows, count = tokens.shape
        batch = self._batch
        batch.n_tokens = tokens.size
        for row in range(rows):
            for column in range(count):
                index = row * count + column
                batch.token[index] = tokens[row, column]
                batch.pos[index] = self._position + column
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = column >= first
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise RequestError(
                f"llama_decode of {rows} x {count} tokens ended with {status}: {self._log.first_error()}"
            )
        self._llama.llama_synchronize(self._context)
        self._position += count
        self._count = count

    def logits(self) -> FloatArray:
        """f32 [batch, vocab]."""
        return np.stack([self._logits((row + 1) * self._count - 1) for row in range(self._shape[0])])

    def close(self) -> None:
        """Free the context and the model."""
        self._free_context()
        self._llama.llama_model_free(self._model)

    def _logits(self, index: int) -> FloatArray:
        """f32 [vocab]: logits of one of the last call's tokens, of all rows in order; the library's own memory."""
        values = self._llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(values, (self.vocab_size,))

    def _free_context(self) -> None:
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._context = None
