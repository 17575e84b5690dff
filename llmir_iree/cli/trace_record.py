"""llmir-trace record: runs a bundle or a module under profilers, and writes a capture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.options import NameList

if TYPE_CHECKING:
    from llmir_iree.tracing.capture import Capture, Source

GENERATE = "generate"
DEFAULT_PROMPT = "The capital of France is"
DEFAULT_MAX_TOKENS = 32


@click.command("record", cls=LlmirCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("subject", type=click.Path(path_type=Path), metavar="SUBJECT")
@click.argument("iree_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- IREE_COMPILE_FLAG...]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="NAME.llmtrace", help="Folder to write."
)
@click.option(
    "--with",
    "sources",
    type=NameList(),
    default=None,
    help="What to capture: ireeprof (dispatches), tracy (zones of the runtime), ir.  [default: ireeprof, and ir where "
    "it is known]",
)
@click.option("--runs", type=int, default=20, show_default=True, help="Calls in a process, after one to warm up.")
@click.option("--processes", type=int, default=3, show_default=True, help="Processes, one after the other.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds until a child is killed.")
@click.option("--force", is_flag=True, help="Replace a capture that exists.")
@click.option("--target", help="Which of a bundle's targets to run; what to compile MLIR for.")
@click.option("--device", help="IREE device URI; the target's driver by default.")
@click.option(
    "--phase",
    type=click.Choice(["prefill", "decode", GENERATE]),
    help="Of a bundle.  [default: decode, or that of a .vmfb]",
)
@click.option("--context", type=int, help="Tokens in a bundle's cache already.  [default: 128 for a decode, else 0]")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences that a bundle runs side by side.")
@click.option("--tokens", type=int, help="New tokens of each sequence in a prefill.  [default: 128]")
@click.option("--prompt", metavar="TEXT", help=f"What --phase {GENERATE} completes.")
@click.option("--max-tokens", type=int, metavar="N", help="Most tokens that it generates.  [default: 32]")
@click.option("--function", metavar="NAME", help="Of another module; its only one by default.")
@click.option("--input", "inputs", multiple=True, metavar="VALUE", help="Of another module, such as 4x8xf32=1.")
@click.option("--parameters", multiple=True, metavar="SCOPE=FILE", help="Archive of another module; repeatable.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the capture's manifest to stdout.")
def main(
    subject: Path,
    iree_flags: tuple[str, ...],
    output: Path,
    sources: Any,
    runs: int,
    processes: int,
    timeout: float,
    force: bool,
    target: str | None,
    device: str | None,
    phase: Any,
    context: int | None,
    batch: int,
    tokens: int | None,
    prompt: str | None,
    max_tokens: int | None,
    function: str | None,
    inputs: tuple[str, ...],
    parameters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Run SUBJECT under profilers and write what they saw.

    SUBJECT is a bundle, a .vmfb, or an .mlir file, which is compiled for --target first with the flags after --. Each
    process calls one function again and again; --phase generate completes a prompt instead, and captures all of that
    through Tracy. What cannot be captured is told, and the rest is written.
    """
    if phase == GENERATE:
        capture = _record_generate(subject, output, prompt, max_tokens, target, device, timeout, force)
        if as_json:
            click.echo(capture.manifest.model_dump_json(indent=2))
        return
    if prompt is not None or max_tokens is not None:
        from llmir_iree.params.errors import RequestError

        raise RequestError(f"--prompt and --max-tokens go with --phase {GENERATE}")
    from llmir_iree.trace_subjects import SubjectOptions, open_subject
    from llmir_iree.tracing.record import RecordOptions, capture_is_free, record

    capture_is_free(output, force=force)
    asked = SubjectOptions(
        subject, phase, context, batch, tokens, function, inputs, parameters, target, device, iree_flags
    )
    with open_subject(asked) as opened, _progress(quiet) as report:
        known: tuple[Source, ...] = ("ireeprof", "ir") if opened.ir is not None else ("ireeprof",)
        options = RecordOptions(output, runs, processes, known if sources is None else sources, timeout, force)
        capture = record(opened, options, report)
    if as_json:
        click.echo(capture.manifest.model_dump_json(indent=2))


def _record_generate(
    bundle: Path,
    output: Path,
    prompt: str | None,
    max_tokens: int | None,
    target: str | None,
    device: str | None,
    timeout: float,
    force: bool,
) -> Capture:
    """Hand over to the recorder of whole generations."""
    from functools import partial

    from llmir_iree.trace_build import describe_machine
    from llmir_iree.tracing.generate_capture import record_generate

    is_local = device is None or device.startswith("local")
    return record_generate(
        bundle,
        output,
        prompt=prompt or DEFAULT_PROMPT,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        target=target,
        device=device,
        timeout_s=timeout,
        force=force,
        machine=partial(describe_machine, None, is_local=is_local),
    )


def _progress(quiet: bool) -> AbstractContextManager[Callable[[str], None]]:
    """Shows stages on stderr as they begin, and what is missing even if quiet."""
    if quiet:
        return nullcontext(lambda line: click.echo(line, err=True) if line.startswith("missing") else None)
    return _Status()


class _Status(AbstractContextManager[Callable[[str], None]]):
    """The stage that is running, with a spinner where stderr is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status = self._console.status("starting")

    def __enter__(self) -> Callable[[str], None]:
        self._status.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def _show(self, line: str) -> None:
        if line.startswith("missing"):
            self._console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        elif self._console.is_terminal:
            self._status.update(line)
        else:
            self._console.print(f"{line} ...", markup=False, highlight=False)
