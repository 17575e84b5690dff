"""Captures of whole generations: a prompt's prefill, its steps, and all that lies between them, through Tracy.

The dispatches are those that Tracy's zones tell of. On the CPU these are shares of workgroups that a worker took, from
which the runs of a dispatch are put together; how many workgroups there were, they do not tell.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from llmir_iree.bundle import Bundle
from llmir_iree.tracing.capture import (
    Call,
    Capture,
    CaptureError,
    CaptureManifest,
    DispatchRun,
    MachineInfo,
    ZoneTotal,
    write_rows,
)
from llmir_iree.tracing.record import capture_in_place, package_versions
from llmir_iree.tracing.tracy_capture import TracedProgram, record_tracy
from llmir_iree.tracing.tracy_file import TracyFile, read_tracy

# The command line of this project, which stands above this folder: named, not imported.
_PROGRAM = "from llmir_iree.cli.run import main; main(prog_name='llmir-run')"

_MISSING = {
    "ireeprof": "IREE's Python runtime does not write it; record a prefill or a decode for it",
    "ir": "not a part of this recording; record a prefill or a decode for it",
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
) -> Capture:
    """Complete a prompt in a process of its own and capture it.

    Sites are numbered by the order in which a call's dispatches begin. If the process crashes, what it did until then
    is captured, and the manifest's `missing` says so.

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
        file = folder / "process-0.tracy"
        program = record_tracy(command, file, timeout_s=timeout_s, stdin=prompt)
        trace = read_tracy(file)
        calls = _calls(trace, {function.name.rpartition(".")[2] for function in opened.manifest.functions})
        if not calls:
            raise CaptureError(_failure(program))
        write_rows(folder, Call, calls)
        write_rows(folder, DispatchRun, _dispatches(trace, calls))
        write_rows(folder, ZoneTotal, trace.zone_totals(0))
        manifest = CaptureManifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            subject=str(bundle),
            phase="generate",
            functions=tuple(sorted({call.function for call in calls})),
            processes=1,
            device=device or compiled.driver,
            target=compiled.target,
            flags=compiled.modules["decode"].flags,
            versions=package_versions(),
            modules={info.file: info.sha256 for info in compiled.modules.values()},
            machine=_machine(trace) if machine is None else machine(),
            sources=("tracy",),
            missing=_MISSING if program.problem is None else {**_MISSING, "end": program.problem},
        )
        Capture.create(folder, manifest)
    return Capture.open(output)


def _calls(trace: TracyFile, functions: set[str]) -> list[Call]:
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
    for dispatch in trace.dispatches():
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
