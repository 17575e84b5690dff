"""What a benchmark found, and how it is written down: markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

from llmir_iree.bench_cases import Case
from llmir_iree.bench_perplexity import Perplexity
from llmir_iree.params.errors import RequestError


@dataclass(frozen=True)
class Throughput:
    """What a rate means for the machine.

    Attributes:
        gb_s: bytes of weights and cache that the steps had to read, by the time they took, in 10^9 a second; None for
            prompts, which compute rather than read.
        bandwidth_share: the same as a share of what a plain read gave just before and after, None where that is not
            known.
        gmac_s: products of the linear layers, by the time they took, in 10^9 a second; None where there are none.
        peak_share: the same as a share of the products that registers gave just before and after, of bytes or, for
            plain weights, of floats; None where that is not known, and for a model with weights of both kinds.
    """

    gb_s: float | None
    bandwidth_share: float | None
    gmac_s: float | None
    peak_share: float | None


@dataclass(frozen=True)
class Row:
    """One test at one batch size, beside at most one peer.

    Attributes:
        model: the bundle's name for it.
        test: see `llmir_iree.bench_cases`.
        batch: sequences that run side by side.
        mean: tokens a second, all sequences together.
        stdev: the repetitions' standard deviation in tokens a second; None for a single one.
        gb_s: see `Throughput`, as the next three.
        peer: who else ran the same tokens in turn with us.
        peer_mean: the peer's tokens a second.
        peer_stdev: as `stdev`.
        ratio: our mean over the peer's; above 1 we are faster.
        ratio_spread: smallest and largest ratio within one repetition.
    """

    model: str
    test: str
    batch: int
    mean: float
    stdev: float | None
    gb_s: float | None
    bandwidth_share: float | None
    gmac_s: float | None
    peak_share: float | None
    peer: str | None = None
    peer_mean: float | None = None
    peer_stdev: float | None = None
    ratio: float | None = None
    ratio_spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Header:
    """What the numbers depend on, beside the test.

    Attributes:
        weights: their formats and size, and the cache's dtype.
        cores: cores that this process may use.
        threads: threads that the peers were given.
        bandwidth_gb_s: a plain read of memory by all cores at its best, 10^9 bytes a second; None where it cannot be
            measured.
        peak_gmac_s: products by all cores, in registers, at their best, 10^9 a second; None likewise.
        multiplied: what these are products of, "bytes" or "floats"; None for a model with weights of both kinds.
        target: of the bundle, and the device it ran on.
        validation: what the logits were compared with before anything was timed, and how close they were.
        perplexity: of a text, None if it was not asked for.
        other_load: share of all cores' time that other processes took while the tests ran, 0 to 1.
        versions: by package.
    """

    model: str
    weights: str
    cpu: str
    cores: int
    threads: int
    bandwidth_gb_s: float | None
    peak_gmac_s: float | None
    multiplied: str | None
    target: str
    validation: str
    perplexity: Perplexity | None
    repetitions: int
    other_load: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """A whole benchmark."""

    header: Header
    rows: tuple[Row, ...]


def compare_rates(
    model: str,
    case: Case,
    ours: Sequence[float],
    throughput: Throughput,
    peers: Mapping[str, Sequence[float]],
) -> list[Row]:
    """The rows of one case: one a peer, or a single one without peers.

    Args:
        model: the bundle's name for it.
        case: what was timed.
        ours: tokens a second of each repetition.
        throughput: what they mean for the machine.
        peers: the rates by peer; repetition i of each ran next to ours.
    """
    alone = Row(model, case.test, case.batch, fmean(ours), _spread(ours), **asdict(throughput))
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
    """A section a model: what the numbers depend on as a list, and a table for people to read."""
    lines = [f"## {report.header.model}", ""]
    lines += [f"- {label}: {text}" for label, text in _describe(report.header)]
    lines += [
        "",
        "| test | batch | tok/s | GB/s | of bandwidth | GMAC/s | of peak | peer | peer tok/s | ours / peer |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in report.rows:
        cells = [
            row.test,
            str(row.batch),
            _rate(row.mean, row.stdev),
            _number(row.gb_s, ".1f"),
            _number(row.bandwidth_share, ".0%"),
            _number(row.gmac_s, ".1f"),
            _number(row.peak_share, ".0%"),
            row.peer or "",
            _rate(row.peer_mean, row.peer_stdev),
            _ratio(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_json(report: Report) -> str:
    """One object with the field names of `Header` and `Row`, nothing rounded.

    It is {"headers": {MODEL: {...}}, "rows": [...]}, so that it can hold several models.
    """
    return _dump_json({report.header.model: asdict(report.header)}, [asdict(row) for row in report.rows])


def render_csv(report: Report) -> str:
    """A line a row, nothing rounded; the header's fields repeat in every line, so that files can be concatenated."""
    header = asdict(report.header) | {
        "versions": _versions(report.header),
        "perplexity": "" if report.header.perplexity is None else _perplexity(report.header.perplexity),
    }
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


def append(earlier: str, text: str, format_name: str) -> str:
    """Renderings of two reports as one.

    Args:
        earlier: what a file holds already; may be empty.
        text: the rendering to append.
        format_name: a key of RENDERERS, in which both are.

    Raises:
        RequestError: what is there is in another format.
    """
    if not earlier:
        return text
    if format_name == "markdown":
        return f"{earlier}\n{text}"
    if format_name == "csv":
        names, _, lines = text.partition("\n")
        if earlier.partition("\n")[0] != names:
            raise RequestError("cannot append to a file that does not hold CSV with the same columns")
        return earlier + lines
    try:
        before, after = json.loads(earlier), json.loads(text)
        return _dump_json(before["headers"] | after["headers"], before["rows"] + after["rows"])
    except (ValueError, KeyError, TypeError):
        raise RequestError("cannot append to a file that does not hold the JSON of a benchmark") from None


def _dump_json(headers: dict[str, Any], rows: list[Any]) -> str:
    return json.dumps({"headers": headers, "rows": rows}, indent=2, ensure_ascii=False) + "\n"


def _spread(rates: Sequence[float]) -> float | None:
    return stdev(rates) if len(rates) > 1 else None


def _describe(header: Header) -> list[tuple[str, str]]:
    threads = f"{header.threads} thread{'s' if header.threads > 1 else ''}"
    peaks = "" if header.bandwidth_gb_s is None else f", at best {header.bandwidth_gb_s:.1f} GB/s"
    if header.peak_gmac_s is not None:
        peaks += f", {header.peak_gmac_s:.0f} GMAC/s of {header.multiplied}"
    lines = [
        ("machine", f"{header.cpu}, {header.cores} cores ({threads}){peaks}"),
        ("weights", header.weights),
        ("target", header.target),
        ("versions", _versions(header)),
        ("validated", header.validation),
    ]
    if header.perplexity is not None:
        lines.append(("perplexity", _perplexity(header.perplexity)))
    return [
        *lines,
        ("other processes", f"{header.other_load:.0%} of the cores while the tests ran"),
        ("repetitions", f"{header.repetitions}, in turn; mean ± standard deviation, ratios as mean (least to most)"),
    ]


def _perplexity(perplexity: Perplexity) -> str:
    values = ", ".join(f"{name} {value:.3f}" for name, value in perplexity.values.items())
    distance = f" ({perplexity.distance:.2%} apart)" if len(perplexity.values) > 1 else ""
    return f"{values}{distance}, of {perplexity.tokens} tokens of Python's help texts"


def _versions(header: Header) -> str:
    return ", ".join(f"{name} {version}" for name, version in header.versions.items())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _rate(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def _ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_spread is None:
        return ""
    least, most = row.ratio_spread
    return f"{row.ratio:.2f} ({least:.2f} to {most:.2f})"
