"""What commands of llmir-trace print of IR: in colours on a terminal, plain in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

_DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def show_diff(text: str) -> None:
    """Print a unified diff."""
    for line in text.splitlines():
        click.secho(line, fg=_DIFF_COLOURS.get(line[:1]), bold=line.startswith(("+++", "---")))


def show_code(text: str, language: str) -> None:
    """Print code of a language that Pygments knows."""
    if not sys.stdout.isatty():
        click.echo(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.syntax import Syntax

    # The terminal's own background; its width must not cut lines.
    Console(soft_wrap=True).print(Syntax(text, language, background_color="default"), soft_wrap=True)


def show_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print rows in columns, the first row as their heads; columns of numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, row in enumerate(rows):
        cells = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.secho("  ".join(cells).rstrip(), bold=index == 0)
