"""Cuts what iree-compile printed after its passes, a log or a folder of files, into dumps, and packs them into a file.

A log is what `--mlir-print-ir-after-all` writes to stderr. MLIR holds a lock while it prints one dump, so dumps of a
compilation with many threads come in mixed order, but each of them whole. The folder is that of
`--mlir-print-ir-tree-dir`: a file a dump, in folders named after the ops around it, with a number for every level in
front of the pass, which put in order give the order of execution. Either may be compressed by gzip.

Most passes leave most of a program as it was, and a dump shows all of it. Packed, the dumps of a folder are a log
again, in order and compressed together, so that what a dump shares with those before it takes next to nothing.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from llmir_iree.tracing.capture import PASSES_NAME, CaptureError
from llmir_iree.tracing.frames import open_frames, write_frames

HOW_TO_DUMP = (
    "iree-compile writes one with --mlir-print-ir-after-all, to stderr or with --mlir-print-ir-tree-dir=DIR to a folder"
)

_MARK = b"// -----// IR Dump "
_HEADER = re.compile(
    r"// -----// IR Dump (?P<when>After|Before) (?P<class>\S+?):?(?: Failed:?)?"
    r"(?: \((?P<old>[\w.-]+)\)| (?P<argument>[\w.-]+)(?P<options>\{.*\})?)?"
    r"(?: \('(?P<op>[\w.]+)' operation(?:: @(?P<symbol>.+?))?\))?(?: Failed)? //-----"
    r"(?: // in (?P<executable>\S+))?"  # Written by `pack_tree`: a log does not tell.
)
_TREE_FILE = re.compile(r"((?:\d+_)+)(.+)\.mlir(?:\.gz)?")
_TREE_EXECUTABLE = re.compile(r"(?:flow|stream|hal)_executable_(.+)")

_CHUNK = 1 << 22
_LONGEST_LINE = 1 << 20
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


def find_dumps(folder: Path) -> dict[str, Iterator[Dump]]:
    """Dumps that a folder holds, or the folders in it, one for every program: packed, or as iree-compile left them.

    Returns:
        By the name of the program's folder, empty for the folder itself.
    """
    found: dict[str, Iterator[Dump]] = {}
    for name, parent in [("", folder), *((path.name, path) for path in _folders(folder))]:
        if (packed := parent / PASSES_NAME).is_file():
            found[name] = read_log(packed)
        elif roots := [path for path in _folders(parent) if path.name.startswith("builtin_module")]:
            found[name] = read_tree(roots)
    # Modules in a module look like programs of their own from outside.
    return {"": found[""]} if "" in found else found


def read_tree(roots: Iterable[Path]) -> Iterator[Dump]:
    """Dumps of `--mlir-print-ir-tree-dir`, in the order of execution; of executables side by side, one by one."""
    for file, executable in _tree_files(roots):
        yield from _read(file, executable)


def pack_tree(tree: Path, packed: Path) -> None:
    """Write the dumps of a folder of `--mlir-print-ir-tree-dir` into one file, small, and as good as the folder.

    Raises:
        CaptureError: there are none; iree-compile goes on where it cannot write them.
    """
    files = _tree_files(_folders(tree)) if tree.is_dir() else []
    if not files:
        raise CaptureError(f"{tree}: iree-compile left no IR there")
    write_frames(packed, (_named(file, executable) for file, executable in files))


def _named(file: Path, executable: str | None) -> bytes:
    """A file's text, which begins with a header, and in the header the executable that the path tells."""
    with open_dump(file) as stream:
        text = stream.read()
    if executable is not None:
        header, line_end, body = text.partition(b"\n")
        text = header + b" in " + executable.encode() + line_end + body
    return text if text.endswith(b"\n") else text + b"\n"


def _tree_files(roots: Iterable[Path]) -> list[tuple[Path, str | None]]:
    """Files of dumps in the order of execution, with the executables that they are of."""
    files = [
        (tuple(map(int, match[1].split("_")[:-1])), file.relative_to(root.parent), file)
        for root in roots
        for file in root.rglob("*.mlir*")
        if (match := _TREE_FILE.fullmatch(file.name))
    ]
    return [(file, _executable_of(path)) for _, path, file in sorted(files)]


def _executable_of(path: Path) -> str | None:
    return next((match[1] for part in path.parts if (match := _TREE_EXECUTABLE.fullmatch(part))), None)


def open_dump(file: Path) -> BinaryIO:
    """Open a file of dumps for reading, packed, compressed or plain."""
    if file.suffix == ".zst":
        return open_frames(file)
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
        where = executable or match["executable"]
        yield Dump(name, match["options"] or "", file, offset, body, match["op"], symbol, where)


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
