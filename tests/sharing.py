"""Folders that all processes of a session share: with pytest-xdist each worker has fixtures of its own."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder, and whether it is there to be read: else the block fills it, while other processes wait."""
    session = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # The folder above those of the workers.
    folder, filled = session / name, session / f".{name}.filled"
    with (session / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_filled = filled.exists()
        folder.mkdir(exist_ok=True)
        yield folder, is_filled
        filled.touch()
