"""What every checkpoint looks like to the rest of the package, whatever file it came from."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llmir_iree.params.errors import ParameterError, SourceError

STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin")
VALID_SOURCES = (
    "a .gguf file, a state dict (.pt, .pth, .bin), a Hugging Face folder (config.json beside *.safetensors) "
    "or a hub id such as org/name"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: the transformers parameter name, such as "model.layers.0.self_attn.q_proj.weight".
        shape: in torch order, [out, in] for a matrix.
        encoding: "f32", "f16", "bf16" or a lower-case GGUF type ("q4_1", "iq4_nl"); types that are no weights
            ("i64") are listed as well and refused when read.
        nbytes: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    nbytes: int

    def __post_init__(self) -> None:
        if any(dim < 0 for dim in self.shape) or self.nbytes < 0:
            raise ValueError(f"tensor {self.name} has a negative size: shape {self.shape}, {self.nbytes} bytes")


class Checkpoint(ABC):
    """A model's config, tensors and tokenizer, read lazily from files that stay memory mapped.

    Attributes:
        source: what the user named, for messages.
        kind: "gguf", "safetensors" or "state_dict".
        config: the content of a transformers config.json, `model_type` included.
        tensors: every tensor by name.
    """

    source: str
    kind: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor.

        Returns:
            Plain encodings: an array of the tensor's shape in float32, float16 or ml_dtypes.bfloat16. Block encodings:
            uint8 [rows, bytes of a row]. A view of the mapped file wherever the file's order is the model's.

        Raises:
            ParameterError: the checkpoint has no such tensor.
            SourceError: the tensor's type is not one that holds weights.
        """
        return self.read_rows(name, 0, None)

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int | None) -> npt.NDArray[Any]:
        """Read `read(name)[start:stop]` without touching the other rows."""

    @abstractmethod
    def save_tokenizer(self, folder: Path) -> None:
        """Leave tokenizer.json, tokenizer_config.json and, where there is one, generation_config.json in `folder`.

        tokenizer_config.json holds the chat template and the names of the special tokens as plain strings.

        Raises:
            SourceError: the checkpoint has no tokenizer; the message says what is missing.
        """

    def info(self, name: str) -> TensorInfo:
        """Look a tensor up; an unknown name is a ParameterError."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ParameterError(f"{self.source} has no tensor {name}") from None

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; arrays that were read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(source: str | os.PathLike[str], *, config: Path | None = None) -> Checkpoint:
    """Open a checkpoint of any kind; nothing but headers is read.

    Args:
        source: a .gguf file, a state dict (.pt, .pth, .bin), a Hugging Face folder, or a hub id "org/name".
        config: a config.json for a state dict that has none inside or beside it.

    Raises:
        SourceError: the source is missing, of no known kind, damaged, or of an unsupported architecture.
    """
    try:
        return _open(source, config)
    except OSError as error:
        raise SourceError(f"{source} cannot be read: {error.strerror or error}") from error


def _open(source: str | os.PathLike[str], config: Path | None) -> Checkpoint:
    path = Path(source)
    suffix = path.suffix.lower()
    if config is not None and suffix not in STATE_DICT_SUFFIXES:
        raise SourceError(f"{source} brings its own config; a config file goes only with a state dict")
    if path.is_dir():
        from llmir_iree.params.sources.safetensors_folder import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.is_file():
        if suffix == ".gguf":
            from llmir_iree.params.sources.gguf_file import GgufCheckpoint

            return GgufCheckpoint(path)
        if suffix in STATE_DICT_SUFFIXES:
            from llmir_iree.params.sources.state_dict import StateDictCheckpoint

            return StateDictCheckpoint(path, config)
        if suffix == ".safetensors":
            raise SourceError(
                f"{source} is one file of a checkpoint; pass the folder that holds it and its config.json"
            )
        raise SourceError(f"{source} is of no known kind; a checkpoint is {VALID_SOURCES}")
    if suffix not in (".gguf", ".safetensors", *STATE_DICT_SUFFIXES) and _HUB_ID.fullmatch(os.fspath(source)):
        from llmir_iree.params.sources.hub import download_checkpoint
        from llmir_iree.params.sources.safetensors_folder import SafetensorsCheckpoint

        return SafetensorsCheckpoint(download_checkpoint(os.fspath(source)), source=os.fspath(source))
    raise SourceError(f"{source} does not exist; a checkpoint is {VALID_SOURCES}")


def require_plain_dtype(source: str, info: TensorInfo) -> np.dtype[Any]:
    """Return the numpy dtype of a plain weight, or say that its encoding holds none."""
    import ml_dtypes

    dtypes: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    if info.encoding not in dtypes:
        raise SourceError(
            f"{source}: tensor {info.name} is stored as {info.encoding}; weights must be f32, f16 or bf16"
        )
    dtype: np.dtype[Any] = np.dtype(dtypes[info.encoding])
    return dtype
