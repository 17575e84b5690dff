"""Which format every weight of a model is stored in."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from llmir_iree.params.checkpoint import Checkpoint, TensorInfo
from llmir_iree.params.errors import ParameterError, SourceError
from llmir_iree.params.formats import FORMATS, WeightFormat
from llmir_iree.params.layouts import stored_shapes
from llmir_iree.params.quantize import READABLE_ENCODINGS

WeightKind = Literal["linear", "embedding", "vector"]

QUANT_CHOICES = ("keep", "q4_0", "q8_0", "f16", "bf16")
"""What linear weights may be asked to become; "keep" leaves every encoding that a bundle may hold."""

# Formats for weights whose own encoding a bundle cannot hold, best first: q8_0 loses least of the block formats that
# can be written, f16 takes rows of any length.
_FALLBACKS = ("q8_0", "f16")


@dataclass(frozen=True)
class WeightSpec:
    """A weight that a model wants.

    Attributes:
        name: the transformers parameter name, which is also its name in the archive.
        shape: [out, in] for a matrix, [n] for a vector.
        kind: "linear" for the operand of a matmul (a tied table as well), "embedding" for a table that is only looked
            up, "vector" for norms and biases.
    """

    name: str
    shape: tuple[int, ...]
    kind: WeightKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(WeightKind):
            raise ValueError(f"{self.name}: kind {self.kind!r} is none of {', '.join(get_args(WeightKind))}")
        rank = 1 if self.kind == "vector" else 2
        if len(self.shape) != rank or min(self.shape) < 1:
            raise ValueError(f"{self.name}: a {self.kind} has {rank} positive dimensions, not {self.shape}")


@dataclass(frozen=True)
class PlannedWeight:
    """A weight, how its source encodes it, and the format (a key of FORMATS) that the archive holds it in."""

    spec: WeightSpec
    encoding: str
    format: str

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"{self.spec.name}: format {self.format!r} is none of {', '.join(FORMATS)}")
        if self.spec.kind == "vector" and self.format != "f32":
            raise ValueError(f"{self.spec.name}: a vector is stored as f32, not {self.format}")
        if not self.weight_format.accepts(self.spec.shape[-1]):
            raise ValueError(f"{self.spec.name}: rows of {self.spec.shape[-1]} are no whole blocks of {self.format}")

    @property
    def weight_format(self) -> WeightFormat:
        """The format as FORMATS describes it."""
        return FORMATS[self.format]

    @property
    def converted(self) -> bool:
        """Whether the stored bits are not the source's."""
        return self.format != self.encoding

    @property
    def planes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of every archive entry of this weight by its key, in the layout of its format.

        The keys are "<name>.<plane>", and just the name for a vector.
        """
        if self.spec.kind == "vector":
            return {self.spec.name: (np.dtype(np.float32), self.spec.shape)}
        shapes = stored_shapes(self.format, *self.spec.shape)
        return {f"{self.spec.name}.{p.name}": (p.dtype, shapes[p.name]) for p in self.weight_format.planes}

    @property
    def entry_bytes(self) -> dict[str, int]:
        """Bytes of every archive entry of this weight by its key, rows that fill a tile included."""
        return {key: dtype.itemsize * math.prod(shape) for key, (dtype, shape) in self.planes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes that the archive holds of it."""
        return sum(self.entry_bytes.values())


def plan_weights(checkpoint: Checkpoint, specs: Iterable[WeightSpec], quant: str = "keep") -> tuple[PlannedWeight, ...]:
    """Choose a format for every weight that a model wants; tensors that it does not want are left out.

    Args:
        checkpoint: where the weights come from.
        specs: the weights, in the order in which the archive shall hold them.
        quant: one of QUANT_CHOICES. "keep" keeps linear weights bit for bit where FORMATS has their encoding. Any other
            choice is the format of all linear weights. Weights that have no such format become q8_0, or f16 where a
            row is not a whole number of blocks. Embeddings are always kept in this sense, vectors are always f32.

    Raises:
        ParameterError: a tensor is missing, listed twice, or of another shape.
        SourceError: `quant` is unknown, or a tensor's encoding cannot be read.
    """
    if quant not in QUANT_CHOICES:
        raise SourceError(f"unknown quantization {quant!r}; valid are {', '.join(QUANT_CHOICES)}")
    specs = tuple(specs)
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise ParameterError(f"the model lists tensor {name} {count} times")
    return tuple(_plan_weight(checkpoint, spec, quant) for spec in specs)


def describe_conversions(plan: Sequence[PlannedWeight]) -> list[str]:
    """Say what is not stored as it was found, one line a pair of formats: "q5_0 -> q8_0: 24 tensors".

    Vectors are left out: their float32 is a convention, not a loss.
    """
    pairs = Counter((weight.encoding, weight.format) for weight in plan if weight.converted and _is_matrix(weight))
    return [
        f"{encoding} -> {stored}: {count} tensor{'s' if count > 1 else ''}"
        for (encoding, stored), count in sorted(pairs.items())
    ]


def _is_matrix(weight: PlannedWeight) -> bool:
    return weight.spec.kind != "vector"


def _plan_weight(checkpoint: Checkpoint, spec: WeightSpec, quant: str) -> PlannedWeight:
    info = _find(checkpoint, spec)
    if spec.kind == "vector":
        return PlannedWeight(spec, info.encoding, "f32")
    wanted = info.encoding if quant == "keep" or spec.kind == "embedding" else quant
    columns = spec.shape[-1]
    stored = next(name for name in (wanted, *_FALLBACKS) if name in FORMATS and FORMATS[name].accepts(columns))
    return PlannedWeight(spec, info.encoding, stored)


def _find(checkpoint: Checkpoint, spec: WeightSpec) -> TensorInfo:
    info = checkpoint.tensors.get(spec.name)
    if info is None:
        close = difflib.get_close_matches(spec.name, checkpoint.tensors, n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ParameterError(f"{checkpoint.source} has no tensor {spec.name}{hint}")
    if info.shape != spec.shape:
        raise ParameterError(
            f"{checkpoint.source}: tensor {spec.name} has shape {list(info.shape)}, the model needs {list(spec.shape)}"
        )
    if info.encoding not in READABLE_ENCODINGS:
        raise SourceError(
            f"{checkpoint.source}: tensor {spec.name} is stored as {info.encoding}, which holds no weights; "
            f"readable are {', '.join(sorted(READABLE_ENCODINGS))}"
        )
    return info
