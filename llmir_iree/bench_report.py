"""What a benchmark found, and how it is written down: markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Row:
    """One test at one batch size, beside at most one peer.

    Attributes:
        test: "pp<n>", a prompt of n tokens, or "tg<n>", n tokens generated one at a time.
        batch: sequences that run side by side.
        mean: tokens a second, all sequences together.
        stdev: the repetitions' standard deviation in tokens a second; None for a single one.
        bandwidth_share: bytes of weights and cache that the steps had to read, by the time they took, as a share of the
            machine's measured bandwidth; None for prompts, which compute rather than read.
        peer: who else ran the same tokens in turn with us.
        peer_mean: the peer's tokens a second.
        peer_stdev: as `stdev`.
        ratio: our mean over the peer's; above 1 we are faster.
        ratio_spread: smallest and largest ratio within one repetition.
    """

    test: str
    batch: int
    mean: float
    stdev: float | None
    bandwidth_share: float | None
    peer: str | None = None
    peer_mean: float | None = None
    peer_stdev: float | None = None
    ratio: float | None = None
    ratio_spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Header:
    """What the numbers depend on, beside the test.

    Attributes:
        cores: cores that this process may use.
        threads: threads that the peers were given.
        bandwidth_gb_s: a plain read of memory by all cores, 10^9 bytes a second.
        model: name, formats and size of the weights.
        target: of the bundle, and the device it ran on.
        validation: what the logits were compared with before anything was timed, and how close they were.
        other_load: share of all cores' time that other processes took while the tests ran, 0 to 1.
        versions: by package.
    """

    cpu: str
    cores: int
    threads: int
    bandwidth_gb_s: float
    model: str
    target: str
    validation: str
    repetitions: int
    other_load: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """A whole benchmark."""

    header: Header
    rows: tuple[Row, ...]


def compare_rates(
    test: str,
    batch: int,
    ours: Sequence[float],
    bandwidth_share: float | None,
    peers: Mapping[str, Sequence[float]],
) -> list[Row]:
    """The rows of one test: one a peer, or a single one without peers.

    Args:
        test: name of the test.
        batch: sequences side by side.
        ours: tokens a second of each repetition.
        bandwidth_share: see `Row`.
        peers: the same by peer; repetition i of each ran next to ours.
    """
    alone = Row(test, batch, fmean(ours), _spread(ours), bandwidth_share)
    rows = []
    for peer, rates in peers.items():
        ratios = [our / rate for our, rate in zip(ours, rates, strict=True)]
        rows.append(
            replace(
                alone,
                peer=peer,
                peer_mean=fmean(rates),
                peer_stdev=_spread(rates),
                ratio=alone.mean / fmean(rates),
                ratio_spread=(min(ratios), max(ratios)),
            )
        )
    return rows or [alone]


def render_markdown(report: Report) -> str:
    """A list of what the numbers depend on, and a table for people to read."""
    lines = [f"- {label}: {text}" for label, text in _describe(report.header)]
    lines += [
        "",
        "| test | batch | tok/s | of bandwidth | peer | peer tok/s | ours / peer |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in report.rows:
        cells = [
            row.test,
            str(row.batch),
            _rate(row.mean, row.stdev),
            "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
            row.peer or "",
            _rate(row.peer_mean, row.peer_stdev),
            _ratio(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_json(report: Report) -> str:
    """One object, {"header": {...}, "rows": [...]}, with the field names of `Header` and `Row`, nothing rounded."""
    return json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"


def render_csv(report: Report) -> str:
    """A line a row, nothing rounded; the header's fields repeat in every line, so that files can be concatenated."""
    header = asdict(report.header) | {"versions": _versions(report.header)}
    lines: list[dict[str, Any]] = []
    for row in report.rows:
        fields = asdict(row)
        fields["ratio_min"], fields["ratio_max"] = fields.pop("ratio_spread") or (None, None)
        lines.append(fields | header)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


RENDERERS: dict[str, Callable[[Report], str]] = {"markdown": render_markdown, "json": render_json, "csv": render_csv}


def _spread(rates: Sequence[float]) -> float | None:
    return stdev(rates) if len(rates) > 1 else None


def _describe(header: Header) -> list[tuple[str, str]]:
    threads = f"{header.threads} thread{'s' if header.threads > 1 else ''}"
    return [
        ("machine", f"{header.cpu}, {header.cores} cores ({threads}), {header.bandwidth_gb_s:.1f} GB/s"),
        ("model", header.model),
        ("target", header.target),
        ("versions", _versions(header)),
        ("validated", header.validation),
        ("other processes", f"{header.other_load:.0%} of the cores while the tests ran"),
        ("repetitions", f"{header.repetitions}, in turn; mean ± standard deviation, ratios as mean (least to most)"),
    ]


def _versions(header: Header) -> str:
    return ", ".join(f"{name} {version}" for name, version in header.versions.items())


def _rate(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def _ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_spread is None:
        return ""
    least, most = row.ratio_spread
    return f"{row.ratio:.2f} ({least:.2f} to {most:.2f})"
