"""Writes a view beside its place and renames it, so that no half of one is ever found there."""

from __future__ import annotations

import os
from pathlib import Path

from llmir_iree.tracing.capture import CaptureError


def replace_file(output: Path, data: bytes) -> None:
    """Write a file, or replace it as a whole.

    Raises:
        CaptureError: there is no such folder, or it cannot be written to.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CaptureError(f"cannot write {output}: {error.strerror or error}") from error
