"""llmir-export: a checkpoint in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.options import compile_options
from llmir_iree.cli.progress import BuildProgress, show_flags

QUANT_CHOICES = ("keep", "q4_0", "q8_0", "f16", "bf16")
CACHE_DTYPES = ("f16", "bf16", "f32")
CHUNK_SIZES = ("64", "128")


class IntList(click.ParamType[tuple[int, ...]]):
    """Distinct positive integers, separated by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the list."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,4", param, ctx)
        if min(numbers) < 1 or len(set(numbers)) < len(numbers):
            self.fail(f"{value!r}: the integers must be positive and distinct", param, ctx)
        return numbers


@click.command(cls=LlmirCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="config.json of a .pt.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with tokenizer files, for a checkpoint that brings none.",
)
@click.option("--quant", type=click.Choice(QUANT_CHOICES), default="keep", help="Format of the linear layers.")
@click.option("--batch", "batch_sizes", type=IntList(), default="1,4", help="Batch sizes to export functions for.")
@click.option("--page-size", type=click.IntRange(min=1), default=32, help="Tokens a page of the cache holds.")
@click.option("--max-seq-len", type=int, help="Longest sequence.  [default: the model's, at most 8192]")
@click.option("--kv-dtype", type=click.Choice(CACHE_DTYPES), default="f16", help="Dtype of the cache.")
@click.option(
    "--prefill-chunk",
    type=click.Choice(CHUNK_SIZES),
    default="128",
    help="Tokens that a prefill on a GPU takes at once.",
)
@click.option("--no-compile", is_flag=True, help="Write the portable modules only.")
@compile_options
def main(
    source: str,
    output: Path,
    config: Path | None,
    tokenizer: Path | None,
    quant: str,
    batch_sizes: tuple[int, ...],
    page_size: int,
    max_seq_len: int | None,
    kv_dtype: Any,
    prefill_chunk: str,
    targets: tuple[str, ...],
    no_compile: bool,
    implementations: Any,
    passes: tuple[str, ...],
    verbose: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Export SOURCE as a bundle and compile it.

    SOURCE is a .gguf file, a .pt or .pth state dict, a Hugging Face folder, or a hub id such as org/name.
    """
    from llmir_iree.plugins.pipeline import select_passes
    from llmir_iree.targets import resolve_target

    select_passes(passes)  # Known now, not after minutes.
    resolved = () if no_compile else tuple(resolve_target(name) for name in targets)
    with BuildProgress(quiet=quiet) as progress:
        from llmir_iree.build import BuildOptions, build_bundle

        options = BuildOptions(
            source=source,
            output=output,
            config=config,
            tokenizer=tokenizer,
            quant=quant,
            batch_sizes=batch_sizes,
            page_size=page_size,
            max_seq_len=max_seq_len,
            cache_dtype=kv_dtype,
            chunk_tokens=int(prefill_chunk),
            targets=resolved,
            implementations=implementations,
            passes=passes,
        )
        bundle = build_bundle(options, progress.reporter())
    if verbose:
        show_flags(bundle.manifest.targets.values())
    if as_json:
        click.echo(bundle.manifest.model_dump_json(indent=2))
    elif not quiet:
        click.echo(f"{output}: {', '.join(bundle.manifest.targets) or 'portable modules only'}", err=True)
