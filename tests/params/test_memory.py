"""Files of weights are read from the disk into large pages, where the system has them."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest

from llmir_iree.params.memory import drop_from_memory, read_ahead

NBYTES = 8 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(NBYTES))
    return file


def resident_bytes(file: Path) -> int:
    """Bytes of a file that are in memory, as mincore tells."""
    pages = (ctypes.c_ubyte * (NBYTES // mmap.PAGESIZE))()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), NBYTES, access=mmap.ACCESS_COPY) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(NBYTES), pages)
        del start  # or the mapping cannot be closed
    assert not failed
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="pages are read ahead on Linux only")
def test_what_is_read_ahead_is_in_memory(weights: Path) -> None:
    drop_from_memory(weights)
    if resident_bytes(weights):
        pytest.skip(f"the file system of {weights.parent} keeps its files in memory")
    read_ahead(weights)
    assert resident_bytes(weights) == NBYTES


def test_a_file_keeps_its_contents(weights: Path) -> None:
    before = weights.read_bytes()
    drop_from_memory(weights)
    read_ahead(weights)
    assert weights.read_bytes() == before


def test_an_empty_file_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    read_ahead(tmp_path / "empty")


def test_a_file_that_is_not_there_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_ahead(tmp_path / "missing")
