"""Options that commands of llmir-trace share: what makes a row, how many, and where to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., None])

# Of every command: click's `context_settings`.
TRACE_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_ROWS = {
    "dispatch": "the code that runs and its shape",
    "kind": "its kind",
    "layer": "the model's layer",
    "phase": "the function",
    "site": "the place in the function",
}

json_option = click.option("--json", "as_json", is_flag=True, help="Print all that is known as JSON.")


def row_options(groupings: Sequence[str], top: int | None = None) -> Callable[[Command], Command]:
    """Add `by`, one of the groupings, and `top`, a number that is not checked yet or None, to a command.

    Args:
        groupings: names of what may make a row, the first of which is the default.
        top: how many rows are shown by default; all if None.
    """
    told = "; ".join(_ROWS[name] for name in groupings)

    def add(command: Command) -> Command:
        command = click.option(
            "--top",
            type=int,
            default=top,
            show_default=top is not None,
            metavar="N",
            help="Show only the first N rows, and the others as one.",
        )(command)
        return click.option(
            "--by",
            type=click.Choice(groupings),
            default=groupings[0],
            show_default=True,
            help=f"What makes a row: {told}.",
        )(command)

    return add


def subject_options(phases: Sequence[str], default: str) -> Callable[[Command], Command]:
    """Add what says which function of a bundle, or of another module, is called, and with what.

    Args:
        phases: what `phase` may be.
        default: which of them is meant if none is named, in words.
    """
    options = (
        click.option("--target", help="Which of a bundle's targets to run; what to compile MLIR for."),
        click.option("--device", help="IREE device URI; the target's driver by default."),
        click.option("--phase", type=click.Choice(phases), help=f"Of a bundle.  [default: {default}]"),
        click.option(
            "--context", type=int, help="Tokens in a bundle's cache already.  [default: 128 for a decode, else 0]"
        ),
        click.option(
            "--batch", type=int, default=1, show_default=True, help="Sequences that a bundle runs side by side."
        ),
        click.option("--tokens", type=int, help="New tokens of each sequence in a prefill.  [default: 128]"),
        click.option("--function", metavar="NAME", help="Of another module; its only one by default."),
        click.option("--input", "inputs", multiple=True, metavar="VALUE", help="Of another module, such as 4x8xf32=1."),
        click.option(
            "--parameters", multiple=True, metavar="SCOPE=FILE", help="Archive of another module; repeatable."
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def file_option(name: str, what: str) -> Callable[[Command], Command]:
    """Add a file to write, such as `html` for "--html", to a command."""

    def add(command: Command) -> Command:
        kind: Any = click.Path(dir_okay=False, path_type=Path)
        return click.option(name, type=kind, metavar="FILE", help=what)(command)

    return add


def write_page(output: Path, page: str) -> None:
    """Write a page, whole or not at all, and say so on stderr.

    Raises:
        CaptureError: it cannot be written there.
    """
    from llmir_iree.tracing.views.output import replace_file

    data = page.encode()
    replace_file(output, data)
    click.echo(f"{output}: {len(data) / 1e6:.1f} MB, opens in a browser", err=True)
