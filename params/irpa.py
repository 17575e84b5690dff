"""Lets entries of an IRPA file share bytes: the format allows it, IREE's writer gives every entry bytes of its own.

Source of the structs: parameter_archive.h in IREE's runtime/src/iree/schemas, version 0.0. Offsets of strings and of
contents count from their segments.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import BinaryIO

from llmir_iree.params.errors import LlmirError

# Magic, version (major, minor), header size, next header, flags; number of entries; then, each as offset and length,
# the table of entries, the strings and the contents.
_HEADER = struct.Struct("<4sHHQQQQQQQQQQ")
# Size, type, flags; name and metadata, each as offset and length; minimum alignment; offset and length of the contents.
_ENTRY = struct.Struct("<QIQQQQQQQQ")
_CONTENTS = struct.Struct("<QQ")
_DATA_ENTRY = 2
_ENTRY_ALIGNMENT = 16


def set_spans(file: BinaryIO, spans: Mapping[str, tuple[int, int]]) -> None:
    """Point entries of an archive elsewhere in its contents.

    Args:
        file: an archive, open for reading and writing, whose header stands at its start.
        spans: new place of each entry that changes: offset in the file and length, within the contents.

    Raises:
        LlmirError: the file is of another version, or has no such entry.
    """
    file.seek(0)
    magic, major, minor, *_, count, table, table_length, strings, _, contents, _ = _HEADER.unpack(
        file.read(_HEADER.size)
    )
    if (magic, major, minor) != (b"IRPA", 0, 0):
        raise LlmirError(f"IREE wrote a parameter archive {magic!r} {major}.{minor}; known is b'IRPA' 0.0")
    file.seek(table)
    entries = file.read(table_length)
    missing = set(spans)
    start = 0
    for _ in range(count):
        size, kind, _, name_start, name_length, *_ = _ENTRY.unpack_from(entries, start)
        file.seek(strings + name_start)
        name = file.read(name_length).decode()
        if name in spans and kind == _DATA_ENTRY:
            offset, length = spans[name]
            file.seek(table + start + _ENTRY.size - _CONTENTS.size)
            file.write(_CONTENTS.pack(offset - contents, length))
            missing.discard(name)
        start += -(-size // _ENTRY_ALIGNMENT) * _ENTRY_ALIGNMENT
    if missing:
        raise LlmirError(f"IREE wrote no entry {min(missing)}")
