"""Runs one dispatch of a capture alone: the machine code that was recorded, with the recorded workgroups.

IREE's `iree-benchmark-executable` checks nothing that it is passed: with another binary, whose workgroups cover other
parts of the result, or with buffers that are too small, a dispatch writes where it may not. All of it is therefore
taken from the capture and checked against it, and what is not known is refused.

The buffers hold zeros and stay in the caches. A dispatch that waits for memory is faster alone, and so is one whose
work depends on what it reads, such as attention, which sees an empty cache.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from llmir_iree.tracing.capture import Capture, CaptureError, DispatchRun, Site
from llmir_iree.tracing.children import run_child, runtime_tool
from llmir_iree.tracing.ireeprof import EntryPoint, read_entry_points
from llmir_iree.tracing.match import Place, find_places
from llmir_iree.tracing.stream_sites import StreamSite, read_stream_sites
from llmir_iree.tracing.workgroup_counts import declared_workgroups

_FORMAT = re.compile(r'#hal\.executable\.target<"[^"]*", "([^"]*)"')
_BINARY = "*.so"
_NEAREST = 5
_UNITS_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}


@dataclass(frozen=True)
class BenchOptions:
    """How to run a dispatch.

    Attributes:
        module: the compiled module that was recorded, for captures that hold no machine code; another one is refused.
        repetitions: how often it is timed, each time over many runs.
        min_time_s: how long each repetition takes at least.
        timeout_s: deadline of all of them together.
    """

    module: Path | None = None
    repetitions: int = 5
    min_time_s: float = 0.2
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.repetitions < 1 or self.min_time_s <= 0 or self.timeout_s <= 0:
            raise CaptureError(
                f"repetitions {self.repetitions}, time {self.min_time_s:g} s, timeout {self.timeout_s:g} s: all "
                "of them have to be more than 0"
            )


@dataclass(frozen=True)
class DispatchSetup:
    """All that a dispatch is run with.

    Attributes:
        place: which one it is.
        format: of the executable, such as "embedded-elf-x86_64".
        ordinal: of the function in the executable.
        workgroups: as recorded.
        bindings: length of each buffer in bytes.
        constants: 32 bits each.
    """

    place: Place
    format: str
    ordinal: int
    workgroups: tuple[int, int, int]
    bindings: tuple[int, ...]
    constants: tuple[int, ...]


@dataclass(frozen=True)
class DispatchBench:
    """What a dispatch took alone.

    Attributes:
        device: IREE device URI.
        times_ns: mean time of a run, one for each repetition.
        recorded_ns: wall time within the recorded calls: median of the processes' medians.
    """

    setup: DispatchSetup
    device: str
    times_ns: tuple[float, ...]
    recorded_ns: float

    @property
    def median_ns(self) -> float:
        """Of all repetitions."""
        return median(self.times_ns)

    @property
    def spread(self) -> float:
        """Slowest repetition less the fastest, as a share of the median."""
        return (max(self.times_ns) - min(self.times_ns)) / self.median_ns

    @property
    def ratio(self) -> float:
        """Time alone to recorded time."""
        return self.median_ns / self.recorded_ns


def bench_dispatch(capture: Capture, name: str, options: BenchOptions | None = None) -> DispatchBench:
    """Run one dispatch of a capture alone.

    Args:
        capture: recorded on a local device with `.ireeprof` and IR.
        name: number of a site, or name of an export, or a pattern with `*`, or a part of a name.
        options: how to run it.

    Raises:
        CaptureError: nothing matches, or several different dispatches do; something that it needs is not known; the
            module is not the recorded one; or it crashed or did not end.
    """
    options = options or BenchOptions()
    if not capture.manifest.device.startswith("local"):
        raise CaptureError(
            f"{capture.folder}: recorded on {capture.manifest.device}; bench runs dispatches of local ones"
        )
    runs = capture.read(DispatchRun)
    place = _select(capture, runs, name)
    setup = _find_setup(capture, runs, place)
    with tempfile.TemporaryDirectory() as folder:
        binary = _find_binary(capture, options.module, Path(folder))
        command = [
            runtime_tool("iree-benchmark-executable"),
            f"--device={capture.manifest.device}",
            f"--executable_format={setup.format}",
            f"--executable_file={binary}",
            f"--entry_point={setup.ordinal}",
            f"--workgroup_count={','.join(map(str, setup.workgroups))}",
            *(f"--binding={nbytes}xi8" for nbytes in setup.bindings),
            *(f"--constant={value}" for value in setup.constants),
            f"--benchmark_repetitions={options.repetitions}",
            f"--benchmark_min_time={options.min_time_s:g}s",
            "--benchmark_format=json",
        ]
        times = _read_times(run_child(command, timeout_s=options.timeout_s))
    return DispatchBench(setup, capture.manifest.device, times, _recorded(runs, place))


def _select(capture: Capture, runs: Sequence[DispatchRun], name: str) -> Place:
    """The place that is meant; the first one of several that are passed the same."""
    places = find_places(runs, capture.read(Site))
    found = [place for place in places if str(place.site) == name]
    for check in (lambda key: key == name, lambda key: fnmatch.fnmatchcase(key, name), lambda key: name in key):
        found = found or [place for place in places if check(place.key) or check(_describe(place))]
    if not found:
        keys = list(dict.fromkeys(place.key for place in places))
        near = difflib.get_close_matches(name, keys, _NEAREST, 0.3) or keys[:_NEAREST]
        raise CaptureError(f"{capture.folder}: no dispatch matches {name!r}; the nearest: {', '.join(near)}")
    kinds = {(place.function, place.key, _describe(place), place.workgroups): place for place in reversed(found)}
    if len(kinds) > 1:
        listed = [
            f"{place.site} ({_describe(place)})" for place in sorted(kinds.values(), key=lambda place: place.site)
        ]
        more = f" and {len(listed) - _NEAREST} more" if len(listed) > _NEAREST else ""
        raise CaptureError(
            f"{capture.folder}: {name!r} matches {len(listed)} different dispatches; name one by its site: "
            f"{', '.join(listed[:_NEAREST])}{more}"
        )
    return found[0]


def _describe(place: Place) -> str:
    return f"{place.facts.kind} {place.facts.shape or ''}".strip() if place.facts else place.key


def _find_setup(capture: Capture, runs: Sequence[DispatchRun], place: Place) -> DispatchSetup:
    workgroups = {run.workgroups for run in _of(runs, place)}
    if len(workgroups) > 1:
        raise CaptureError(
            f"{place.key}: was recorded with {len(workgroups)} different workgroup counts; none stands for all"
        )
    text = _read_stream(capture)
    site = _find_stream_site(capture, place, text)
    point = _find_entry_point(capture, place)
    if (point.bindings, point.constants) != (len(site.bindings), len(site.scalars)):
        raise CaptureError(
            f"{place.key}: takes {point.bindings} buffers and {point.constants} constants in the binary, and "
            f"{len(site.bindings)} and {len(site.scalars)} in the IR; they are not of one compilation"
        )
    _check_count(capture, place, site)
    bindings = [binding.nbytes for binding in site.bindings if binding.nbytes is not None]
    constants = [value for value in site.scalars if value is not None]
    if len(bindings) < len(site.bindings) or len(constants) < len(site.scalars):
        missing = [f"buffer {n}" for n, binding in enumerate(site.bindings) if binding.nbytes is None]
        missing += [f"constant {n}" for n, value in enumerate(site.scalars) if value is None]
        raise CaptureError(
            f"{place.key}: cannot be run alone, the IR does not tell the size of all it is passed: {', '.join(missing)}"
        )
    formats = set(_FORMAT.findall(text))
    if len(formats) != 1:
        raise CaptureError(f"{capture.folder}: compiled for {len(formats)} formats of executables; bench needs one")
    return DispatchSetup(
        place,
        formats.pop(),
        point.ordinal,
        workgroups.pop(),
        tuple(bindings),
        tuple(value & 0xFFFFFFFF for value in constants),
    )


def _check_count(capture: Capture, place: Place, site: StreamSite) -> None:
    """Compare the recorded workgroups with those that the export declares, as far as that can be computed."""
    for file in sorted((capture.ir / "phases").glob("*.executable-targets.mlir")):
        text = file.read_text(encoding="utf-8")
        declared = declared_workgroups(text, site.executable, site.key, site.workload)
        if declared is not None and declared != place.workgroups:
            recorded, expected = ("x".join(map(str, counts)) for counts in (place.workgroups, declared))
            raise CaptureError(
                f"{place.key}: was recorded with {recorded} workgroups, and its export declares {expected}; they are "
                "not of one compilation, and it would write where it may not"
            )


def _of(runs: Sequence[DispatchRun], place: Place) -> list[DispatchRun]:
    return [run for run in runs if (run.function, run.site, run.key) == (place.function, place.site, place.key)]


def _read_stream(capture: Capture) -> str:
    found = sorted((capture.ir / "phases").glob("*.stream.mlir"))
    if len(found) != 1:
        raise CaptureError(
            f"{capture.folder}: holds {len(found)} modules at stream level, bench needs one, which tells the buffers; "
            "record it with --with ireeprof,ir"
        )
    return found[0].read_text(encoding="utf-8")


def _find_stream_site(capture: Capture, place: Place, text: str) -> StreamSite:
    sites = read_stream_sites(text, place.function, capture.manifest.shapes)
    if place.site >= len(sites) or sites[place.site].key != place.key:
        told = sites[place.site].key if place.site < len(sites) else "nothing"
        raise CaptureError(f"{place.function}: dispatch {place.site} was {place.key}, and the IR has {told} there")
    return sites[place.site]


def _find_entry_point(capture: Capture, place: Place) -> EntryPoint:
    profiles = capture.profiles("ireeprof")
    if not profiles:
        raise CaptureError(f"{capture.folder}: recorded without .ireeprof, which numbers the functions of a binary")
    found = read_entry_points(profiles[0]).get(place.key, set())
    if len(found) != 1:
        raise CaptureError(f"{profiles[0]}: tells of {len(found)} functions of the name {place.key}; bench needs one")
    return found.pop()


def _find_binary(capture: Capture, module: Path | None, scratch: Path) -> Path:
    """The machine code that was recorded.

    Workgroups of another one may cover other parts of the result, and nothing in a binary tells: the host computes how
    many there are, so that only the recorded module's count is known.
    """
    kept = sorted((capture.ir / "binaries").glob(_BINARY))
    if module is None:
        if len(kept) != 1:
            raise CaptureError(
                f"{capture.folder}: holds {len(kept)} binaries, bench needs one; name the module that was recorded "
                "with --module"
            )
        return kept[0]
    try:
        with zipfile.ZipFile(module) as archive:
            names = [name for name in archive.namelist() if fnmatch.fnmatchcase(name, _BINARY)]
            data = [archive.read(name) for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise CaptureError(f"{module}: not a compiled module: {error}") from None
    if len(data) != 1:
        raise CaptureError(f"{module}: holds {len(data)} binaries; bench needs one")
    is_recorded = (
        data[0] == kept[0].read_bytes()
        if len(kept) == 1
        else hashlib.sha256(module.read_bytes()).hexdigest() in capture.manifest.modules.values()
    )
    if not is_recorded:
        raise CaptureError(
            f"{module}: not the module that was recorded; its workgroups may cover other parts of the result, and "
            "would write where they may not"
        )
    binary = scratch / Path(names[0]).name
    binary.write_bytes(data[0])
    return binary


def _read_times(stdout: str) -> tuple[float, ...]:
    try:
        rows = [row for row in json.loads(stdout)["benchmarks"] if row["run_type"] == "iteration"]
        times = tuple(float(row["real_time"]) * _UNITS_NS[row["time_unit"]] for row in rows)
    except (ValueError, KeyError, TypeError):
        times = ()
    if not times:
        raise CaptureError("iree-benchmark-executable told no times")
    return times


def _recorded(runs: Sequence[DispatchRun], place: Place) -> float:
    durations: dict[int, list[int]] = {}
    for run in _of(runs, place):
        durations.setdefault(run.process, []).append(run.duration_ns)
    return float(median(median(times) for times in durations.values()))
