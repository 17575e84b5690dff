"""A Hugging Face folder: config.json, tokenizer files, and model.safetensors or its shards.

Source of the layout: the README of the safetensors project, section "Format".
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from llmir_iree.params.checkpoint import Checkpoint, TensorInfo, require_plain_dtype
from llmir_iree.params.errors import SourceError
from llmir_iree.params.sources.companions import check_config, copy_tokenizer, read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit
_DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """A tensor and where in which file its bytes begin."""

    info: TensorInfo
    file: Path
    offset: int


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder whose shards are mapped one tensor at a time."""

    kind = "safetensors"

    def __init__(self, folder: Path, source: str | None = None) -> None:
        """Check every header of the folder.

        Args:
            folder: holds config.json and the weights.
            source: what messages call it; the folder unless told.

        Raises:
            SourceError: a file is missing, damaged, or not where the index may name it.
        """
        self.source = source or str(folder)
        self.folder = folder
        self._stored = _find_tensors(folder)
        self.config = check_config(read_json(folder / "config.json"), str(folder / "config.json"))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({n: s.info for n, s in self._stored.items()})

    def read_rows(self, name: str, start: int, stop: int | None) -> npt.NDArray[Any]:
        """Map a tensor and return some of its rows as a view."""
        dtype = require_plain_dtype(self.source, self.info(name))
        stored = self._stored[name]
        if not stored.info.nbytes:  # an empty mapping is an error to the kernel
            return np.empty(stored.info.shape, dtype)
        # The bytes are mapped and then viewed: a memmap refuses dtypes that it does not know, such as bfloat16.
        data = np.memmap(stored.file, np.uint8, "r", stored.offset, (stored.info.nbytes,))
        array = np.asarray(data).view(dtype).reshape(stored.info.shape)
        return array[start:stop] if array.ndim else array

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the folder's tokenizer files."""
        copy_tokenizer(self.folder, folder)

    def close(self) -> None:
        """Do nothing: only arrays that were read hold files open."""


def _find_tensors(folder: Path) -> dict[str, _Stored]:
    if (folder / _INDEX).is_file():
        return _read_index(folder)
    if (folder / _SINGLE).is_file():
        return read_safetensors_header(folder / _SINGLE)
    raise SourceError(f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}")


def _read_index(folder: Path) -> dict[str, _Stored]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map")
    shards: dict[str, dict[str, _Stored]] = {}
    for name, shard in weight_map.items():
        # Only a bare file name: "..", "a/b" and "/etc/x" would all lead out of the folder.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise SourceError(f"{index}: tensor {name} is said to be in {shard!r}, which is no file of this folder")
        if shard not in shards:
            if not (folder / shard).is_file():
                raise SourceError(f"{index} names the shard {shard}, which does not exist")
            shards[shard] = read_safetensors_header(folder / shard)
        if name not in shards[shard]:
            raise SourceError(f"{index}: tensor {name} is said to be in {shard}, which does not hold it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_safetensors_header(path: Path) -> dict[str, _Stored]:
    """Read and check the header of one file.

    Raises:
        SourceError: the header is too long, is no JSON object, or describes tensors that the file cannot hold.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SourceError(f"{path} is truncated: {size} bytes cannot hold a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER, size - 8):
            raise SourceError(
                f"{path} is damaged: a header of {length} bytes in a file of {size} (at most {_MAX_HEADER})"
            )
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path} is damaged: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise SourceError(f"{path} is damaged: its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    start = 8 + length
    stored = {name: _check_tensor(path, name, entry, start, size) for name, entry in header.items()}
    spans = sorted((s.offset, s.offset + s.info.nbytes, s.info.name) for s in stored.values() if s.info.nbytes)
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise SourceError(f"{path} is damaged: tensors {name} and {other} overlap at byte {begin}")
    return stored


def _check_tensor(path: Path, name: str, entry: Any, start: int, size: int) -> _Stored:
    if not isinstance(entry, dict):
        raise SourceError(f"{path} is damaged: tensor {name} is described by a JSON {type(entry).__name__}")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise SourceError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; known are {', '.join(_DTYPE_BITS)}")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise SourceError(f"{path} is damaged: tensor {name} has shape {shape} and data_offsets {span}")
    begin, end = span
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if (end - begin) * 8 != bits:
        raise SourceError(
            f"{path} is damaged: tensor {name} of shape {shape} in {dtype} needs {bits // 8} bytes, has {end - begin}"
        )
    if start + end > size:
        raise SourceError(f"{path} is truncated: tensor {name} ends at byte {start + end}, the file at {size}")
    return _Stored(TensorInfo(name, tuple(shape), dtype.lower(), end - begin), path, start + begin)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # bool is an int to Python but not to JSON
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
