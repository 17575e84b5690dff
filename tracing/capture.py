"""The capture: a folder that holds what one recording saw, as data that later programs can read without the model.

This file is the one reader and the one writer of its tables; docs/capture-format.md tells other programs of them. A
capture of a newer schema, a row with an unknown field and a file that ends in the middle of a row are refused.

    NAME.llmtrace/
      manifest.json                    what was recorded, with what, and what is missing: `CaptureManifest`
      calls.jsonl                      a row for every call of a function: `Call`
      dispatches.jsonl                 a row for every dispatch of every call: `DispatchRun`
      sites.jsonl                      a row for every place that dispatches, with what it computes: `Site`
      zones.jsonl                      a row for every kind of zone in a Tracy file: `ZoneTotal`
      process-<n>.ireeprof             raw, of the n-th recorded process
      process-<n>.tracy                raw; opens in Tracy's own viewer
      ir/portable.mlir  ir/debug.mlir  what was compiled, and the same with locations
      ir/phases/                       one file for every phase of the compiler
      ir/passes.mlir.zst               IR after every pass that changed something, see `llmir_iree.tracing.ir_dump`
      ir/binaries/                     the machine code that was run
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmir_iree.params.errors import LlmirError

CAPTURE_SUFFIX = ".llmtrace"
MANIFEST_NAME = "manifest.json"
PASSES_NAME = "passes.mlir.zst"
SCHEMA_VERSION = 2
# Version 1 held the IR of passes as a folder, `ir/tree`, and had no `session` and no `process_ns`.
_READABLE_VERSIONS = (1, SCHEMA_VERSION)

Source = Literal["ireeprof", "tracy", "ir"]
SOURCES: tuple[Source, ...] = ("ireeprof", "tracy", "ir")


class CaptureError(LlmirError):
    """A capture, or a profile that goes into one, is damaged, of another version, or not what was asked for."""


class _Record(BaseModel):
    """A row or a part of the manifest: immutable, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MachineInfo(_Record):
    """Where it was recorded; the roofs are those that `llmir_iree.peaks` measured, None where they are not known."""

    cpu: str
    cores: int = Field(gt=0)
    bandwidth_bytes_s: float | None = None
    peak_macs_s: float | None = None


class CaptureManifest(_Record):
    """What was recorded.

    Attributes:
        created: ISO 8601, UTC.
        subject: path of the bundle or module, as it was given.
        phase: "prefill", "decode" or "generate" of a bundle, None for another module.
        functions: those that were called.
        batch_size, context: of a bundle's phase: sequences, and tokens in the cache before the first call.
        processes: how many ran, one after the other; a row names its own by number.
        session: shared by the captures of one recording, which took turns: the n-th process of each ran side by side.
            None in captures that were made before there were sessions, and of a generation.
        process_ns: of each process that ran under `.ireeprof`, when it began and ended, in ns since the epoch.
        warm_up_calls: calls at the beginning of each process that met cold caches, and that tables leave out.
        clock_ns: of each process, what all its calls took together by its own clock.
        shapes: of the arguments of every call, None for one that is not known; empty if none is.
        device: IREE device URI.
        target, flags: the compiled target's name and iree-compile's flags for it, as far as they are known.
        passes: of the plugin, that a bundle's module went through before iree-compile; empty for another module.
        versions: of the packages that took part, by name.
        modules: sha256 of each compiled module, by file name.
        sources: what was captured.
        missing: what was not, each with the reason, in words for the user.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    subject: str
    phase: str | None
    functions: tuple[str, ...]
    batch_size: int | None = None
    context: int | None = None
    processes: int = Field(ge=0)
    session: str | None = None
    process_ns: tuple[tuple[int, int], ...] = ()
    warm_up_calls: int = 0
    clock_ns: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...] | None, ...] = ()
    device: str
    target: str | None = None
    flags: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    versions: dict[str, str]
    modules: dict[str, str]
    machine: MachineInfo
    sources: tuple[Source, ...]
    missing: dict[str, str] = {}


class Call(_Record):
    """One call of a function: wall time from its submission to its end, in the clock of its process."""

    process: int
    call: int
    function: str
    start_ns: int
    wall_ns: int


class DispatchRun(_Record):
    """One dispatch of one call.

    Attributes:
        site: the n-th dispatch that the function's call makes, from 0.
        key: name of the executable's export, by which the binary and the IR know it.
        duration_ns: wall time.
        tile_ns: time of all workgroups together, over all threads: `tile_ns / duration_ns` threads were busy.
        tiles: how many workgroups that was.
    """

    process: int
    call: int
    function: str
    site: int
    key: str
    start_ns: int
    duration_ns: int
    tile_ns: int
    tiles: int
    workgroups: tuple[int, int, int]


class Site(_Record):
    """A place in a function that dispatches, and what is known of it from the IR.

    Identical layers share one export; sites tell them apart.

    Attributes:
        function, site, key: as in `DispatchRun`.
        executable: symbol of the executable in the IR.
        kind: what it does, such as "quantized_matmul", "paged_attention", "norm_quantize", "softmax" or "copy".
        op: text of the op in the portable module that it comes from, None where the location is lost.
        line: of that op in ir/portable.mlir, from 1.
        weight: name of the parameter that it reads, if it reads one.
        layer: of the model, from 0; None outside layers.
        shape: of the result or of the matmul, in words such as "1x2048x5632".
        bytes_read, bytes_written, flops: what one dispatch has to move and to compute; None where shapes vary in ways
            that the IR does not tell. A product and its sum count as two.
    """

    function: str
    site: int
    key: str
    executable: str
    kind: str
    op: str | None = None
    line: int | None = None
    weight: str | None = None
    layer: int | None = None
    shape: str | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    flops: int | None = None


class ZoneTotal(_Record):
    """All zones of one name at one source location in a Tracy file, `self_ns` without the zones inside them."""

    process: int
    name: str
    source: str
    count: int
    total_ns: int
    self_ns: int
    min_ns: int
    median_ns: int
    max_ns: int


Row = TypeVar("Row", Call, DispatchRun, Site, ZoneTotal)

_TABLES: Mapping[type[_Record], str] = {
    Call: "calls.jsonl",
    DispatchRun: "dispatches.jsonl",
    Site: "sites.jsonl",
    ZoneTotal: "zones.jsonl",
}


class Capture:
    """An opened capture: its manifest, and its tables, read when asked for."""

    def __init__(self, folder: Path, manifest: CaptureManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Capture:
        """Read a capture's manifest.

        Raises:
            CaptureError: not a capture, a newer one, or a damaged one.
        """
        file = folder / MANIFEST_NAME
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise CaptureError(
                f"{folder}: not a capture, it has no {MANIFEST_NAME}; llmir-trace record makes one"
            ) from None
        except UnicodeDecodeError:
            raise CaptureError(f"{file}: not a capture's manifest") from None
        try:
            version = json.loads(text)["schema_version"]
        except (ValueError, KeyError, TypeError):
            raise CaptureError(f"{file}: not a capture's manifest") from None
        if version not in _READABLE_VERSIONS:
            readable = " and ".join(map(str, _READABLE_VERSIONS))
            raise CaptureError(f"{folder}: its schema is {version}; this program reads {readable}")
        try:
            return cls(folder, CaptureManifest.model_validate_json(text))
        except ValidationError as error:
            raise CaptureError(f"{file}: {_first_problem(error)}") from None

    @classmethod
    def create(cls, folder: Path, manifest: CaptureManifest) -> Capture:
        """Write a manifest into a folder, which is complete from then on: all else has to be there before."""
        text = manifest.model_dump_json(indent=2)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        return cls(folder, manifest)

    def read(self, row: type[Row]) -> list[Row]:
        """All rows of one table; none if the capture has no such table.

        Raises:
            CaptureError: a row is damaged.
        """
        file = self.folder / _TABLES[row]
        return list(_read_rows(file, row)) if file.exists() else []

    def profiles(self, source: Source) -> list[Path]:
        """Raw profiles of a source, process by process."""
        names = (self.folder / f"process-{process}.{source}" for process in range(self.manifest.processes))
        return [name for name in names if name.exists()]

    @property
    def ir(self) -> Path:
        """The folder of the IR, which may not be there."""
        return self.folder / "ir"

    @property
    def has_passes(self) -> bool:
        """Whether it holds the IR after every pass."""
        return (self.ir / PASSES_NAME).is_file() or (self.ir / "tree").is_dir()


def write_rows(folder: Path, row: type[Row], rows: Iterable[Row]) -> None:
    """Write one table of a capture that is being made."""
    with (folder / _TABLES[row]).open("w", encoding="utf-8") as stream:
        stream.writelines(value.model_dump_json(exclude_defaults=True) + "\n" for value in rows)


def _read_rows(file: Path, row: type[Row]) -> Iterator[Row]:
    with file.open("rb") as stream:  # pydantic decodes, and refuses what is no text.
        for number, line in enumerate(stream, 1):
            try:
                yield row.model_validate_json(line)
            except ValidationError as error:
                raise CaptureError(f"{file}, line {number}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
