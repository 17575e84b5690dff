"""Captures of whole generations: a prompt's prefill, its steps, and all that lies between them, through Tracy.

The dispatches are those that Tracy's zones tell of. On the CPU these are shares of workgroups that a worker took, from
which the runs of a dispatch are put together; how many workgroups there were, they do not tell. Sites come from the IR
of the modules, where it is given: sizes that vary from call to call are not known there.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from llmir_iree.bundle import Bundle
from llmir_iree.params.errors import LlmirError
from llmir_iree.tracing.capture import (
    Call,
    Capture,
    CaptureError,
    CaptureManifest,
    DispatchRun,
    MachineInfo,
    Site,
    ZoneTotal,
    write_rows,
)
from llmir_iree.tracing.record import IrSource, capture_in_place, package_versions
from llmir_iree.tracing.sites import join_sites, place_runs, sites_of_binary
from llmir_iree.tracing.stream_sites import read_stream_sites
from llmir_iree.tracing.tracy_capture import TracedProgram, record_tracy
from llmir_iree.tracing.tracy_dispatches import find_dispatches
from llmir_iree.tracing.tracy_file import read_tracy
from llmir_iree.tracing.tracy_totals import total_zones
from llmir_iree.tracing.tracy_zones import TracyFile

# The command line of this project, which stands above this folder: named, not imported.
_PROGRAM = "from llmir_iree.cli.run import main; main(prog_name='llmir-run')"

_MISSING = {
    "ireeprof": "IREE's Python runtime does not write it; record a prefill or a decode for it",
    "ir": "of every pass: not a part of this recording; record a prefill or a decode for it",
    "workgroups": "Tracy's zones do not tell how many there were: tiles and workgroups are 0",
}


def record_generate(
    bundle: Path,
    output: Path,
    *,
    prompt: str,
    max_tokens: int,
    target: str | None = None,
    device: str | None = None,
    timeout_s: float,
    force: bool = False,
    machine: Callable[[], MachineInfo] | None = None,
    ir: Mapping[str, IrSource] = {},
    report: Callable[[str], None] = lambda _: None,
) -> Capture:
    """Complete a prompt in a process of its own and capture it.

    Without IR, sites are numbered by the order in which a call's dispatches begin. If the process crashes, what it did
    until then is captured, and the manifest's `missing` says so.

    Args:
        bundle: a bundle's folder, or one of its modules.
        output: the capture to write.
        prompt: what to complete.
        max_tokens: most tokens to generate.
        target: name of a compiled target; may be left out if there is one only.
        device: IREE device URI; the target's driver if left out.
        timeout_s: seconds after which the process is ended.
        force: replace a capture that exists.
        machine: asked for what the manifest says of the machine; what Tracy knows of it if left out.
        ir: of the bundle's modules, by phase.
        report: told of every stage as it begins, and of everything that is missing.

    Raises:
        BundleError: not a bundle, or no such target.
        CaptureError: the place is taken; Tracy cannot record here; or the process ended before it called a function.
    """
    opened, implied = Bundle.containing(bundle)
    compiled = opened.target(target or implied)
    if not prompt:
        raise CaptureError("the prompt is empty")
    if max_tokens < 1:
        raise CaptureError(f"max_tokens is {max_tokens}; it has to be at least 1")
    options = [f"--max-tokens={max_tokens}", f"--target={compiled.target}", "--prompt=-", "--quiet"]
    if device is not None:
        options.append(f"--device={device}")
    command = [sys.executable, "-c", _PROGRAM, str(opened.folder.absolute()), *options]
    with capture_in_place(output, force=force) as folder:
        report("generating under Tracy")
        file = folder / "process-0.tracy"
        program = record_tracy(command, file, timeout_s=timeout_s, stdin=prompt)
        trace = read_tracy(file)
        phases = {function.name.rpartition(".")[2]: function.phase for function in opened.manifest.functions}
        calls = _calls(trace, phases.keys())
        if not calls:
            raise CaptureError(_failure(program))
        missing = _MISSING if program.problem is None else {**_MISSING, "end": program.problem}
        runs = list(_dispatches(trace, calls))
        sites: list[Site] = []
        functions = sorted({call.function for call in calls})
        for function in functions:
            of_function = [run for run in runs if run.function == function]
            try:
                if (source := ir.get(phases[function])) is None:
                    raise CaptureError("no IR is given")
                report(f"compiling again, to tell the dispatches of {function} apart")
                placed, known = _join(of_function, function, source)
            except LlmirError as error:
                missing = {**missing, f"sites of {function}": str(error)}
                placed, known = of_function, sites_of_binary(of_function)
            runs = [run for run in runs if run.function != function] + placed
            sites += known
        for what, reason in missing.items():
            report(f"missing: {what}: {reason}")
        write_rows(folder, Call, calls)
        write_rows(folder, DispatchRun, sorted(runs, key=lambda run: (run.call, run.site)))
        write_rows(folder, Site, sites)
        write_rows(folder, ZoneTotal, total_zones(trace, 0))
        manifest = CaptureManifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            subject=str(bundle),
            phase="generate",
            functions=tuple(functions),
            processes=1,
            device=device or compiled.driver,
            target=compiled.target,
            flags=compiled.modules["decode"].flags,
            passes=compiled.modules["decode"].passes,
            versions=package_versions(),
            modules={info.file: info.sha256 for info in compiled.modules.values()},
            machine=_machine(trace) if machine is None else machine(),
            sources=("tracy",),
            missing=missing,
        )
        Capture.create(folder, manifest)
    return Capture.open(output)


def _join(runs: Sequence[DispatchRun], function: str, source: IrSource) -> tuple[list[DispatchRun], list[Site]]:
    """The runs of a function with the numbers that their sites have in the IR, and these sites."""
    stream = source.stream()
    keys = [site.key for site in read_stream_sites(stream, function)]
    by_call: dict[int, list[DispatchRun]] = defaultdict(list)
    for run in runs:
        by_call[run.call].append(run)
    placed = [
        run.model_copy(update={"site": site})
        for of_call in by_call.values()
        for run, site in zip(of_call, place_runs([run.key for run in of_call], keys), strict=True)
    ]
    return placed, join_sites(placed, function, stream_ir=stream, portable=source.portable, kernels=source.kernels)


def _calls(trace: TracyFile, functions: Collection[str]) -> list[Call]:
    """Calls of the bundle's functions that came to an end: the session's zones, which bear their names."""
    rows = [row for row, name in enumerate(trace.names) if name in functions]
    zones = trace.cpu_zones.take(np.isin(trace.cpu_zones.name, rows) & trace.cpu_zones.has_ended)
    columns = (zones.name, zones.start, zones.duration_ns)
    return [
        Call(process=0, call=index, function=trace.names[name], start_ns=start, wall_ns=wall)
        for index, (name, start, wall) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]


def _dispatches(trace: TracyFile, calls: list[Call]) -> Iterator[DispatchRun]:
    """Dispatches that lie in a call. Those of loading come before the first, those of a crash after the last."""
    starts = [call.start_ns for call in calls]
    sites: Counter[int] = Counter()
    for dispatch in find_dispatches(trace):
        index = bisect_right(starts, dispatch.start_ns) - 1
        if index < 0 or dispatch.start_ns >= starts[index] + calls[index].wall_ns:
            continue
        yield DispatchRun(
            process=0,
            call=calls[index].call,
            function=calls[index].function,
            site=sites[index],
            key=dispatch.key,
            start_ns=dispatch.start_ns,
            duration_ns=dispatch.duration_ns,
            tile_ns=dispatch.tile_ns,
            tiles=0,
            workgroups=(0, 0, 0),
        )
        sites[index] += 1


def _machine(trace: TracyFile) -> MachineInfo:
    cores = trace.host.get("CPU cores", "")
    return MachineInfo(
        cpu=trace.host.get("CPU", "unknown").strip(), cores=int(cores) if cores.isdigit() else os.cpu_count() or 1
    )


def _failure(program: TracedProgram) -> str:
    """Why nothing was called: the program's last line says so."""
    *_, last = ["no message", *program.stderr.strip().splitlines()]
    return f"the generation ended before its first call (exit code {program.exit_code}): {last.strip()}"
