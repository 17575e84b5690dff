"""llmir-bench: time a compiled bundle, alone or beside llama.cpp and transformers."""

from __future__ import annotations

from pathlib import Path

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.params.errors import LlmirError, RequestError


@click.command("llmir-bench", cls=LlmirCommand, context_settings={"max_content_width": 100})
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--tests",
    default="pp512,pp128,tg128",
    show_default=True,
    metavar="LIST",
    help="pp<n>: prompts of n tokens; tg<n>: n tokens decoded one at a time; tg<n>@<c>: the same behind c tokens of "
    "context, whose cache is random. x<b> behind a test is its own batch, as in pp512x1.",
)
@click.option(
    "--batch", metavar="LIST", help="Sequences side by side, such as 1,4; the bundle's batch sizes if left out."
)
@click.option("--repetitions", type=int, default=3, show_default=True, help="Runs of each test.")
@click.option("--vs", "peers", metavar="PEER", multiple=True, help="llama.cpp or transformers; may be repeated.")
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The checkpoint that the bundle was exported from: for the peers, and to compare logits with.",
)
@click.option(
    "--perplexity",
    type=int,
    default=0,
    metavar="TOKENS",
    help="Also measure the perplexity of so many tokens of Python's help texts, and llama.cpp's beside it.",
)
@click.option("--target", help="Which of the bundle's compiled targets to run.")
@click.option("--device", help="IREE device URI; the target's driver by default.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["markdown", "json", "csv"]),
    default="markdown",
    show_default=True,
    help="Of the results.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to write them; stdout if left out."
)
@click.option("--append", "is_appended", is_flag=True, help="Keep what the file holds, and add to it.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def main(
    bundle: Path,
    tests: str,
    batch: str | None,
    repetitions: int,
    peers: tuple[str, ...],
    gguf: Path | None,
    perplexity: int,
    target: str | None,
    device: str | None,
    format_name: str,
    output: Path | None,
    is_appended: bool,
    quiet: bool,
) -> None:
    """Time BUNDLE, a folder that llmir-export wrote, or one of the .vmfb files in it.

    The logits are compared with transformers' on the same weights first, and nothing is timed if they differ. The
    engines then take turns. Token ids are random: neither tokenizing nor sampling is timed.
    """
    from llmir_iree.bench import BenchOptions, run_bench
    from llmir_iree.bench_report import RENDERERS, append

    options = BenchOptions(
        bundle, _split(tests), _numbers(batch or ""), repetitions, peers, gguf, target, device, perplexity
    )
    if is_appended and output is None:
        raise RequestError("--append needs a file to add to: name it with --output FILE")
    if output is not None and not output.absolute().parent.is_dir():  # Known now, not after minutes.
        raise RequestError(f"{output}: no such folder to write to")
    text = RENDERERS[format_name](run_bench(options, lambda line: None if quiet else click.echo(line, err=True)))
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        if is_appended and output.exists():
            text = append(output.read_text(encoding="utf-8"), text, format_name)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LlmirError(f"cannot write {output}: {error.strerror or error}") from error


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        raise RequestError(f"--batch {text}: expected numbers such as 1,4") from None
