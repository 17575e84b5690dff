"""The parameter archive: one IRPA file that IREE maps into memory and uses in place.

IREE writes the file's skeleton, its table of entries and zeros for their contents; the contents are then written over
the zeros a few rows at a time. So the format stays IREE's business, and no tensor is ever whole in memory. Siblings lie
back to back, so that entries of merged weights can span them (`siblings`).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llmir_iree.params.checkpoint import Checkpoint
from llmir_iree.params.errors import BundleError, LlmirError, ParameterError
from llmir_iree.params.formats import split_planes
from llmir_iree.params.irpa import set_spans
from llmir_iree.params.layouts import ALIGNMENT, TILE16, TILE_ROWS, layout_of, pack_tile16
from llmir_iree.params.memory import drop_from_memory
from llmir_iree.params.plan import PlannedWeight
from llmir_iree.params.quantize import PLAIN_ENCODINGS, dequantize, quantize
from llmir_iree.params.siblings import MergedWeight, merge_siblings

_CHUNK_VALUES = 4 << 20  # values converted at a time: 16 MiB as float32, so a chunk and its by-products stay small


@dataclass(frozen=True)
class ArchiveEntry:
    """Where an entry's bytes stand in the archive file."""

    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.offset % ALIGNMENT:
            raise ValueError(f"an entry at byte {self.offset} is not aligned to {ALIGNMENT}")


@dataclass(frozen=True)
class ArchiveInfo:
    """A written archive: size and SHA-256 of the file, its entries by key, and the merged weights among them."""

    nbytes: int
    sha256: str
    entries: Mapping[str, ArchiveEntry]
    merged: tuple[MergedWeight, ...]


def write_archive(
    checkpoint: Checkpoint,
    plan: Sequence[PlannedWeight],
    path: Path,
    progress: Callable[[str, int], None] | None = None,
) -> ArchiveInfo:
    """Write the planned weights of a checkpoint as an IREE parameter archive.

    The file appears under its name only when it is whole; on any failure nothing is left.

    Args:
        checkpoint: where the weights come from.
        plan: what `plan_weights` made for it.
        path: of the archive, usually params.irpa; an older file is replaced.
        progress: called with a weight's name and the archive bytes written since the last call.

    Raises:
        LlmirError: the file cannot be written, such as for want of space.
        ParameterError: a weight's values do not fit its format.
    """
    if not plan:
        raise LlmirError(f"{path}: there are no weights to write")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    merged = merge_siblings(plan)
    try:
        with _removed_unless_renamed(partial):
            entries = _create_skeleton(plan, merged, partial)
            with partial.open("r+b") as file:
                for weight in plan:
                    _write_weight(checkpoint, weight, file, entries, progress)
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            drop_from_memory(partial)
            nbytes = partial.stat().st_size
            partial.replace(path)
    except OSError as error:
        raise LlmirError(f"cannot write {path}: {error.strerror or error}") from error
    return ArchiveInfo(nbytes, digest, entries, merged)


def read_archive_index(path: Path) -> Mapping[str, ArchiveEntry]:
    """List an archive's entries without touching their contents.

    Raises:
        BundleError: the file is missing, is no parameter archive, or is shorter than its table says.
    """
    from iree.runtime import ParameterIndex

    path = Path(path)
    if not path.is_file():
        raise BundleError(f"there is no parameter archive {path}")
    size = path.stat().st_size
    index = ParameterIndex()
    try:
        index.load(str(path), format="irpa")
    except Exception as error:  # IREE turns each of its status codes into another type: IndexError, ValueError, ...
        raise BundleError(f"{path} is damaged or no parameter archive ({size} bytes)") from error
    entries = {}
    for key, entry in index.items():
        if not entry.is_file:
            raise BundleError(f"{path}: entry {key} has no contents of its own")
        offset = entry.file_storage[1]
        if offset + entry.length > size:
            raise BundleError(f"{path}: entry {key} ends at byte {offset + entry.length}, the file at {size}")
        if offset % ALIGNMENT:
            raise BundleError(f"{path}: entry {key} at byte {offset} is not aligned to {ALIGNMENT}")
        entries[key] = ArchiveEntry(offset, entry.length)
    return MappingProxyType(entries)


@contextlib.contextmanager
def _removed_unless_renamed(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _create_skeleton(
    plan: Sequence[PlannedWeight], merged: Sequence[MergedWeight], path: Path
) -> Mapping[str, ArchiveEntry]:
    """Write an archive of zeros with the entries of the plan and of merged weights, and return where they are.

    Raises:
        OSError: the file cannot be written.
    """
    spans = {key: keys for weight in merged for key, keys in weight.spans.items()}
    _create_zeros({**_entry_sizes(plan, merged), **dict.fromkeys(spans, 0)}, path)
    entries = read_archive_index(path)
    with path.open("r+b") as file:
        set_spans(file, {key: _span([entries[sibling] for sibling in keys]) for key, keys in spans.items()})
    return read_archive_index(path)


def _entry_sizes(plan: Sequence[PlannedWeight], merged: Sequence[MergedWeight]) -> dict[str, int]:
    """Bytes of the entries in the order of the file: the plan's, but siblings together, the same plane of each."""
    sizes = {key: nbytes for weight in plan for key, nbytes in weight.entry_bytes.items()}
    together = {name: weight for weight in merged for name in weight.sibling_names}
    ordered: dict[str, int] = {}
    for weight in plan:
        group = together.get(weight.spec.name)
        keys = weight.entry_bytes if group is None else chain.from_iterable(group.spans.values())
        ordered |= {key: sizes[key] for key in keys}
    return ordered


def _span(entries: Sequence[ArchiveEntry]) -> tuple[int, int]:
    """Offset and bytes of entries that lie back to back."""
    for entry, following in pairwise(entries):
        if following.offset != entry.offset + entry.nbytes:
            raise LlmirError(f"IREE put an entry at byte {following.offset}, not behind the one at {entry.offset}")
    return entries[0].offset, sum(entry.nbytes for entry in entries)


def _create_zeros(sizes: Mapping[str, int], path: Path) -> None:
    """Let IREE write an archive of entries of zeros, in this order; OSError if it cannot."""
    from iree.runtime import ParameterIndex

    _reserve(path, sum(sizes.values()))
    # Every entry's contents are a slice of one private mapping that nobody writes to: the kernel backs all of it with
    # its page of zeros, so the zeros of a 100 GB archive take no memory either.
    with _zeros(max(sizes.values())) as zeros:
        index = ParameterIndex()
        for key, size in sizes.items():
            index.add_buffer(key, zeros[:size])
        try:
            index.create_archive_file(str(path))
        except Exception as error:  # of a type for each status code, without errno; its words name the likely reason
            reason = str(error).strip().splitlines()[0].split(";")[-1].strip()
            raise OSError(reason) from error
        del index


def _reserve(path: Path, nbytes: int) -> None:
    """Ask for the space at once, so that a full disk shows before minutes of work; IREE then starts the file anew."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)


@contextlib.contextmanager
def _zeros(nbytes: int) -> Iterator[memoryview]:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    yield memoryview(mapping)
    # Not closed: IREE's index may hold the buffer until it is collected, and the mapping costs nothing until then.


def _write_weight(
    checkpoint: Checkpoint,
    weight: PlannedWeight,
    file: BinaryIO,
    entries: Mapping[str, ArchiveEntry],
    progress: Callable[[str, int], None] | None,
) -> None:
    name = weight.spec.name
    if weight.spec.kind == "vector":
        vector = dequantize(checkpoint.read(name), weight.encoding, weight.spec.shape)
        _write_at(file, entries[name].offset, vector)
        if progress is not None:
            progress(name, vector.nbytes)
        return
    rows, columns = weight.spec.shape
    is_tiled = layout_of(weight.format) == TILE16
    step = max(1, _CHUNK_VALUES // columns // TILE_ROWS) * TILE_ROWS
    written = {plane.name: 0 for plane in weight.weight_format.planes}
    for start in range(0, rows, step):
        blocks = _packed_rows(checkpoint, weight, start, min(start + step, rows))
        planes = split_planes(weight.weight_format, blocks)
        if is_tiled:
            planes = pack_tile16(weight.format, planes)
        for plane, values in planes.items():
            _write_at(file, entries[f"{name}.{plane}"].offset + written[plane], values)
            written[plane] += values.nbytes
        if progress is not None:
            progress(name, sum(values.nbytes for values in planes.values()))


def _packed_rows(checkpoint: Checkpoint, weight: PlannedWeight, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Rows of a matrix in its stored format, uint8 [rows, bytes of a row]; the source's own bytes where it is kept."""
    array = checkpoint.read_rows(weight.spec.name, start, stop)
    if not weight.converted:
        return np.ascontiguousarray(array).view(np.uint8) if weight.encoding in PLAIN_ENCODINGS else array
    values = dequantize(array, weight.encoding, (stop - start, weight.spec.shape[1]))
    try:
        return quantize(values, weight.format)
    except ParameterError as error:
        raise ParameterError(f"{checkpoint.source}: tensor {weight.spec.name} {error}") from None


def _write_at(file: BinaryIO, offset: int, values: npt.NDArray[Any]) -> None:
    # Written, not mapped: a disk that fills up is then an OSError and not a SIGBUS.
    file.seek(offset)
    file.write(np.ascontiguousarray(values).view(np.uint8).data)
