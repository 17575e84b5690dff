"""llmir-trace overhead: what recording adds to a call."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.trace_options import TRACE_CONTEXT, subject_options
from llmir_iree.cli.trace_text import show_columns

if TYPE_CHECKING:  # Imported when the command runs, so that --help is instant.
    from llmir_iree.tracing.overhead import Overhead, Ratio


@click.command("overhead", cls=LlmirCommand, context_settings=TRACE_CONTEXT)
@click.argument("subject", type=click.Path(path_type=Path), metavar="SUBJECT")
@click.option("--calls", type=int, default=30, show_default=True, help="Calls that are timed in a process.")
@click.option("--rounds", type=int, default=12, show_default=True, help="Processes of each kind.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds until a process is killed.")
@subject_options(["prefill", "decode"], "decode")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    subject: Path,
    calls: int,
    rounds: int,
    timeout: float,
    target: str | None,
    device: str | None,
    phase: Any,
    context: int | None,
    batch: int,
    tokens: int | None,
    function: str | None,
    inputs: tuple[str, ...],
    parameters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Call a function of SUBJECT without a profiler, with .ireeprof and with Tracy, in turns.

    SUBJECT is what llmir-trace record takes. Ratios are of times with a profiler to those without, in processes of the
    same round: the median of all rounds, and its interval at 95% by bootstrap.
    """
    from llmir_iree.trace_subjects import SubjectOptions, open_subject
    from llmir_iree.tracing.overhead import OverheadOptions, measure_overhead

    options = OverheadOptions(calls, rounds, timeout)
    asked = SubjectOptions(subject, phase, context, batch, tokens, function, inputs, parameters, target, device)
    with open_subject(asked) as opened:
        found = measure_overhead(
            opened.workload, options, lambda line: None if quiet else click.echo(f"{line} ...", err=True)
        )
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _show(found, options)


def _show(found: Overhead, options: Any) -> None:
    click.echo(
        f"A call takes {found.call_ns / 1e6:.3f} ms without a profiler. {options.rounds} rounds, {options.calls} calls "
        "in each process:"
    )
    if found.costs:
        rows = [(cost.source, *_cells(cost.median), *_cells(cost.mean)) for cost in found.costs]
        show_columns([("with", "median call", "95%", "mean call", "95%"), *rows], right=(1, 2, 3, 4))
    for name, reason in found.missing.items():
        click.echo(f"missing: {name}: {reason}")


def _cells(ratio: Ratio) -> tuple[str, str]:
    return f"{ratio.value - 1:+.1%}", f"{ratio.low - 1:+.1%} {ratio.high - 1:+.1%}"
