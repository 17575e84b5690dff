"""llmir-trace record: runs a bundle or a module under profilers, and writes a capture."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.options import NameList
from llmir_iree.cli.trace_options import TRACE_CONTEXT, subject_options

if TYPE_CHECKING:
    from llmir_iree.tracing.capture import Capture

GENERATE = "generate"
DEFAULT_PROMPT = "The capital of France is"
DEFAULT_MAX_TOKENS = 32


@click.command("record", cls=LlmirCommand, context_settings=TRACE_CONTEXT)
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
@click.option("--processes", type=int, default=3, show_default=True, help="Processes of each, one after the other.")
@click.option(
    "--against",
    type=(click.Path(path_type=Path), click.Path(path_type=Path)),
    multiple=True,
    metavar="SUBJECT NAME.llmtrace",
    help="Record another subject in turns with the first one, process by process, for diff; repeatable.",
)
@click.option(
    "--against-flag",
    "against_flags",
    multiple=True,
    metavar="FLAG",
    help="One more flag of iree-compile for MLIR to record against, after those behind --; repeatable.",
)
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds until a child is killed.")
@click.option("--force", is_flag=True, help="Replace a capture that exists.")
@subject_options(["prefill", "decode", GENERATE], "decode, or that of a .vmfb")
@click.option("--prompt", metavar="TEXT", help=f"What --phase {GENERATE} completes.")
@click.option("--max-tokens", type=int, metavar="N", help="Most tokens that it generates.  [default: 32]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest to stdout, with --against a list.")
def main(
    subject: Path,
    iree_flags: tuple[str, ...],
    output: Path,
    sources: Any,
    runs: int,
    processes: int,
    against: tuple[tuple[Path, Path], ...],
    against_flags: tuple[str, ...],
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

    With --against the processes of both run in turns: A B, B A, A B. What slows the machine down then slows both, so
    that diff can tell a machine that is slower from a module that is. All other options hold for both.
    """
    from llmir_iree.params.errors import RequestError

    if phase == GENERATE:
        refused = {
            "--against": against,
            "--with": sources,
            "--context": context,
            "--tokens": tokens,
            "--function": function,
            "--input": inputs,
            "--parameters": parameters,
            "flags of iree-compile": iree_flags,
        }
        if given := [name for name, value in refused.items() if value not in (None, ())]:
            raise RequestError(f"{given[0]}: not with --phase {GENERATE}, which completes one prompt under Tracy")
        with _progress(quiet) as report:
            capture = _record_generate(subject, output, prompt, max_tokens, target, device, timeout, force, report)
        if as_json:
            click.echo(capture.manifest.model_dump_json(indent=2))
        return
    if prompt is not None or max_tokens is not None:
        raise RequestError(f"--prompt and --max-tokens go with --phase {GENERATE}")
    if against_flags and not against:
        raise RequestError("--against-flag: there is nothing to record against; --against SUBJECT NAME.llmtrace")
    from llmir_iree.trace_subjects import SubjectOptions, open_subject
    from llmir_iree.tracing.record import RecordOptions, capture_is_free, record_in_turns

    outputs = [output, *(place for _, place in against)]
    if len({place.absolute() for place in outputs}) < len(outputs):
        raise RequestError("two captures cannot be written to one place; give each subject a name of its own")
    for place in outputs:
        capture_is_free(place, force=force)
    first = SubjectOptions(
        subject, phase, context, batch, tokens, function, inputs, parameters, target, device, iree_flags
    )
    asked = [first, *(replace(first, path=path, flags=(*iree_flags, *against_flags)) for path, _ in against)]
    options = RecordOptions(runs, processes, sources, timeout, force)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_subject(one)) for one in asked]
        report = stack.enter_context(_progress(quiet))
        captures = record_in_turns(list(zip(opened, outputs, strict=True)), options, report)
    if as_json:
        manifests = [capture.manifest.model_dump(mode="json") for capture in captures]
        click.echo(json.dumps(manifests if against else manifests[0], indent=2))


def _record_generate(
    bundle: Path,
    output: Path,
    prompt: str | None,
    max_tokens: int | None,
    target: str | None,
    device: str | None,
    timeout: float,
    force: bool,
    report: Callable[[str], None],
) -> Capture:
    """Hand over to the recorder of whole generations."""
    from functools import partial

    from llmir_iree.trace_build import describe_machine
    from llmir_iree.trace_subjects import find_ir
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
        ir=find_ir(bundle, target),
        report=report,
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
            self._console.print(f"{line} ...", markup=False, highlight=False, soft_wrap=True)
