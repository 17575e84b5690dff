"""A state dict that `torch.save` wrote: .pt, .pth or .bin."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy.typing as npt

from llmir_iree.params.checkpoint import Checkpoint, TensorInfo, require_plain_dtype
from llmir_iree.params.errors import SourceError
from llmir_iree.params.sources.companions import check_config, copy_tokenizer, read_json

if TYPE_CHECKING:
    import torch

_NESTED_KEYS = ("model", "state_dict", "model_state_dict")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_ENCODINGS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class StateDictCheckpoint(Checkpoint):
    """A state dict that torch maps into memory; no code of the file is ever run."""

    kind = "state_dict"

    def __init__(self, path: Path, config: Path | None = None) -> None:
        """Map the file and list its tensors.

        Args:
            path: a file of torch.save's zip format.
            config: a config.json, if none is beside the file or inside it.

        Raises:
            SourceError: the file is no state dict, would run code, cannot be mapped, or has no config.
        """
        self.source = str(path)
        self.folder = path.parent
        tensors, inner_config = _split(_load(path), self.source)
        self._tensors = _strip_prefixes(tensors)
        self.config = _find_config(path, config, inner_config)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _describe(name, tensor) for name, tensor in self._tensors.items()}
        )

    def read_rows(self, name: str, start: int, stop: int | None) -> npt.NDArray[Any]:
        """Return some rows of a tensor as a view of the mapped file."""
        import torch

        dtype = require_plain_dtype(self.source, self.info(name))
        tensor = self._tensors[name].detach()
        if tensor.ndim:
            tensor = tensor[start:stop]
        if dtype == ml_dtypes.bfloat16:  # torch hands no bfloat16 to numpy; its bits it does
            return tensor.contiguous().view(torch.uint16).numpy().view(dtype)
        return tensor.contiguous().numpy()

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer files that stand beside the state dict."""
        try:
            copy_tokenizer(self.folder, folder)
        except SourceError as error:
            raise SourceError(f"a state dict holds no tokenizer, and {error}") from error

    def close(self) -> None:
        """Drop the tensors, and with the last array the mapping."""
        self._tensors = {}


def _load(path: Path) -> Any:
    import torch

    if not _is_stored_zip(path):
        raise SourceError(
            f"{path} is not in torch.save's zip format and cannot be mapped; re-save it: "
            f"torch.save(torch.load(old, weights_only=True), new)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises anything at all on damaged input
        unsafe = "weights_only" in str(error).lower()
        what = "holds Python objects other than tensors, which are never run" if unsafe else "is damaged"
        raise SourceError(f"{path} {what}; a checkpoint is a dict of tensors") from error


def _is_stored_zip(path: Path) -> bool:
    """Whether the file is a zip whose members are stored plain, so that mapped bytes are tensor bytes."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise SourceError(f"{path} is damaged or truncated: {error}") from None
        return False
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.header_offset + member.file_size > size:
            raise SourceError(f"{path} is damaged: its member {member.filename} is not stored plainly inside the file")
    return True


def _split(loaded: Any, source: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Tell the tensors of a loaded file from the config beside them."""
    if not isinstance(loaded, dict):
        raise SourceError(f"{source} holds a {type(loaded).__name__}, not a state dict")
    candidates = [loaded, *(loaded[key] for key in _NESTED_KEYS if isinstance(loaded.get(key), dict))]
    for candidate in candidates:
        if tensors := {name: value for name, value in candidate.items() if _is_weight(name, value)}:
            return tensors, loaded.get("config")
    raise SourceError(f"{source} holds no tensors, neither at its top nor under {', '.join(_NESTED_KEYS)}")


def _is_weight(name: Any, value: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _strip_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while prefix := next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _find_config(path: Path, given: Path | None, inner: Any) -> dict[str, Any]:
    if given is not None:
        return check_config(read_json(given), str(given))
    beside = path.parent / "config.json"
    if beside.is_file():
        return check_config(read_json(beside), str(beside))
    if isinstance(inner, dict):
        return check_config(inner, f'"config" inside {path}')
    raise SourceError(
        f"{path} has no config: give one (--config FILE), put config.json beside it, or save it under "
        '"config" inside it'
    )


def _describe(name: str, tensor: torch.Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    encoding = _ENCODINGS.get(dtype, dtype)
    return TensorInfo(name, tuple(tensor.shape), encoding, tensor.numel() * tensor.element_size())
