"""Reads checkpoints and writes packed, memory-mapped parameter archives."""

from .archive import ArchiveEntry, ArchiveInfo, read_archive_index, write_archive
from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .errors import BundleError, CompileError, LlmirError, ParameterError, RequestError, SourceError, TargetError
from .formats import FORMATS, LAYOUT, LAYOUT_VERSION, Plane, WeightFormat, split_planes
from .plan import QUANT_CHOICES, PlannedWeight, WeightSpec, describe_conversions, plan_weights
from .quantize import READABLE_ENCODINGS, dequantize, quantize

__all__ = [
    "FORMATS",
    "LAYOUT",
    "LAYOUT_VERSION",
    "QUANT_CHOICES",
    "READABLE_ENCODINGS",
    "ArchiveEntry",
    "ArchiveInfo",
    "BundleError",
    "Checkpoint",
    "CompileError",
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
    "dequantize",
    "describe_conversions",
    "open_checkpoint",
    "plan_weights",
    "quantize",
    "read_archive_index",
    "split_planes",
    "write_archive",
]
