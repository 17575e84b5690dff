"""Tells how a module whose IR was dumped had been made: by which passes of the plugin, with which flags."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llmir_iree.bundle import Bundle, ModuleInfo
from llmir_iree.params.errors import LlmirError
from llmir_iree.tracing.capture import MANIFEST_NAME, Capture

# Beside the IR of each module in a folder that llmir-compile dumped.
MODULE_NAME = "module.json"


def find_module(source: Path, program: str = "") -> ModuleInfo | None:
    """What is known of a program in a capture or a dump; None if nothing is.

    A capture names the bundle it was made of, which has to be there still, with the same modules.
    """
    try:
        if (source / MANIFEST_NAME).is_file():
            manifest = Capture.open(source).manifest
            bundle = Bundle.open(Path(manifest.subject))
            hashes = set(manifest.modules.values())
            modules = [module for target in bundle.manifest.targets.values() for module in target.modules.values()]
            return next((module for module in modules if module.sha256 in hashes), None)
        return ModuleInfo.model_validate_json((source / program / MODULE_NAME).read_text(encoding="utf-8"))
    except (LlmirError, OSError, ValidationError):
        return None


def describe_difference(a: ModuleInfo | None, b: ModuleInfo | None) -> tuple[str, ...]:
    """How two modules were made in different ways, a line each; none if that is not known."""
    if a is None or b is None:
        return ()
    lines = []
    for what, ours, theirs in (("passes of the plugin", a.passes, b.passes), ("flags", a.flags, b.flags)):
        for side, here, there in (("A", ours, theirs), ("B", theirs, ours)):
            if only := [name for name in here if name not in there]:
                lines.append(f"{what} that only {side} was compiled with: {' '.join(only)}")
    return tuple(lines)
