"""llmir-trace ir-diff: the first pass at which two compilations of a dispatch part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.trace_options import TRACE_CONTEXT, json_option
from llmir_iree.cli.trace_text import show_diff

if TYPE_CHECKING:
    from llmir_iree.tracing.ir_compare import Divergence
    from llmir_iree.tracing.ir_configs import LoweringConfig
    from llmir_iree.tracing.ir_history import IrDump, IrHistory


@click.command(cls=LlmirCommand, context_settings=TRACE_CONTEXT)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.argument("dispatch", required=False)
@click.option("--dispatch-b", metavar="NAME", help="What DISPATCH is called in B, if it has another name there.")
@json_option
def main(a: Path, b: Path, dispatch: str | None, dispatch_b: str | None, as_json: bool) -> None:
    """Find the first pass at which DISPATCH parts for good, from A to B; without DISPATCH, for all of them.

    A and B are captures, folders or logs, as llmir-trace ir takes them.
    """
    from llmir_iree.params.errors import RequestError
    from llmir_iree.tracing.ir_history import IrDump
    from llmir_iree.tracing.recorded_modules import describe_difference, find_module

    if dispatch_b is not None and dispatch is None:
        raise RequestError("--dispatch-b needs DISPATCH, the name in A")
    ours, theirs = IrDump.open(a), IrDump.open(b)
    programs = [history.program for history in ours.programs]
    made = tuple(
        line for program in programs for line in describe_difference(find_module(a, program), find_module(b, program))
    )
    if dispatch is None:
        _show_all(ours, theirs, made, as_json)
    else:
        _show_one(ours, theirs, dispatch, dispatch_b or dispatch, made, as_json)


def _show_one(a: IrDump, b: IrDump, name_a: str, name_b: str, made: tuple[str, ...], as_json: bool) -> None:
    from llmir_iree.tracing.capture import CaptureError
    from llmir_iree.tracing.ir_compare import compare, compare_programs

    sides = {}
    problems = []
    for side, dump, name in (("A", a, name_a), ("B", b, name_b)):
        try:
            sides[side] = dump.find(name)
        except CaptureError as error:
            problems.append(error)
    if len(problems) == 2:
        raise problems[0]
    if problems:
        side, history = next(iter(sides.items()))
        found, title = compare_programs(a, b), f"{history.name}: only in {side}"
    else:
        found, title = compare(sides["A"], sides["B"]), sides["A"].name
    if as_json:
        only = next(iter(sides)) if problems else None
        data = {"dispatch": title if not only else history.name, "only_in": only, "divergence": _as_data(found)}
        click.echo(json.dumps({**data, "modules": list(made)}, indent=2))
        return
    click.secho(title, bold=True)
    for problem in problems:
        click.echo(str(problem))
    _show(found, made)


def _show(found: Divergence | None, made: tuple[str, ...]) -> None:
    if found is None:
        click.echo("the same IR after every pass")
    else:
        click.echo(found.summary())
    for line in made:
        click.echo(line)
    if found is None:
        return
    click.echo()
    if found.level == "target":
        click.echo(found.hunk)
    else:
        show_diff(found.hunk)
    for side, passes in (("A", found.only_a), ("B", found.only_b)):
        if passes:
            click.echo(f"\npasses that changed it in {side} only: {', '.join(dict.fromkeys(passes))}")
    if found.configs_a or found.configs_b:
        click.echo()
        _show_configs(found.configs_a, found.configs_b)


def _show_configs(a: tuple[LoweringConfig, ...], b: tuple[LoweringConfig, ...]) -> None:
    from llmir_iree.tracing.ir_configs import pair_configs

    for op, ours, theirs in pair_configs(a, b):
        if ours == theirs and ours is not None:
            click.echo(f"{op}\n  A, B  {ours.text}")
        else:
            click.echo(f"{op}\n  A  {ours.text if ours else 'nothing'}\n  B  {theirs.text if theirs else 'nothing'}")


def _show_all(a: IrDump, b: IrDump, made: tuple[str, ...], as_json: bool) -> None:
    from llmir_iree.tracing.ir_compare import compare, compare_programs, match_dispatches

    matching = match_dispatches(a, b)
    compared: list[tuple[IrHistory, Divergence | None]] = [
        (ours, compare(ours, theirs)) for ours, theirs in matching.pairs
    ]
    around = compare_programs(a, b) if matching.only_a or matching.only_b else None
    if as_json:
        data = {
            "dispatches": [{"dispatch": history.name, "divergence": _as_data(found)} for history, found in compared],
            "only_a": [history.name for history in matching.only_a],
            "only_b": [history.name for history in matching.only_b],
            "program": _as_data(around),
            "modules": list(made),
        }
        click.echo(json.dumps(data, indent=2))
        return
    for line in made:
        click.echo(line)
    for history, found in compared:
        click.echo(f"{history.name}: {found.summary() if found else 'the same'}")
    for side, only in (("A", matching.only_a), ("B", matching.only_b)):
        for history in only:
            click.echo(f"{history.name}: only in {side}")
    if around is not None:
        click.echo(f"the program: {around.summary()}")


def _as_data(found: Divergence | None) -> dict[str, object] | None:
    from dataclasses import asdict

    return None if found is None else {"summary": found.summary(), **asdict(found)}
