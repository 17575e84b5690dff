"""Reads checkpoints and writes packed, memory-mapped parameter archives."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmir_iree.params.archive import ArchiveEntry, ArchiveInfo, read_archive_index, write_archive
    from llmir_iree.params.checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from llmir_iree.params.errors import (
        BundleError,
        CompileError,
        LlmirError,
        ParameterError,
        RequestError,
        SourceError,
        TargetError,
    )
    from llmir_iree.params.formats import FORMATS, Plane, WeightFormat, split_planes
    from llmir_iree.params.layouts import LAYOUTS, Layout, layout_of
    from llmir_iree.params.plan import QUANT_CHOICES, PlannedWeight, WeightSpec, describe_conversions, plan_weights
    from llmir_iree.params.quantize import READABLE_ENCODINGS

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "QUANT_CHOICES",
    "READABLE_ENCODINGS",
    "ArchiveEntry",
    "ArchiveInfo",
    "BundleError",
    "Checkpoint",
    "CompileError",
    "Layout",
    "LlmirError",
    "ParameterError",
    "Plane",
    "PlannedWeight",
    "RequestError",
    "SourceError",
    "TargetError",
    "TensorInfo",
    "WeightFormat",
    "WeightSpec",
    "describe_conversions",
    "layout_of",
    "open_checkpoint",
    "plan_weights",
    "read_archive_index",
    "split_planes",
    "write_archive",
]

_HOMES = {
    "archive": ("ArchiveEntry", "ArchiveInfo", "read_archive_index", "write_archive"),
    "checkpoint": ("Checkpoint", "TensorInfo", "open_checkpoint"),
    "errors": (
        "BundleError",
        "CompileError",
        "LlmirError",
        "ParameterError",
        "RequestError",
        "SourceError",
        "TargetError",
    ),
    "formats": ("FORMATS", "Plane", "WeightFormat", "split_planes"),
    "layouts": ("LAYOUTS", "Layout", "layout_of"),
    "plan": ("QUANT_CHOICES", "PlannedWeight", "WeightSpec", "describe_conversions", "plan_weights"),
    "quantize": ("READABLE_ENCODINGS",),
}


def __getattr__(name: str) -> object:
    """Import on first use: who needs an exception only, as the runtime does, need not load the checkpoint readers."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
