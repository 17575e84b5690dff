"""Traces the packed model into the portable prefill and decode modules."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llmir_iree.export.clean import clean, print_short
from llmir_iree.export.model import page_shape
from llmir_iree.export.step import Step
from llmir_iree.params.errors import RequestError

PARAMETER_SCOPE = "model"
CacheDtype = Literal["f16", "bf16", "f32"]
CACHE_DTYPES: dict[str, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
PHASES = ("prefill", "prefill_chunk", "decode")

# Dynamic sizes start at 2: torch.export specialises 0 and 1. Callers pad.
_SMALLEST_DYNAMIC = 2
_MOST_PAGES = 1 << 24

CHUNK_SIZES = (64, 128)
"""Tokens of a chunk of a prefill: whole tiles of every matrix instruction."""


@dataclass(frozen=True)
class TraceOptions:
    """What a bundle is exported for."""

    batch_sizes: tuple[int, ...] = (1, 4)
    page_size: int = 32
    cache_dtype: CacheDtype = "f16"
    max_seq_len: int = 2048
    chunk_tokens: int = 128

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise RequestError(f"batch sizes must be distinct and positive, not {self.batch_sizes}")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise RequestError(f"page size must be a power of two, not {self.page_size}")
        if self.cache_dtype not in CACHE_DTYPES:
            raise RequestError(f"cache dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype}")
        if self.chunk_tokens not in CHUNK_SIZES:
            known = " or ".join(map(str, CHUNK_SIZES))
            raise RequestError(f"a chunk of a prefill must have {known} tokens, not {self.chunk_tokens}")
        if self.max_seq_len < _SMALLEST_DYNAMIC:
            raise RequestError(f"max sequence length must be at least {_SMALLEST_DYNAMIC}, not {self.max_seq_len}")

    @property
    def table_size(self) -> int:
        """Entries of the page table that cover the longest sequence."""
        return max(_SMALLEST_DYNAMIC + 1, -(-self.max_seq_len // self.page_size))


@dataclass(frozen=True)
class TensorSpec:
    """An argument or a result; a dimension that varies is named by a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class FunctionSpec:
    """A traced function."""

    name: str
    phase: str
    batch_size: int
    arguments: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class PortableModule:
    """The MLIR of one phase, with `llmir` ops and without weights, and the functions in it."""

    phase: str
    text: str
    functions: tuple[FunctionSpec, ...]


def trace_phase(model: nn.Module, config: Any, phase: str, options: TraceOptions) -> PortableModule:
    """Trace one phase: a chunk of a prefill for the smallest batch size, the others for every one.

    Args:
        model: what `build_model` gave.
        config: the model's transformers config.
        phase: "prefill" (any number of tokens a row), "prefill_chunk" (`options.chunk_tokens` columns, padding among
            them) or "decode" (one token a row).
        options: batch sizes, page size and the cache's dtype.

    Returns:
        A module named after the phase, whose function for batch size B is `{phase}_bs{B}`.
    """
    from iree.turbine import aot

    assert phase in PHASES
    aot.externalize_module_parameters(model, external_scope=PARAMETER_SCOPE)
    builder = aot.FxProgramsBuilder(Step(model))
    # Rows of a chunk run one after another, as they have different lengths.
    batch_sizes = (min(options.batch_sizes),) if phase == "prefill_chunk" else options.batch_sizes
    functions = tuple(_signature(config, phase, batch_size, options) for batch_size in batch_sizes)
    seq = {1: torch.export.Dim("seq", min=_SMALLEST_DYNAMIC, max=options.max_seq_len)} if phase == "prefill" else None
    table = torch.export.Dim("table", min=_SMALLEST_DYNAMIC, max=options.table_size)
    pages = torch.export.Dim("pages", min=_SMALLEST_DYNAMIC, max=_MOST_PAGES)
    with warnings.catch_warnings():
        # torch.export warns of its own use of a class that it is about to rename.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        for function in functions:

            @builder.export_program(
                name=function.name,
                args=tuple(_example(argument) for argument in function.arguments),
                dynamic_shapes=(seq, None, None, {1: table}, {0: pages}),
                strict=False,
            )
            def _(module: Any, tokens: Any, starts: Any, lengths: Any, page_table: Any, cache: Any) -> Any:
                return module(tokens, starts, lengths, page_table, cache)

        exported = aot.export(builder, module_name=phase)
    module = exported.mlir_module
    clean(module)
    return PortableModule(phase, print_short(module), functions)


def _signature(config: Any, phase: str, batch: int, options: TraceOptions) -> FunctionSpec:
    columns: dict[str, int | str] = {"prefill": "seq", "prefill_chunk": options.chunk_tokens, "decode": 1}
    cache = TensorSpec("cache", options.cache_dtype, ("pages", *page_shape(config, options.page_size)))
    return FunctionSpec(
        name=f"{phase}_bs{batch}",
        phase=phase,
        batch_size=batch,
        arguments=(
            TensorSpec("tokens", "i32", (batch, columns[phase])),
            TensorSpec("starts", "i32", (batch,)),
            TensorSpec("lengths", "i32", (batch,)),
            TensorSpec("page_table", "i32", (batch, "table")),
            cache,
        ),
        results=(
            TensorSpec("logits", "f32", (batch, config.vocab_size)),
            TensorSpec("next_token", "i32", (batch,)),
            cache,
        ),
    )


# Sizes that stand in for the dynamic ones while tracing; any that torch does not specialise.
_EXAMPLE_SIZES = {"seq": 7, "table": 3, "pages": 5}


def _example(argument: TensorSpec) -> torch.Tensor:
    shape = [_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in argument.shape]
    return torch.zeros(shape, dtype=CACHE_DTYPES.get(argument.dtype, torch.int32))
