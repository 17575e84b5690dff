"""llmir-trace diff: what changed between two captures, by how much, and whether that is certain."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.cli.trace_options import TRACE_CONTEXT, file_option, json_option, row_options, write_page
from llmir_iree.params.errors import RequestError

if TYPE_CHECKING:  # Imported when the command runs, so that --help is instant.
    from collections.abc import Iterator, Sequence

    from llmir_iree.tracing.diff import CaptureDiff, Change, DiffRow, FunctionDiff
    from llmir_iree.tracing.explain import Explanation

EXIT_SLOWER = 1
_GROUPINGS = ("dispatch", "site", "kind", "layer")

# Between two details, not between the numbers of one.
_DETAIL = re.compile(r", (?=[a-z])")

_HEADINGS = ("A us", "B us", "change", "95%", "floor", "share")


@click.command("diff", cls=LlmirCommand, context_settings=TRACE_CONTEXT)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--fail-if-slower",
    type=click.FloatRange(min=0),
    metavar="PCT",
    help="Exit with code 1 if a call of B is slower for certain, and by more than so many percent.",
)
@click.option(
    "--explain", "is_explained", is_flag=True, help="Find the first compiler pass at which each change parts."
)
@row_options(_GROUPINGS, top=20)
@json_option
@file_option("--html", "Also write a page, with explanations where both captures hold IR.")
def main(
    a: Path,
    b: Path,
    fail_if_slower: float | None,
    is_explained: bool,
    by: str,
    top: int,
    as_json: bool,
    html: Path | None,
) -> None:
    """Compare the captures A and B, both of llmir-trace record.

    Times are means of the fastest quarter of each process, calls that nothing disturbs, in microseconds. A change is
    called, and marked with *, only if processes of the same side differ less: record at least three of each, better
    ten, and in turns, with record --against. Where most dispatches moved alike, that is taken for the machine's doing,
    and taken out; it is called a change only if the processes took turns.
    """
    from llmir_iree.tracing.capture import Capture
    from llmir_iree.tracing.diff import compare_captures

    if top < 1:
        raise RequestError(f"--top {top}: expected 1 or more")
    captures = Capture.open(a), Capture.open(b)
    diff = compare_captures(*captures, by)  # type: ignore[arg-type]  # click has checked it.
    explanations: list[Explanation] = []
    if is_explained or (html is not None and all(capture.has_passes for capture in captures)):
        from llmir_iree.tracing.explain import add_details, explain

        explanations = explain(diff, *captures)
        diff = add_details(diff, explanations)
    if html is not None:
        from llmir_iree.tracing.views.diff_page import diff_page

        write_page(html, diff_page(diff, explanations))
    if not is_explained:
        explanations = []
    text = _json(diff, explanations) if as_json else "\n".join(_lines(diff, explanations, top))
    click.echo(text)
    if fail_if_slower is not None:
        _fail_if_slower(diff, fail_if_slower)


def _fail_if_slower(diff: CaptureDiff, percent: float) -> None:
    unknown = [function.function for function in diff.functions if function.change is None]
    if unknown:  # A gate that cannot tell must not pass.
        raise RequestError(f"--fail-if-slower: too few processes to call {unknown[0]} slower or not; record more")
    for function in diff.functions:
        change = function.change
        if change and change.is_called and (change.ratio - 1) * 100 > percent:
            click.echo(f"{function.function} is {change.ratio - 1:.1%} slower, more than {percent:g}%", err=True)
            click.get_current_context().exit(EXIT_SLOWER)


def _lines(diff: CaptureDiff, explanations: Sequence[Explanation], top: int) -> Iterator[str]:
    yield diff.summary()
    yield from (f"note: {note}" for note in diff.notes)
    for function in diff.functions:
        yield ""
        yield from _table(function, top)
    for found in explanations:
        yield ""
        yield f"{found.function}, {found.row.label}: {found.reason}"
        yield from (f"  {line}" for line in found.lines()[1:])


def _table(function: FunctionDiff, top: int) -> Iterator[str]:
    # Rows of one side are shown in any case.
    shown = [row for index, row in enumerate(function.rows) if index < top or row.side != "both"]
    others = [row for row in function.rows if row not in shown]
    cells = [
        (*_HEADINGS, "", function.function),
        (_us(function.a_ns), _us(function.b_ns), *_change_cells(function.change, None), "a call"),
        *(_row_cells(row) for row in shown),
    ]
    if others:
        a, b = (sum(side or 0.0 for side in sides) for sides in zip(*((r.a_ns, r.b_ns) for r in others), strict=True))
        cells.append((_us(a), _us(b), *_change_cells(None, None), f"{len(others)} more"))
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADINGS))]
    indent = " " * (sum(widths) + len(widths) + len("* "))
    for row in cells:
        numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=False))
        label, *details = row[-1].splitlines()
        yield " ".join((*numbers, row[-2].ljust(1), label)).rstrip()
        yield from (f"{indent}  {detail}" for detail in details)
    if function.drift is not None:
        where = "rows' changes, not of the call's" if function.took_turns else "changes and shares"
        yield f"Everything moved alike by {function.drift - 1:+.1%}, which is taken out of {where}."
    if function.uniform is not None:
        yield f"Most dispatches moved alike by {function.uniform - 1:+.1%}, which is a change: it is in all rows."


def _row_cells(row: DiffRow) -> tuple[str, ...]:
    label = "\n".join((row.label, *_DETAIL.split(row.detail))) if row.detail else row.label
    if row.side == "both":
        return (_us(row.a_ns), _us(row.b_ns), *_change_cells(row.change, row.share), label)
    share = _change_cells(None, row.share)[3]
    return (_us(row.a_ns), _us(row.b_ns), f"only {row.side.upper()}", "", "", share, "", label)


def _change_cells(change: Change | None, share: float | None) -> tuple[str, ...]:
    """Change, interval, floor, share and mark."""
    told = "" if share is None else f"{share:.0%}"
    if change is None:
        return ("", "", "", told, "")
    interval = f"{change.low - 1:+.1%} {change.high - 1:+.1%}"
    return (f"{change.ratio - 1:+.1%}", interval, f"{change.floor:.1%}", told, "*" if change.is_called else "")


def _us(time_ns: float | None) -> str:
    return "-" if time_ns is None else f"{time_ns / 1e3:.1f}"


def _json(diff: CaptureDiff, explanations: Sequence[Explanation]) -> str:
    return json.dumps(
        {
            "summary": diff.summary().splitlines(),
            "notes": diff.notes,
            "functions": [_function_json(function) for function in diff.functions],
            "explanations": [_explanation_json(found) for found in explanations],
        },
        indent=2,
    )


def _function_json(function: FunctionDiff) -> dict[str, Any]:
    return {
        "function": function.function,
        "processes": function.processes,
        "a_ns": function.a_ns,
        "b_ns": function.b_ns,
        "took_turns": function.took_turns,
        "drift": function.drift,
        "uniform": function.uniform,
        "change": _change_json(function.change),
        "rows": [
            {
                "label": row.label,
                "detail": row.detail,
                "side": row.side,
                "a_ns": row.a_ns,
                "b_ns": row.b_ns,
                "delta_ns": row.delta_ns,
                "share": row.share,
                "change": _change_json(row.change),
                "matches": [
                    {
                        "basis": match.basis,
                        **{
                            side: None if place is None else {"site": place.site, "key": place.key}
                            for side, place in (("a", match.a), ("b", match.b))
                        },
                    }
                    for match in row.matches
                ],
            }
            for row in function.rows
        ],
    }


def _explanation_json(found: Explanation) -> dict[str, Any]:
    return {
        "function": found.function,
        "label": found.row.label,
        "reason": found.reason,
        "pass": found.divergence and found.divergence.pass_name,
        "level": found.divergence and found.divergence.level,
        "hunk": found.divergence and found.divergence.hunk,
    }


def _change_json(change: Change | None) -> dict[str, Any] | None:
    return None if change is None else asdict(change)
