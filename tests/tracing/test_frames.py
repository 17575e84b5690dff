"""Frames: what is read from any place is what was written there, and damage is told."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from llmir_iree.tracing.capture import CaptureError
from llmir_iree.tracing.frames import open_frames, write_frames

FRAME = 1000
TEXT = b"".join(b"line %d of a text that repeats itself\n" % (number % 97) for number in range(1500))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The text in frames that end within lines, written in pieces of any length."""
    source = random.Random(5)
    cuts = sorted({0, len(TEXT), *(source.randrange(len(TEXT)) for _ in range(40))})
    write_frames(tmp_path / "a.zst", [TEXT[a:b] for a, b in pairwise(cuts)], FRAME)
    return tmp_path / "a.zst"


@pytest.mark.parametrize("length", [0, 1, FRAME - 1, FRAME, FRAME + 1, 7 * FRAME])
def test_text_comes_back(tmp_path: Path, length: int) -> None:
    write_frames(tmp_path / "a.zst", [TEXT[:length]], FRAME)
    with open_frames(tmp_path / "a.zst") as stream:
        assert stream.read() == TEXT[:length]


def test_any_place_is_read_alone(file: Path) -> None:
    source = random.Random(6)
    with open_frames(file) as stream:
        for _ in range(200):
            begin, size = source.randrange(len(TEXT)), source.randrange(3 * FRAME)
            stream.seek(begin)
            assert stream.read(size) == TEXT[begin : begin + size]
            assert stream.tell() == min(begin + size, len(TEXT))
        stream.seek(-10, 2)
        assert stream.readline() == TEXT[-10:]
        assert stream.read() == b""


def test_other_programs_read_it_from_its_beginning(file: Path) -> None:
    with file.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as text:
        assert text.read() == TEXT


def test_a_file_that_was_written_anew_is_another(file: Path) -> None:
    with open_frames(file) as stream:
        assert stream.read(5) == TEXT[:5]
    write_frames(file, [b"something else, and shorter"], FRAME)
    with open_frames(file) as stream:
        assert stream.read() == b"something else, and shorter"


@pytest.mark.parametrize("kept", [0, 3, -1, -9, -200])
def test_a_torn_file_is_refused(file: Path, kept: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(CaptureError, match=r"a\.zst: torn"):
        open_frames(file)


def test_a_table_that_does_not_fit_is_refused(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:100] + data[200:])
    with pytest.raises(CaptureError, match="torn: its table names frames of another length"):
        open_frames(file)


def test_what_another_program_compressed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zst").write_bytes(zstandard.compress(TEXT))
    with pytest.raises(CaptureError, match="has to be unpacked first"):
        open_frames(tmp_path / "a.zst")


def test_a_damaged_frame_is_told_when_it_is_read(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 255
    file.write_bytes(data)
    with open_frames(file) as stream:
        stream.seek(5 * FRAME)
        assert stream.read(10) == TEXT[5 * FRAME : 5 * FRAME + 10]
        stream.seek(0)
        with pytest.raises(CaptureError, match=r"a\.zst: damaged at byte 0"):
            stream.read(10)
