"""A GGUF file of llama.cpp: one mapped file that holds metadata, tokenizer and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmir_iree.params.checkpoint import Checkpoint, TensorInfo, require_plain_dtype
from llmir_iree.params.errors import SourceError
from llmir_iree.params.quantize import PLAIN_ENCODINGS, READABLE_ENCODINGS, dequantize
from llmir_iree.params.sources.gguf_config import Metadata, transformers_config
from llmir_iree.params.sources.gguf_header import GgufTensor, read_header

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<part>weight|bias)", re.ASCII)

_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_FREQUENCIES = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # old files repeat what the config says


class GgufCheckpoint(Checkpoint):
    """A GGUF file under the names, the row order and the config of transformers; blocks keep their bits."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Map the file, check its header, and translate it.

        Raises:
            SourceError: the file is damaged, is one part of several, or its architecture is not supported.
        """
        self.source = str(path)
        # An empty file cannot be mapped. Read-only, since Linux refuses writable private mappings larger than memory.
        self._data = np.asarray(np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8))
        header = read_header(self._data.data, self.source)
        self.metadata = header.metadata
        fields = Metadata(header.metadata, self.source)
        parts = fields.count("split.count", 1)
        if parts > 1:
            raise SourceError(f"{path} is one of {parts} parts; merge them: llama-gguf-split --merge {path} out.gguf")
        rope_factors = header.tensors.get(_ROPE_FACTORS)
        self._names = self._translate_names(header.tensors, fields.architecture)
        self.config: dict[str, Any] = transformers_config(
            fields,
            {name: tensor.shape for name, tensor in header.tensors.items()},
            None if rope_factors is None else self._read_rope_factors(rope_factors),
        )
        self._permuted_heads = self._find_permuted_heads() if fields.architecture == "llama" else {}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: TensorInfo(name, t.shape, t.encoding, t.nbytes) for name, t in self._names.items()}
        )

    def read_rows(self, name: str, start: int, stop: int | None) -> npt.NDArray[Any]:
        """Return some rows of a tensor: a view, or a copy where the file's row order is not the model's."""
        self.info(name)
        rows = self._stored_rows(self._names[name])
        heads = self._permuted_heads.get(name)
        return rows[start:stop] if heads is None else rows[_row_order(len(rows), heads)[start:stop]]

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer that the metadata describes."""
        from llmir_iree.params.sources.gguf_tokenizer import write_tokenizer

        write_tokenizer(Metadata(self.metadata, self.source), folder)

    def close(self) -> None:
        """Drop the mapping; it ends with the last array that was read."""
        self._data = np.empty(0, np.uint8)

    def _stored_rows(self, tensor: GgufTensor) -> npt.NDArray[Any]:
        """Return a tensor in the file's own row order."""
        data = self._data[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.encoding in READABLE_ENCODINGS - PLAIN_ENCODINGS:
            return data.reshape(-1, tensor.row_bytes)
        info = TensorInfo(tensor.name, tensor.shape, tensor.encoding, tensor.nbytes)
        return data.view(require_plain_dtype(self.source, info)).reshape(tensor.shape)

    def _read_rope_factors(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        return dequantize(self._stored_rows(tensor), tensor.encoding, tensor.shape)

    def _translate_names(self, tensors: Mapping[str, GgufTensor], architecture: str) -> dict[str, GgufTensor]:
        """Give every parameter its transformers name; a tensor that has none would silently change the model."""
        names = {}
        for name, tensor in tensors.items():
            if name == _ROPE_FACTORS or _ROPE_FREQUENCIES.fullmatch(name):
                continue
            translated = _translate(name)
            if translated is None:
                raise SourceError(f"{self.source}: tensor {name} has no place in a {architecture} model")
            names[translated] = tensor
        return names

    def _find_permuted_heads(self) -> dict[str, int]:
        """Map every tensor that llama.cpp's converter permutes to the number of its heads.

        The converter moves rows of q and k within each head so that rope pairs neighbours (2i, 2i + 1) instead of
        halves (i, i + head_dim / 2); source: `LlamaModel.permute` in convert_hf_to_gguf.py.
        """
        heads = {}
        for name, tensor in self._names.items():
            if match := re.search(r"\.self_attn\.([qk])_proj\.", name):
                count = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
                if tensor.shape[0] != count * self.config["head_dim"] or self.config["head_dim"] % 2:
                    raise SourceError(
                        f"{self.source}: tensor {tensor.name} has {tensor.shape[0]} rows, not {count} heads of an "
                        f"even size of {self.config['head_dim']}"
                    )
                if len(tensor.shape) == 1 and tensor.encoding not in PLAIN_ENCODINGS:
                    raise SourceError(f"{self.source}: tensor {tensor.name} is a bias stored as {tensor.encoding}")
                heads[name] = count
        return heads


def _translate(name: str) -> str | None:
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        return None
    layer, module, part = match["layer"], match["module"], match["part"]
    if layer is None:
        return f"{_TOP_NAMES[module]}.{part}" if module in _TOP_NAMES else None
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[module]}.{part}" if module in _LAYER_NAMES else None


def _row_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """The file's row for each row of the model."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
