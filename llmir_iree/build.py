"""Builds a bundle: a checkpoint in, a folder with portable modules, parameters, tokenizer and compiled modules out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmir_iree.bundle import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    PARAMETERS_NAME,
    TOKENIZER_FOLDER,
    Bundle,
    CacheDtype,
    CacheInfo,
    FileInfo,
    FunctionInfo,
    LayoutInfo,
    Manifest,
    ModelInfo,
    ParametersInfo,
    file_sha256,
)
from llmir_iree.compile import compile_bundle
from llmir_iree.export.model import build_model, load_config, page_shape, weight_specs
from llmir_iree.export.trace import PHASES, PortableModule, TraceOptions, trace_phase
from llmir_iree.params.archive import ArchiveInfo, write_archive
from llmir_iree.params.checkpoint import Checkpoint, open_checkpoint
from llmir_iree.params.errors import BundleError, LlmirError, RequestError
from llmir_iree.params.layouts import layout_of
from llmir_iree.params.plan import PlannedWeight, describe_conversions, plan_weights
from llmir_iree.params.sources.companions import copy_tokenizer
from llmir_iree.plugins.lowering import Preference
from llmir_iree.targets import Target

# A longer default would only make page tables larger; --max-seq-len asks for more.
DEFAULT_MAX_SEQ_LEN = 8192


@dataclass(frozen=True)
class BuildOptions:
    """What to build: the checkpoint, where to, and for what."""

    source: str
    output: Path
    config: Path | None = None
    tokenizer: Path | None = None
    quant: str = "keep"
    batch_sizes: tuple[int, ...] = (1, 4)
    page_size: int = 32
    max_seq_len: int | None = None
    cache_dtype: CacheDtype = "f16"
    chunk_tokens: int = 128
    targets: tuple[Target, ...] = ()
    implementations: Preference = "best"
    passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reporter:
    """How a build tells what it is doing: a line when a stage begins, bytes of parameters as they are written."""

    stage: Callable[[str], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None
    start_parameters: Callable[[int, int], Callable[[str, int], None]] = lambda _tensors, _bytes: lambda _name, _n: None


def build_bundle(options: BuildOptions, report: Reporter | None = None) -> Bundle:
    """Export a checkpoint and compile it for the targets.

    The bundle is written beside its place and renamed when it is whole; an older bundle there is replaced then.

    Raises:
        LlmirError: whatever is wrong with the checkpoint, the options, the compile or the disk, in one line.
    """
    report = report or Reporter()
    with (
        open_checkpoint(options.source, config=options.config) as checkpoint,
        _folder_in_place(options.output) as folder,
    ):
        report.stage(f"reading {checkpoint.source}")
        config = load_config(checkpoint.config)
        trace_options = TraceOptions(
            options.batch_sizes,
            options.page_size,
            options.cache_dtype,
            _max_seq_len(options.max_seq_len, config),
            options.chunk_tokens,
        )
        plan = plan_weights(checkpoint, weight_specs(config), options.quant)
        for line in describe_conversions(plan):
            report.note(f"converted: {line}")
        _save_tokenizer(checkpoint, options.tokenizer, folder / TOKENIZER_FOLDER, report)

        model = build_model(config, plan)
        portable: list[PortableModule] = []
        for phase in PHASES:
            report.stage(f"tracing {phase}")
            portable.append(trace_phase(model, config, phase, trace_options))
            (folder / f"{phase}.mlir").write_text(portable[-1].text, encoding="utf-8")

        report.stage("writing parameters")
        nbytes = sum(weight.nbytes for weight in plan)
        archive = write_archive(checkpoint, plan, folder / PARAMETERS_NAME, report.start_parameters(len(plan), nbytes))
        manifest = _describe(folder, checkpoint, config, trace_options, plan, archive, portable)
        bundle = Bundle(folder, manifest)
        bundle.save()
        for target in options.targets:
            report.stage(f"compiling for {target.name}")
            compile_bundle(bundle, target, implementations=options.implementations, passes=options.passes)
    return Bundle.open(options.output)


@contextmanager
def _folder_in_place(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and vanishes when it does not."""
    if output.exists() and not (output / MANIFEST_NAME).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output}: exists and is not a bundle; name another folder, or remove it first")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise LlmirError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _max_seq_len(asked: int | None, config: Any) -> int:
    limit = int(config.max_position_embeddings)
    if asked is None:
        return min(limit, DEFAULT_MAX_SEQ_LEN)
    if not 2 <= asked <= limit:
        raise RequestError(f"--max-seq-len {asked}: the model was trained for 2 to {limit} positions")
    return asked


def _save_tokenizer(checkpoint: Checkpoint, given: Path | None, folder: Path, report: Reporter) -> None:
    folder.mkdir()
    if given is not None:
        copy_tokenizer(given, folder)
        return
    try:
        checkpoint.save_tokenizer(folder)
    except LlmirError as error:
        # Weights without a tokenizer still compile, run on token ids and can be timed.
        report.note(f"no tokenizer in the bundle: {error}")
        folder.rmdir()


def _describe(
    folder: Path,
    checkpoint: Checkpoint,
    config: Any,
    options: TraceOptions,
    plan: Sequence[PlannedWeight],
    archive: ArchiveInfo,
    portable: Sequence[PortableModule],
) -> Manifest:
    functions = [function for module in portable for function in module.functions]
    cache_shape = page_shape(config, options.page_size)
    _layers, _, kv_heads, _page_size, head_dim = cache_shape
    formats: dict[str, int] = {}
    for weight in plan:
        if weight.spec.kind != "vector":
            formats[weight.format] = formats.get(weight.format, 0) + 1
    return Manifest.model_validate(
        {
            "version": MANIFEST_VERSION,
            "generator": f"llmir-iree {version('llmir-iree')}",
            "source": Path(checkpoint.source).name,
            "model": ModelInfo(
                name=str(checkpoint.config.get("_name_or_path") or Path(checkpoint.source).stem),
                model_type=config.model_type,
                layers=config.num_hidden_layers,
                heads=config.num_attention_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                hidden_size=config.hidden_size,
                vocab_size=config.vocab_size,
                max_seq_len=options.max_seq_len,
                bos_token_id=_token_ids(config.bos_token_id)[0] if _token_ids(config.bos_token_id) else None,
                eos_token_ids=_token_ids(config.eos_token_id),
            ),
            "cache": CacheInfo(dtype=options.cache_dtype, page_size=options.page_size, page_shape=cache_shape),
            "parameters": ParametersInfo(
                file=PARAMETERS_NAME,
                nbytes=archive.nbytes,
                sha256=archive.sha256,
                layouts={name: LayoutInfo(**asdict(layout_of(name))) for name in formats},
                formats=formats,
                merged={weight.name: weight.sibling_names for weight in archive.merged},
                decode_bytes=sum(weight.nbytes for weight in plan if weight.spec.kind != "embedding"),
            ),
            "portable": {
                module.phase: FileInfo(file=f"{module.phase}.mlir", sha256=file_sha256(folder / f"{module.phase}.mlir"))
                for module in portable
            },
            "functions": tuple(FunctionInfo.model_validate(asdict(function)) for function in functions),
        }
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
