"""llmir-trace ir: what each pass of the compiler made of a dispatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.trace_options import TRACE_CONTEXT, json_option
from llmir_iree.cli.trace_text import show_code, show_columns, show_diff

if TYPE_CHECKING:
    from llmir_iree.tracing.ir_history import IrDump, IrHistory, IrStep

STAGES = ("mlir", "llvm", "asm")


@click.command(cls=LlmirCommand, context_settings=TRACE_CONTEXT)
@click.argument("source", metavar="X", type=click.Path(path_type=Path))
@click.argument("dispatch", required=False)
@click.option(
    "--pass", "pass_name", metavar="NAME", help="The IR after this pass, each time it ran; or the number of a step."
)
@click.option("--diff", "is_diff", is_flag=True, help="What a pass changed; without --pass, what each of them did.")
@click.option(
    "--stage",
    type=click.Choice(STAGES),
    default="mlir",
    show_default=True,
    help="Passes, or what LLVM made of the result.",
)
@json_option
def main(source: Path, dispatch: str | None, pass_name: str | None, is_diff: bool, stage: str, as_json: bool) -> None:
    """Show the passes that changed DISPATCH, or the IR after one of them.

    X is a capture, a folder from llmir-compile --dump-ir or iree-compile's --mlir-print-ir-tree-dir, or a log of
    --mlir-print-ir-after-all. DISPATCH is a name, a part of one, or a pattern with *; without it, all are listed.
    """
    from llmir_iree.params.errors import RequestError

    if dispatch is None and (pass_name or is_diff or stage != "mlir"):
        raise RequestError("--pass, --diff and --stage need the name of a dispatch; without one, all are listed")
    if stage != "mlir" and (pass_name or is_diff):
        raise RequestError("--pass and --diff go with --stage mlir: LLVM's own passes are not recorded")
    if dispatch is None:
        _list(_open(source), as_json)
    elif stage != "mlir":
        _show_machine_code(source, dispatch, stage, as_json)
    else:
        _show(_open(source).select(dispatch), pass_name, is_diff, as_json)


def _open(source: Path) -> IrDump:
    from llmir_iree.tracing.ir_history import IrDump

    return IrDump.open(source)


def _list(dump: IrDump, as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "name": history.name,
                "executable": history.executable,
                "exports": list(history.exports),
                "steps": len(history.steps),
            }
            for history in dump.dispatches
        ]
        click.echo(json.dumps({"source": str(dump.source), "dispatches": rows}, indent=2))
        return
    lines = [(history.name, history.executable, str(len(history.steps))) for history in dump.dispatches]
    show_columns([("dispatch", "executable", "passes that changed it"), *lines], right=(2,))


def _show(histories: list[IrHistory], pass_name: str | None, is_diff: bool, as_json: bool) -> None:
    with_text = pass_name is not None or is_diff
    chosen = [(history, _choose(history, pass_name)) for history in histories]
    if as_json:
        click.echo(json.dumps([_as_data(*pair, with_text, is_diff) for pair in chosen], indent=2))
        return
    for index, (history, steps) in enumerate(chosen):
        click.echo("\n" * (index > 0) + f"// {history.name} in {history.executable}")
        if not with_text:
            _show_steps(steps)
            continue
        for number, step in steps:
            click.secho(f"// step {number}: {step.pass_name}{step.options} on {step.level}", bold=True)
            if is_diff:
                show_diff(step.diff())
            else:
                show_code(step.text, "llvm")


def _show_steps(steps: list[tuple[int, IrStep]]) -> None:
    rows = [
        (str(number), step.level, step.pass_name, f"+{step.lines[0]}", f"-{step.lines[1]}") for number, step in steps
    ]
    show_columns([("step", "level", "pass", "added", "removed"), *rows], right=(0, 3, 4))


def _choose(history: IrHistory, pass_name: str | None) -> list[tuple[int, IrStep]]:
    """Steps of a name, or the one of a number, with their numbers."""
    from difflib import get_close_matches

    from llmir_iree.params.errors import RequestError

    steps = list(enumerate(history.steps, 1))
    if pass_name is None:
        return steps
    if pass_name.isdecimal():
        found = [entry for entry in steps if entry[0] == int(pass_name)]
    else:
        found = [entry for entry in steps if entry[1].pass_name == pass_name]
        found = found or [entry for entry in steps if pass_name in entry[1].pass_name]
    if not found:
        names = list(dict.fromkeys(step.pass_name for step in history.steps))
        near = get_close_matches(pass_name, names, 5, 0.3)
        hint = f"the nearest: {', '.join(near)}" if near else f"{len(steps)} passes changed it, see them without --pass"
        raise RequestError(f"{history.name}: no pass {pass_name!r} changed it; {hint}")
    return found


def _as_data(history: IrHistory, steps: list[tuple[int, IrStep]], with_text: bool, is_diff: bool) -> dict[str, object]:
    rows = []
    for number, step in steps:
        added, removed = step.lines
        row: dict[str, object] = {
            "step": number,
            "pass": step.pass_name,
            "options": step.options,
            "level": step.level,
            "added": added,
            "removed": removed,
        }
        if with_text:
            row["diff" if is_diff else "text"] = step.diff() if is_diff else step.text
        rows.append(row)
    return {
        "name": history.name,
        "executable": history.executable,
        "exports": list(history.exports),
        "steps": rows,
    }


def _show_machine_code(source: Path, dispatch: str, stage: str, as_json: bool) -> None:
    from llmir_iree.tracing.capture import CaptureError
    from llmir_iree.tracing.machine_code import code_folder, find_assembly, find_llvm

    # Machine code may lie there without IR; it goes by the full name then.
    name = dispatch
    names: tuple[str, ...] = (dispatch,)
    try:
        dump = _open(source)
    except CaptureError:
        if not source.is_dir():
            raise
    else:
        history = dump.find(dispatch)
        name, names = history.name, history.exports or (history.executable,)
    text = (find_llvm if stage == "llvm" else find_assembly)(code_folder(source), names)
    if as_json:
        click.echo(json.dumps({"name": name, "stage": stage, "text": text}, indent=2))
    else:
        show_code(text, "llvm" if stage == "llvm" else "gas")
