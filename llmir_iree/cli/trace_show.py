"""llmir-trace show: where the time of a capture went."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.trace_options import TRACE_CONTEXT, file_option, json_option, row_options, write_page

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from llmir_iree.tracing.capture import Capture
    from llmir_iree.tracing.table import Balance, TableRow

_GROUPINGS = ("dispatch", "kind", "layer", "phase", "site")
_WEIGHT_WIDTH = 44
# Where stdout is no terminal.
_FLAME_WIDTH = 120

# What a name takes at most while there are columns to leave out; it is folded then.
_NAME_WIDTH = 48
_FILE_WIDTH = 240


@dataclass(frozen=True)
class Table:
    """What a renderer shows: the rows that were asked for, and how far all rows add up."""

    capture: Capture
    rows: list[TableRow]
    balance: Balance
    by: str
    is_filtered: bool


@click.command("show", cls=LlmirCommand, context_settings=TRACE_CONTEXT)
@click.argument("capture", type=click.Path(path_type=Path), metavar="CAPTURE")
@row_options(_GROUPINGS)
@click.option(
    "--sort", metavar="COLUMN", help="Such as median, share or bandwidth.  [default: total; for layers, layer]"
)
@click.option("--filter", "pattern", metavar="GLOB", help="Only rows whose name, kind or weight matches.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="The same as CSV.")
@click.option("--flame", "as_flame", is_flag=True, help="One step as a flame: function, layer, kind, dispatch.")
@file_option(
    "--html", "Write a page instead: a step, its kinds and layers, the roofline, and what each pass made of a dispatch."
)
@file_option("--perfetto", "Write a .pftrace for ui.perfetto.dev instead.")
def main(
    capture: Path,
    by: Any,
    sort: str | None,
    pattern: str | None,
    top: int | None,
    as_json: bool,
    as_csv: bool,
    as_flame: bool,
    html: Path | None,
    perfetto: Path | None,
) -> None:
    """Show the dispatches of CAPTURE as a table that adds up to the wall time of a step.

    Times are means over all calls but the first of each process. GB/s count what a dispatch has to move at least, and
    GFLOP/s what it has to compute; the shares beside them are of what this machine's memory gives to a plain read, and
    of what its cores give at best in products of bytes.
    """
    from llmir_iree.params.errors import RequestError
    from llmir_iree.tracing.capture import Capture
    from llmir_iree.tracing.table import aggregate, balance, filter_rows, sort_rows, top_rows

    formats = {"--json": as_json, "--csv": as_csv, "--flame": as_flame}
    chosen = [name for name, is_chosen in formats.items() if is_chosen]
    if len(chosen) > 1:
        raise RequestError(f"{' and '.join(chosen)}: choose one")
    opened = Capture.open(capture)
    if html is not None:
        from llmir_iree.tracing.views.capture_page import capture_page
        from llmir_iree.tracing.views.pass_history import capture_histories

        write_page(html, capture_page(opened, capture_histories(opened)))
    if perfetto is not None:
        _write_perfetto(opened, perfetto)
    if as_flame:
        _show_flame(opened)
    if as_flame or ((html or perfetto) and not chosen):
        return
    rows = sort_rows(aggregate(opened, by), sort or (by if by in ("layer", "site") else "total"))
    if pattern is not None:
        rows = filter_rows(rows, pattern)
    if top is not None:
        rows = top_rows(rows, top)
    render: Callable[[Table], None] = _show_json if as_json else _show_csv if as_csv else _show_text
    render(Table(opened, rows, balance(opened), by, pattern is not None))


def _write_perfetto(capture: Capture, output: Path) -> None:
    from llmir_iree.tracing.views.perfetto import write_perfetto

    slices = write_perfetto(capture, output)
    click.echo(f"{output}: {slices} calls and dispatches, opens in ui.perfetto.dev", err=True)


def _show_flame(capture: Capture) -> None:
    """Draw a flame for every function, in colour where stdout is a terminal."""
    from rich.console import Console

    from llmir_iree.tracing.views.flame import build_flame, render_flame
    from llmir_iree.tracing.views.step import typical_steps

    console = Console(width=None if sys.stdout.isatty() else _FLAME_WIDTH, highlight=False)
    is_ascii = not console.encoding.startswith("utf")
    for step in typical_steps(capture):
        console.print(render_flame(build_flame(step), console.width, is_ascii=is_ascii), end="", soft_wrap=True)


def _show_json(table: Table) -> None:
    """Write one object: the rows, and how far they add up."""
    balance = {**asdict(table.balance), "difference": table.balance.difference}
    rows = [asdict(row) for row in table.rows]
    click.echo(json.dumps({"by": table.by, "rows": rows, "balance": balance}, indent=2))


def _show_csv(table: Table) -> None:
    """Write a line for every row, under the names of its fields."""
    from llmir_iree.tracing.table import TableRow

    names = [field.name for field in fields(TableRow)]
    writer = csv.writer(sys.stdout)
    writer.writerow(names)
    for row in table.rows:
        writer.writerow([_cell(getattr(row, name)) for name in names])


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _show_text(table: Table) -> None:
    """Draw a table: as wide as the terminal, or, where stdout is none, as its content."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)
    manifest = table.capture.manifest
    heading = [manifest.subject, *manifest.functions, manifest.device]
    if manifest.context is not None:
        heading.append(f"context {manifest.context}")
    console.print(", ".join(heading), markup=False)
    console.print(draw(table, console.width))
    for line in _closing_lines(table):
        console.print(line, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Column:
    """A column of the text: those of the lowest rank go first where a terminal is narrow."""

    title: str
    rank: int
    cell: Callable[[TableRow], str]


_COLUMNS = (
    _Column("count", 8, lambda row: _number(row.count, 0 if row.count == round(row.count) else 1)),
    _Column("median us", 9, lambda row: _number(row.median_ns, 1, 1e3)),
    _Column("min us", 2, lambda row: _number(row.min_ns, 1, 1e3)),
    _Column("ms a call", 10, lambda row: _number(row.total_ns, 3, 1e6)),
    _Column("share", 11, lambda row: _percent(row.share)),
    _Column("CPU ms", 3, lambda row: _number(row.cpu_ns, 3, 1e6)),
    _Column("threads", 7, lambda row: _number(row.parallelism, 2)),
    _Column("workgroups", 1, lambda row: "x".join(map(str, row.workgroups or ()))),
    _Column("MB", 0, lambda row: _number(row.nbytes, 2, 1e6)),
    _Column("GB/s", 6, lambda row: _number(row.bandwidth, 1, 1e9)),
    _Column("of roof", 5, lambda row: _percent(row.bandwidth_share)),
    _Column("GFLOP/s", 4, lambda row: _number(row.throughput, 1, 1e9)),
    _Column("of peak", 3, lambda row: _percent(row.throughput_share)),
    _Column("layer", 4, lambda row: "" if row.layer is None else str(row.layer)),
    _Column("weight or op", 5, lambda row: (row.weight or _op_name(row.op))[-_WEIGHT_WIDTH:]),
)


def draw(table: Table, width: int) -> RichTable:
    """The table as text: the columns that hold something and that so many characters have room for."""
    from rich.table import Column
    from rich.table import Table as RichTable

    cells = {column.title: [column.cell(row) for row in table.rows] for column in _COLUMNS}
    shown = [column for column in _COLUMNS if any(cells[column.title])]
    widths = {column.title: max(len(column.title), *map(len, cells[column.title])) + 2 for column in shown}
    room = width - min(max(len(row.name) for row in table.rows), _NAME_WIDTH)
    while sum(widths[column.title] for column in shown) > room and len(shown) > 1:
        shown.remove(min(shown, key=lambda column: column.rank))
    drawn = RichTable(
        Column(table.by, overflow="fold"),
        *(
            Column(column.title, justify="left" if column.title == "weight or op" else "right", no_wrap=True)
            for column in shown
        ),
        box=None,
        pad_edge=False,
    )
    for index, row in enumerate(table.rows):
        drawn.add_row(row.name, *(cells[column.title][index] for column in shown))
    return drawn


def _closing_lines(table: Table) -> list[str]:
    balance, manifest = table.balance, table.capture.manifest
    side = "more" if balance.difference >= 0 else "less"
    clock = "by the program's own clock" if manifest.clock_ns else "from its beginning to that of the next one"
    warm_up = " Both with warm-up." if manifest.warm_up_calls else ""
    lines = [
        f"All rows add up to {balance.rows_ns / 1e6:.3f} ms a call; {clock} a call took "
        f"{balance.clock_ns / 1e6:.3f} ms: the table has {abs(balance.difference):.2%} {side}.{warm_up}"
    ]
    if table.is_filtered:
        lines.insert(0, f"The rows shown are {sum(row.share for row in table.rows):.1%} of the step.")
    lines += [f"Missing: {what}: {reason}" for what, reason in manifest.missing.items()]
    return lines


def _op_name(op: str | None) -> str:
    """The op itself, out of a line of the portable module."""
    words = (op or "").partition(" = ")[2].split("(")[0].split()
    # A call is told by what it calls.
    return " ".join(words[: 2 if words and words[0].endswith(".call") else 1])


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
