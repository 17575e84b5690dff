"""What iree-compile makes of the flags of a target, before it compiles anything."""

from __future__ import annotations

import shlex
import subprocess
from functools import lru_cache

from iree.compiler.tools.binaries import find_tool

from llmir_iree.params.errors import CompileError

_TIMEOUT_S = 120


@lru_cache
def describe_target(flags: tuple[str, ...]) -> str:
    """An empty module as iree-compile hands it on: it names the device, with all that the compiler assumes of it.

    Raises:
        CompileError: iree-compile refuses the flags, or does not end.
    """
    command = [find_tool("iree-compile"), "-", "--compile-to=flow", *flags]
    repeat = f"(repeat with: echo 'module {{}}' | {shlex.join(command)})"
    try:
        done = subprocess.run(
            command, input="module {}", capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"iree-compile: no end after {_TIMEOUT_S} s {repeat}") from None
    if "#hal.executable.target" not in done.stdout:
        reason = done.stderr.strip() or f"names no executable target for {' '.join(flags)}"
        raise CompileError(f"iree-compile: {reason} {repeat}")
    return done.stdout
