"""Records workloads: runs them under one profiler after the other, joins what they saw to the IR, writes captures.

Several subjects take turns, process by process: A B, B A, A B and so on. The order alternates, so that a machine that
slows down steadily slows no subject more than another. What cannot be captured is told and noted in the manifest; the
rest is written nevertheless.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from llmir_iree.bundle import file_sha256
from llmir_iree.params.errors import LlmirError
from llmir_iree.tracing.capture import (
    MANIFEST_NAME,
    SOURCES,
    Call,
    Capture,
    CaptureError,
    CaptureManifest,
    DispatchRun,
    MachineInfo,
    Site,
    Source,
    ZoneTotal,
    write_rows,
)
from llmir_iree.tracing.children import run_child
from llmir_iree.tracing.ireeprof import read_ireeprof
from llmir_iree.tracing.op_costs import Kernel, Step
from llmir_iree.tracing.sites import join_sites, sites_of_binary
from llmir_iree.tracing.tracy_capture import record_tracy
from llmir_iree.tracing.tracy_file import read_tracy
from llmir_iree.tracing.tracy_totals import total_zones
from llmir_iree.tracing.workload import Clock, Workload, read_clock

_PACKAGES = ("llmir-iree", "iree-base-compiler", "iree-base-runtime")

# The first call of a process meets cold caches and memory that was never touched.
_WARM_UP_CALLS = 1


class IrSource(Protocol):
    """Where the IR of a workload's module comes from."""

    @property
    def portable(self) -> str:
        """The text that the module was compiled from."""

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels in it, by the symbol of their executable."""

    def stream(self) -> str:
        """The module at stream level, with locations that point into `portable`."""

    def write(self, folder: Path) -> None:
        """Make and fill the folder `ir` of a capture."""


@dataclass(frozen=True)
class Subject:
    """What is recorded.

    Attributes:
        name: as the user gave it.
        step: of a bundle's phase, what a call works on.
        ir: None if the IR of the module is not known.
        machine: told when the runs are over, as it may measure.
    """

    name: str
    workload: Workload
    phase: str | None = None
    step: Step | None = None
    target: str | None = None
    flags: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    ir: IrSource | None = None
    machine: Callable[[], MachineInfo] = field(default=lambda: MachineInfo(cpu="unknown", cores=os.cpu_count() or 1))


@dataclass(frozen=True)
class RecordOptions:
    """How to record.

    Attributes:
        runs: calls of the function in a process, one more than which is made and left out of tables.
        processes: how many of each subject, one after the other: calls of one process are no independent samples.
        sources: what to capture; `.ireeprof`, and IR where it is known, if None.
        timeout_s: deadline of every child.
        force: replace captures that exist.
    """

    runs: int = 20
    processes: int = 3
    sources: tuple[Source, ...] | None = None
    timeout_s: float = 300.0
    force: bool = False

    def __post_init__(self) -> None:
        if self.runs < 1 or self.processes < 1:
            raise CaptureError(f"runs is {self.runs}, processes is {self.processes}; both have to be at least 1")
        if self.timeout_s <= 0:
            raise CaptureError(f"timeout is {self.timeout_s:g} s; it has to be more than 0")
        if unknown := [name for name in self.sources or () if name not in SOURCES]:
            raise CaptureError(f"cannot record {unknown[0]!r}; what can be recorded: {', '.join(SOURCES)}")
        if self.sources == ():
            raise CaptureError(f"nothing to record; what can be recorded: {', '.join(SOURCES)}")


def record(
    subject: Subject, output: Path, options: RecordOptions, report: Callable[[str], None] = lambda _: None
) -> Capture:
    """Record one subject, see `record_in_turns`."""
    [capture] = record_in_turns([(subject, output)], options, report)
    return capture


def record_in_turns(
    subjects: Sequence[tuple[Subject, Path]],
    options: RecordOptions,
    report: Callable[[str], None] = lambda _: None,
) -> list[Capture]:
    """Record subjects in turns, process by process, and write a capture of each.

    Args:
        subjects: what to run, and where to write what was seen of it.
        options: how to run each of them.
        report: told of every stage as it begins, and of everything that fails.

    Raises:
        CaptureError: a place is taken, or nothing at all could be captured of a subject; the message says why, and no
            capture is written.
    """
    session = uuid.uuid4().hex
    with ExitStack() as stack:
        recordings = [
            _Recording(
                subject,
                options,
                stack.enter_context(capture_in_place(output, force=options.force)),
                session,
                _named(report, subject, output) if len(subjects) > 1 else report,
            )
            for subject, output in subjects
        ]
        for process in range(options.processes):
            # Whoever went last goes first.
            turn = recordings if process % 2 == 0 else recordings[::-1]
            for recording in turn:
                recording.run_process(process)
        for recording in recordings:  # Afterwards: it takes time, in which the machine may change.
            recording.read_processes()
            recording.finish()
        for recording in recordings:
            recording.write()
    return [Capture.open(output) for _, output in subjects]


def _named(report: Callable[[str], None], subject: Subject, output: Path) -> Callable[[str], None]:
    """Tells which of several subjects is meant."""
    return lambda line: report(f"{line} ({subject.name}, to {output.name})")


def capture_is_free(output: Path, *, force: bool) -> None:
    """Check that a capture may be written to a place, which is better known before minutes of work.

    Raises:
        CaptureError: something stands there, and is not a capture or may not be replaced.
    """
    if not output.exists():
        return
    if not (output / MANIFEST_NAME).is_file():
        raise CaptureError(f"{output}: exists and is not a capture; name another folder, or remove it first")
    if not force:
        raise CaptureError(f"{output}: exists; --force replaces it")


@contextmanager
def capture_in_place(output: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        CaptureError: as `capture_is_free`, or the disk does not take it.
    """
    capture_is_free(output, force=force)
    partial = output.absolute().with_name(f".{output.name}.partial-{os.getpid()}")
    replaced = partial.with_name(f".{output.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
    except OSError as error:
        raise CaptureError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def package_versions() -> dict[str, str]:
    """Versions of what takes part in a recording, as far as it is installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


class _Recording:
    """One subject's recording, from nothing to a capture."""

    def __init__(
        self, subject: Subject, options: RecordOptions, folder: Path, session: str, report: Callable[[str], None]
    ) -> None:
        self.subject = subject
        self.options = options
        self.folder = folder
        self.session = session
        self.report = report
        self.sources = options.sources or (("ireeprof",) if subject.ir is None else ("ireeprof", "ir"))
        self.calls: list[Call] = []
        self.runs: list[DispatchRun] = []
        self.sites: list[Site] = []
        self.zones: list[ZoneTotal] = []
        self.captured: list[Source] = []
        self.missing: dict[str, str] = {}
        self._clocks: list[Clock] = []
        self._process_ns: list[tuple[int, int]] = []
        self._has_failed = False

    def run_process(self, process: int) -> None:
        """Run the workload once under the runtime's own profiler, if that is asked for and did not fail before."""
        if "ireeprof" not in self.sources or self._has_failed:
            return
        self.report(f"recording .ireeprof, process {process + 1} of {self.options.processes}")
        workload = self.subject.workload
        begin = time.time_ns()
        try:
            command = workload.command(self.options.runs + _WARM_UP_CALLS, profile=self._profile(process))
            told = run_child(command, timeout_s=self.options.timeout_s, calls_modules=workload.is_local)
            end = time.time_ns()
            self._clocks.append(read_clock(told))
            self._process_ns.append((begin, end))
        except CaptureError as error:
            self._fail(process, error)

    def read_processes(self) -> None:
        """Read what was profiled, up to the first process whose profile is damaged."""
        if not self._clocks:
            return
        self.report("reading what was recorded")
        for process, clock in enumerate(self._clocks):
            try:
                self._read_process(process, clock)
            except CaptureError as error:
                del self._clocks[process:], self._process_ns[process:]
                self._fail(process, error)
                return

    def finish(self) -> None:
        """Capture what is no profile of a process, and join all of it.

        Raises:
            CaptureError: nothing was captured.
        """
        for source, step in (("tracy", self._record_tracy), ("ir", self._record_ir)):
            if source in self.sources:
                try:
                    step()
                except LlmirError as error:
                    self._miss(source, str(error))
        if not self.captured:
            raise CaptureError(f"{self.subject.name}: nothing was captured: {'; '.join(self.missing.values())}")
        self._join()

    def write(self) -> None:
        """Write tables, then the manifest, which makes the folder a capture."""
        subject, workload = self.subject, self.subject.workload
        write_rows(self.folder, Call, self.calls)
        write_rows(self.folder, DispatchRun, self.runs)
        write_rows(self.folder, Site, self.sites)
        write_rows(self.folder, ZoneTotal, self.zones)
        self.report("measuring what this machine gives at best")
        manifest = CaptureManifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            subject=subject.name,
            phase=subject.phase,
            functions=(workload.function,),
            batch_size=subject.step.batch if subject.step else None,
            context=subject.step.context if subject.step else None,
            processes=max(len(self._clocks), 1),
            session=self.session,
            process_ns=tuple(self._process_ns),
            warm_up_calls=_WARM_UP_CALLS if self.calls else 0,
            clock_ns=tuple(clock.total_ns for clock in self._clocks),
            shapes=workload.shapes,
            device=workload.device,
            target=subject.target,
            flags=subject.flags,
            passes=subject.passes,
            versions=package_versions(),
            modules={workload.module.name: file_sha256(workload.module)},
            machine=subject.machine(),
            sources=tuple(self.captured),
            missing=self.missing,
        )
        Capture.create(self.folder, manifest)

    def _read_process(self, process: int, clock: Clock) -> None:
        function = self.subject.workload.function
        profile = read_ireeprof(
            self._profile(process),
            process=process,
            function=function,
            calls=clock.calls,
            timeout_s=self.options.timeout_s,
        )
        if len(profile.calls) != clock.calls:
            self.missing["calls"] = (
                f"{len(profile.calls)} submissions do not divide into {clock.calls} calls of {function}; each "
                "submission stands for a call"
            )
        if profile.invalid:
            self.missing[f"dispatches of process {process}"] = f"{profile.invalid} were not timed by the runtime"
        self.calls += profile.calls
        self.runs += profile.runs
        if "ireeprof" not in self.captured:
            self.captured.append("ireeprof")

    def _profile(self, process: int) -> Path:
        return self.folder / f"process-{process}.ireeprof"

    def _fail(self, process: int, error: CaptureError) -> None:
        """Give up profiling; what the processes before this one left is kept."""
        self._has_failed = True
        for later in range(process, self.options.processes):
            self._profile(later).unlink(missing_ok=True)
        self._miss("ireeprof" if process == 0 else f"ireeprof from process {process} on", self._told(error))

    def _record_tracy(self) -> None:
        """Run the workload once more, under the runtime that sends its zones to Tracy."""
        self.report("recording .tracy")
        file = self.folder / "process-0.tracy"
        command = self.subject.workload.command(self.options.runs + _WARM_UP_CALLS, traced=True)
        try:
            program = record_tracy(
                command, file, timeout_s=self.options.timeout_s, calls_modules=self.subject.workload.is_local
            )
            self.zones += total_zones(read_tracy(file), 0)
        except CaptureError as error:
            file.unlink(missing_ok=True)
            raise CaptureError(self._told(error)) from None
        if program.problem is not None:  # What the program did until then is in the file.
            self._miss("the end of the traced run", program.problem)
        self.captured.append("tracy")

    def _record_ir(self) -> None:
        if self.subject.ir is None:
            raise CaptureError(
                "ir: a compiled module does not hold it; record the bundle, or the .mlir it was made from"
            )
        self.report("compiling again, for the IR of every pass")
        folder = self.folder / "ir"
        try:
            self.subject.ir.write(folder)
        except LlmirError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.captured.append("ir")

    def _join(self) -> None:
        """Describe the places that dispatch, from the IR where there is one."""
        source, workload = self.subject.ir, self.subject.workload
        if source is not None:
            phases = sorted((self.folder / "ir" / "phases").glob("*.stream.mlir"))
            try:
                if not phases:
                    self.report("compiling again, to tell the dispatches apart")
                self.sites = join_sites(
                    self.runs,
                    workload.function,
                    stream_ir=phases[0].read_text(encoding="utf-8") if phases else source.stream(),
                    portable=source.portable,
                    shapes=workload.shapes,
                    kernels=source.kernels,
                    step=self.subject.step,
                )
                return
            except LlmirError as error:
                self._miss("sites", str(error))
        self.sites = sites_of_binary(self.runs)

    def _told(self, error: CaptureError) -> str:
        """A failure, with the driver that failed where it is not the host's own."""
        workload = self.subject.workload
        return str(error) if workload.is_local else f"{workload.device}: {error}"

    def _miss(self, what: str, reason: str) -> None:
        self.missing[what] = reason
        self.report(f"missing: {what}: {reason}")
