"""Cuts what iree-compile printed after its passes, a log or a folder of files, into dumps.

A log is what `--mlir-print-ir-after-all` writes to stderr. MLIR holds a lock while it prints one dump, so dumps of a
compilation with many threads come in mixed order, but each of them whole. The folder is that of
`--mlir-print-ir-tree-dir`: a file a dump, in folders named after the ops around it, with a number for every level in
front of the pass, which put in order give the order of execution. Either may be compressed by gzip.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from llmir_iree.tracing.capture import CaptureError

HOW_TO_DUMP = (
    "iree-compile writes one with --mlir-print-ir-after-all, to stderr or with --mlir-print-ir-tree-dir=DIR to a folder"
)

_MARK = b"// -----// IR Dump "
_HEADER = re.compile(
    r"// -----// IR Dump (?P<when>After|Before) (?P<class>\S+?):?(?: Failed:?)?"
    r"(?: \((?P<old>[\w.-]+)\)| (?P<argument>[\w.-]+)(?P<options>\{.*\})?)?"
    r"(?: \('(?P<op>[\w.]+)' operation(?:: @(?P<symbol>.+?))?\))?(?: Failed)? //-----"
)
_TREE_FILE = re.compile(r"((?:\d+_)+)(.+)\.mlir(?:\.gz)?")
_TREE_EXECUTABLE = re.compile(r"(?:flow|stream|hal)_executable_(.+)")

_CHUNK = 1 << 22
_LONGEST_LINE = 1 << 20
_COMPRESSION = 3
# What reading may end in; the last two come of a compressed file that is torn.
READ_ERRORS = (OSError, EOFError, zlib.error)
# More than a module without its constants takes. MLIR prints resources behind the module, where they may be cut off.
_LARGEST_BODY = 48 << 20


@dataclass(frozen=True, slots=True)
class Dump:
    """What one pass left behind, as bytes of a file.

    Attributes:
        pass_name: argument of the pass, such as "iree-llvmcpu-tile", or its class where it has none.
        options: of the pass, with braces; empty if there are none.
        file, offset: where the text begins, behind the header.
        body: the text; the end of a very large one, which holds constants, is missing.
        anchor, symbol: the op that the pass ran on, told in headers of dumps at module scope, otherwise None.
        executable: symbol, as the name of a folder, of the executable that the op is in; None in logs.
    """

    pass_name: str
    options: str
    file: Path
    offset: int
    body: bytes
    anchor: str | None = None
    symbol: str | None = None
    executable: str | None = None


def find_trees(folder: Path) -> dict[str, list[Path]]:
    """The folders of dumps in a folder, or in the folders that it holds, one for every program.

    Returns:
        By the name of the program's folder, empty for the folder itself.
    """
    found: dict[str, list[Path]] = {}
    for name, parent in [("", folder), *((path.name, path) for path in _folders(folder))]:
        roots = [path for path in _folders(parent) if path.name.startswith("builtin_module")]
        if roots:
            found[name] = roots
    # Modules in a module look like programs of their own from outside.
    return {"": found[""]} if "" in found else found


def read_tree(roots: Iterable[Path]) -> Iterator[Dump]:
    """Dumps of `--mlir-print-ir-tree-dir`, in the order of execution; of executables side by side, one by one."""
    files = [
        (tuple(map(int, match[1].split("_")[:-1])), file.relative_to(root.parent), file)
        for root in roots
        for file in root.rglob("*.mlir*")
        if (match := _TREE_FILE.fullmatch(file.name))
    ]
    for _, path, file in sorted(files):
        executables = (match[1] for part in path.parts if (match := _TREE_EXECUTABLE.fullmatch(part)))
        yield from _read(file, next(executables, None))


def compress_tree(folder: Path) -> None:
    """Compress each file of a folder of dumps in its place, to a tenth of its size or less."""
    for file in list(folder.rglob("*.mlir")):
        data = gzip.compress(file.read_bytes(), _COMPRESSION, mtime=0)
        file.with_name(file.name + ".gz").write_bytes(data)
        file.unlink()


def open_dump(file: Path) -> BinaryIO:
    """Open a file of dumps for reading, compressed or not."""
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def read_log(file: Path) -> Iterator[Dump]:
    """Dumps of a log, in its order, reading it once from its beginning to its end."""
    return _read(file, None)


def _read(file: Path, executable: str | None) -> Iterator[Dump]:
    for header, offset, body in _cut(file):
        match = _HEADER.match(header.decode(errors="replace"))
        if match is None or match["when"] == "Before":
            continue
        name = match["argument"] or match["old"] or match["class"]
        symbol = match["symbol"].strip('"') if match["symbol"] else None
        yield Dump(name, match["options"] or "", file, offset, body, match["op"], symbol, executable)


def _cut(file: Path) -> Iterator[tuple[bytes, int, bytes]]:
    """Headers, and what follows each of them, with its offset."""
    header = b""
    kept = bytearray()
    begin = base = 0
    try:
        with open_dump(file) as stream:
            while chunk := stream.read(_CHUNK) + stream.readline(_LONGEST_LINE):
                position = 0
                while (found := chunk.find(_MARK, position)) >= 0:
                    _keep(kept, chunk[position:found])
                    if header:
                        yield header, begin, bytes(kept)
                    kept.clear()
                    end = chunk.find(b"\n", found)
                    end = len(chunk) if end < 0 else end
                    header, position = chunk[found:end], end + 1
                    begin = base + position
                _keep(kept, chunk[position:])
                base += len(chunk)
    except READ_ERRORS as error:
        raise CaptureError(f"{file}: cannot be read: {error}") from None
    if header:
        yield header, begin, bytes(kept)


def _keep(kept: bytearray, piece: bytes) -> None:
    kept += piece[: max(_LARGEST_BODY - len(kept), 0)]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())
