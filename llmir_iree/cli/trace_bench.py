"""llmir-trace bench: runs one dispatch of a capture alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.trace_options import TRACE_CONTEXT, json_option


@click.command("bench", cls=LlmirCommand, context_settings=TRACE_CONTEXT)
@click.argument("capture", type=click.Path(path_type=Path))
@click.argument("dispatch")
@click.option(
    "--module",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The .vmfb that was recorded, for a capture that holds no machine code. Another one is refused.",
)
@click.option("--repetitions", type=int, default=5, show_default=True, help="How often it is timed.")
@click.option(
    "--min-time", type=float, default=0.2, show_default=True, metavar="S", help="Least seconds of each repetition."
)
@click.option("--timeout", type=float, default=120.0, show_default=True, metavar="S", help="Seconds until it is ended.")
@json_option
def main(
    capture: Path,
    dispatch: str,
    module: Path | None,
    repetitions: int,
    min_time: float,
    timeout: float,
    as_json: bool,
) -> None:
    """Run DISPATCH of CAPTURE alone, with the recorded machine code and workgroups.

    Workgroups that differ from what the export declares in the capture's IR are refused.

    DISPATCH is the number of a site, the name of an export, or a pattern such as '*matmul*'. Its buffers hold zeros and
    stay in the caches: one that waits for memory is faster alone, and so is one whose work depends on what it reads.
    """
    from llmir_iree.tracing.capture import Capture
    from llmir_iree.tracing.dispatch_bench import BenchOptions, bench_dispatch

    options = BenchOptions(module, repetitions, min_time, timeout)
    found = bench_dispatch(Capture.open(capture), dispatch, options)
    setup = found.setup
    if as_json:
        row = {
            "function": setup.place.function,
            "site": setup.place.site,
            "key": setup.place.key,
            "format": setup.format,
            "ordinal": setup.ordinal,
            "workgroups": setup.workgroups,
            "bindings": setup.bindings,
            "constants": setup.constants,
            "device": found.device,
            "times_ns": found.times_ns,
            "median_ns": found.median_ns,
            "spread": found.spread,
            "recorded_ns": found.recorded_ns,
            "ratio": found.ratio,
        }
        click.echo(json.dumps(row, indent=2))
        return
    workgroups = "x".join(map(str, setup.workgroups))
    click.echo(f"{setup.place.key}, site {setup.place.site} of {setup.place.function}")
    click.echo(
        f"  {workgroups} workgroups, {sum(setup.bindings):,} bytes in {len(setup.bindings)} buffers, {found.device}"
    )
    click.echo(
        f"  alone {found.median_ns / 1e3:.2f} us, spread {found.spread:.1%} of {len(found.times_ns)} repetitions"
    )
    click.echo(f"  recorded {found.recorded_ns / 1e3:.2f} us: alone it takes {found.ratio:.2f} of that")
