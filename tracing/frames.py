"""Stores a long text in compressed frames, each of which is read without those before it.

The format is the seekable one of zstd: frames, and behind them, in one that other programs skip, a table of their
sizes. `zstdcat` reads such a file from its beginning to its end. The source of the format is
contrib/seekable_format/zstd_seekable_compression_format.md in zstd's repository.
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from llmir_iree.tracing.capture import CaptureError

# The larger a frame, the more it holds of what repeats, and the more has to be unpacked to read a line of it.
FRAME_BYTES = 32 << 20
_LEVEL = 12
_WINDOW_LOG = FRAME_BYTES.bit_length() - 1
# As many as a comparison of two texts goes back and forth between.
_FRAMES_REMEMBERED = 3
_BUFFER_BYTES = 1 << 20

_TABLE_MAGIC = 0x184D2A5E
_FOOTER_MAGIC = 0x8F92EAB1
_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")


def write_frames(file: Path, pieces: Iterable[bytes], frame_bytes: int = FRAME_BYTES) -> None:
    """Write a text that comes in pieces of any length.

    Args:
        file: to be written.
        pieces: the text.
        frame_bytes: length of a frame, unpacked; the last one is shorter.
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=_WINDOW_LOG, enable_ldm=True, write_checksum=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    sizes: list[tuple[int, int]] = []
    waiting = bytearray()
    with file.open("wb") as stream:

        def put(length: int) -> None:
            frame = compressor.compress(bytes(waiting[:length]))
            stream.write(frame)
            sizes.append((len(frame), min(length, len(waiting))))
            del waiting[:length]

        for piece in pieces:
            waiting += piece
            while len(waiting) >= frame_bytes:
                put(frame_bytes)
        if waiting:
            put(len(waiting))
        table = b"".join(_ENTRY.pack(*size) for size in sizes) + _FOOTER.pack(len(sizes), 0, _FOOTER_MAGIC)
        stream.write(_HEADER.pack(_TABLE_MAGIC, len(table)) + table)


def open_frames(file: Path) -> BinaryIO:
    """Open a file of frames for reading, from any place on.

    Raises:
        CaptureError: the file is torn, or was written by another program; later, a frame is damaged.
    """
    return cast(BinaryIO, io.BufferedReader(_FrameReader(file), _BUFFER_BYTES))


class _FrameReader(io.RawIOBase):
    """The text of a file of frames."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with file.open("rb") as stream:
            sizes = _read_table(file, stream)
        state = file.stat()
        self._version = (state.st_mtime_ns, state.st_size)
        self._packed = [0, *accumulate(packed for packed, _ in sizes)]
        self._plain = [0, *accumulate(plain for _, plain in sizes)]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._plain[-1]}[whence]
        self._position = max(begin + offset, 0)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # Narrower than any buffer.
        if self._position >= self._plain[-1] or not len(buffer):
            return 0
        index = bisect_right(self._plain, self._position) - 1
        begin, end = self._packed[index : index + 2]
        frame = _read_frame(self._file, self._version, begin, end - begin)
        begin = self._position - self._plain[index]
        piece = memoryview(frame)[begin : begin + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


@lru_cache(maxsize=_FRAMES_REMEMBERED)
def _read_frame(file: Path, _version: tuple[int, int], offset: int, size: int) -> bytes:
    """A frame, unpacked; a file that was written anew is another one."""
    with file.open("rb") as stream:
        stream.seek(offset)
        packed = stream.read(size)
    try:
        return zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise CaptureError(f"{file}: damaged at byte {offset}: {error}") from None


def _read_table(file: Path, stream: BinaryIO) -> list[tuple[int, int]]:
    """Bytes of each frame, packed and plain."""
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(end - _FOOTER.size, 0))
    footer = stream.read()
    count, descriptor, magic = _FOOTER.unpack(footer) if len(footer) == _FOOTER.size else (0, 0, 0)
    begin = end - _FOOTER.size - count * _ENTRY.size
    if magic != _FOOTER_MAGIC or descriptor != 0 or begin < _HEADER.size:
        raise CaptureError(
            f"{file}: torn, or not written by llmir-compile or llmir-trace: it has no table of frames at its end; "
            "a log that another program compressed has to be unpacked first"
        )
    stream.seek(begin)
    sizes = list(_ENTRY.iter_unpack(stream.read(count * _ENTRY.size)))
    if sum(packed for packed, _ in sizes) != begin - _HEADER.size:
        raise CaptureError(f"{file}: torn: its table names frames of another length")
    return [(packed, plain) for packed, plain in sizes]
