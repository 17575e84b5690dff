"""The header of a GGUF file, every length of it checked against the file before it is believed.

The `gguf` package walks a header on trust: an array said to hold 2^63 elements keeps it busy forever. It is also slow,
seconds for a vocabulary of 50,000. So this module reads the header itself.

Source of the layout: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np

from llmir_iree.params.errors import SourceError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_NESTING = 4
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_MIN_FIELD = 8 + 4 + 1  # key length, value type, the shortest value
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8  # name length, rank, one dimension, type, offset


@dataclass(frozen=True)
class GgufTensor:
    """A tensor by its GGUF name: shape in torch order, byte offset in the file, bytes of all and of one row."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (numbers, strings, bools, lists of these) and tensors of a GGUF file, both by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_header(data: memoryview, source: str) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Args:
        data: the whole file, mapped.
        source: its name, for messages.

    Raises:
        SourceError: the file is no little-endian GGUF of version 2 or 3, is damaged, or is truncated.
    """
    return _Walker(data, source).header()


class _Walker:
    """A position in the file that never moves past its end."""

    def __init__(self, data: memoryview, source: str) -> None:
        self.data = data
        self.source = source
        self.size = len(data)
        self.at = 0

    def fail(self, message: str) -> SourceError:
        return SourceError(f"{self.source} is damaged or truncated: {message}")

    def skip(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` bytes and return where they began."""
        if nbytes > self.size - self.at:
            raise self.fail(f"{what} needs {nbytes} bytes, {self.size - self.at} are left")
        start, self.at = self.at, self.at + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        """Read one little-endian scalar by its struct code."""
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        start = self.skip(length, what)
        return self.decode(start, self.at, what)

    def decode(self, start: int, stop: int, what: str) -> str:
        try:
            return str(self.data[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({error.reason} at byte {start + error.start})") from None

    def count(self, number: int, least: int, what: str) -> int:
        """Believe in `number` things only if the rest of the file could hold them at `least` bytes each."""
        if number * least > self.size - self.at:
            raise self.fail(f"{what} has {number} elements, {self.size - self.at} bytes are left")
        return number

    def header(self) -> GgufHeader:
        if bytes(self.data[:4]) != _MAGIC:
            raise SourceError(f"{self.source} is no GGUF file: it begins with {bytes(self.data[:4])!r}, not {_MAGIC!r}")
        self.at = 4
        version = self.number("I", "the version")
        if version not in _VERSIONS:
            big = version & 0xFFFF == 0 and version != 0
            raise SourceError(
                f"{self.source} is "
                + ("a big-endian GGUF file" if big else f"GGUF version {version}")
                + "; readable are little-endian versions 2 and 3"
            )
        tensor_count = self.number("Q", "the number of tensors")
        field_count = self.number("Q", "the number of metadata fields")
        self.count(tensor_count, _MIN_TENSOR, "the tensor table")
        metadata = self.fields(self.count(field_count, _MIN_FIELD, "the metadata"))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        tensors = self.tensors(self.count(tensor_count, _MIN_TENSOR, "the tensor table"), alignment)
        return GgufHeader(MappingProxyType(metadata), MappingProxyType(tensors))

    def fields(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(count):
            key = self.text(f"the key of metadata field {number}")
            if key in metadata:
                raise self.fail(f"metadata field {key} occurs twice")
            metadata[key] = self.value(self.number("I", f"the type of {key}"), key)
        return metadata

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        if kind not in _SCALARS:
            raise self.fail(f"metadata field {key} has the unknown type {kind}")
        value = self.number(_SCALARS[kind], key)
        return value != 0 if kind == _BOOL else value

    def array(self, key: str, depth: int) -> list[Any]:
        if depth > _MAX_NESTING:
            raise self.fail(f"metadata field {key} nests arrays more than {_MAX_NESTING} deep")
        kind = self.number("I", f"the element type of {key}")
        count = self.number("Q", f"the length of {key}")
        if kind == _STRING:
            return self.strings(self.count(count, 8, key), key)
        if kind == _ARRAY:
            return [self.array(key, depth + 1) for _ in range(self.count(count, 12, key))]
        if kind not in _SCALARS:
            raise self.fail(f"metadata field {key} has elements of the unknown type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        start = self.skip(self.count(count, dtype.itemsize, key) * dtype.itemsize, key)
        values: list[Any] = np.frombuffer(self.data, dtype, count, start).tolist()
        return [value != 0 for value in values] if kind == _BOOL else values

    def strings(self, count: int, key: str) -> list[str]:
        # Written out, since vocabularies run to hundreds of thousands and each call would cost more than the work.
        unpack, data, size, at = struct.Struct("<Q").unpack_from, self.data, self.size, self.at
        values = []
        for number in range(count):
            if at + 8 > size:
                raise self.fail(f"element {number} of {key} begins at byte {at}, the file ends at {size}")
            stop = at + 8 + unpack(data, at)[0]
            if stop > size:
                raise self.fail(f"element {number} of {key} ends at byte {stop}, the file at {size}")
            values.append(self.decode(at + 8, stop, f"element {number} of {key}"))
            at = stop
        self.at = at
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for number in range(count):
            tensor = self.tensor(number)
            if tensor.name in tensors:
                raise self.fail(f"tensor {tensor.name} occurs twice")
            tensors[tensor.name] = tensor
        start = -(-self.at // alignment) * alignment
        return {name: self.place(tensor, start, alignment) for name, tensor in tensors.items()}

    def tensor(self, number: int) -> GgufTensor:
        """Read one row of the tensor table; its offset still counts from the start of the data."""
        name = self.text(f"the name of tensor {number}")
        rank = self.number("I", f"the rank of tensor {name}")
        if not 1 <= rank <= _MAX_DIMS:
            raise self.fail(f"tensor {name} has {rank} dimensions, valid are 1 to {_MAX_DIMS}")
        shape = tuple(self.number("Q", f"the shape of tensor {name}") for _ in range(rank))[::-1]
        if min(shape) < 1 or math.prod(shape) >= 1 << 63:
            raise self.fail(f"tensor {name} has shape {list(shape)}, {math.prod(shape)} elements of at most 2^63 - 1")
        raw = self.number("I", f"the type of tensor {name}")
        try:
            kind = gguf.GGMLQuantizationType(raw)
        except ValueError:
            raise self.fail(f"tensor {name} has the unknown type {raw}") from None
        offset = self.number("Q", f"the offset of tensor {name}")
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise self.fail(f"tensor {name} has rows of {shape[-1]} in {kind.name}, whose blocks hold {block_size}")
        row_bytes = shape[-1] // block_size * block_bytes
        nbytes = math.prod(shape[:-1]) * row_bytes
        return GgufTensor(name, shape, kind.name.lower(), offset, nbytes, row_bytes)

    def place(self, tensor: GgufTensor, start: int, alignment: int) -> GgufTensor:
        if tensor.offset % alignment:
            raise self.fail(f"tensor {tensor.name} has the offset {tensor.offset}, the alignment is {alignment}")
        end = start + tensor.offset + tensor.nbytes
        if end > self.size:
            raise self.fail(f"tensor {tensor.name} ends at byte {end}, the file at {self.size}")
        return GgufTensor(
            tensor.name, tensor.shape, tensor.encoding, start + tensor.offset, tensor.nbytes, tensor.row_bytes
        )
