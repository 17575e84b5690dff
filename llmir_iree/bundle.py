"""The bundle: a folder that holds one exported model, and the manifest that describes it.

The manifest is the only thing that the runtime, the tracer and the command lines believe about a bundle. This file is
its one reader and its one writer; a manifest of another version, or with a field that this version does not know, is
refused.

    BUNDLE/
      manifest.json
      prefill.mlir  decode.mlir        portable: `llmir` ops, no weights
      prefill_chunk.mlir               the same as prefill.mlir, for a fixed number of new tokens
      params.irpa                      every weight, packed, memory mapped by both modules
      tokenizer/                       tokenizer.json, tokenizer_config.json
      <target>/prefill.vmfb  <target>/decode.vmfb
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmir_iree.params.errors import BundleError
from llmir_iree.params.layouts import LAYOUTS
from llmir_iree.params.siblings import merged_name

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 3
PARAMETERS_NAME = "params.irpa"
PARAMETER_SCOPE = "model"
TOKENIZER_FOLDER = "tokenizer"

Phase = Literal["prefill", "prefill_chunk", "decode"]
"""What a module does; a `prefill_chunk` is a prefill of a fixed number of columns, which a bundle may lack."""

PHASES: tuple[Phase, ...] = ("prefill", "decode")
"""The phases that every bundle has."""

PrefillPhase = Literal["prefill", "prefill_chunk"]
CacheDtype = Literal["f16", "bf16", "f32"]
CACHE_ITEM_BYTES: dict[CacheDtype, int] = {"f16": 2, "bf16": 2, "f32": 4}


class _Record(BaseModel):
    """A part of the manifest: immutable, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(_Record):
    """What the runtime needs to know of the model."""

    name: str
    model_type: str
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_seq_len: int = Field(gt=1)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class CacheInfo(_Record):
    """The paged cache: one tensor [pages, layers, 2, kv_heads, page_size, head_dim]; dimension 2 is key, value."""

    dtype: CacheDtype
    page_size: int = Field(gt=0)
    page_shape: tuple[int, int, int, int, int]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers together."""
        elements = 1
        for dimension in self.page_shape:
            elements *= dimension
        return elements * CACHE_ITEM_BYTES[self.dtype]

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of this many tokens occupies."""
        return -(-tokens // self.page_size)


class TensorType(_Record):
    """An argument or a result of a function; a dimension that varies is named by a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FunctionInfo(_Record):
    """One exported function.

    Every function takes (tokens [batch, seq], starts [batch], lengths [batch], page_table [batch, table], cache) and
    gives (logits [batch, vocab], next_token [batch], cache): see `llmir_iree.export.step` for what they mean.
    """

    name: str
    phase: Phase
    batch_size: int = Field(gt=0)
    arguments: tuple[TensorType, ...]
    results: tuple[TensorType, ...]

    @property
    def columns(self) -> int | None:
        """New tokens of a row that the function takes, padding included; None for any number."""
        tokens = next((argument for argument in self.arguments if argument.name == "tokens"), None)
        columns = None if tokens is None else tokens.shape[1]
        return columns if isinstance(columns, int) else None


class LayoutInfo(_Record):
    """The order of the planes of a weight format, see `llmir_iree.params.layouts`."""

    name: str
    version: int

    @model_validator(mode="after")
    def _check_known(self) -> LayoutInfo:
        known = LAYOUTS.get(self.name)
        if known is None or known.version != self.version:
            readable = ", ".join(f"{layout.name} {layout.version}" for layout in LAYOUTS.values())
            raise ValueError(f"layout {self.name} {self.version} is unknown; this program reads {readable}")
        return self


class ParametersInfo(_Record):
    """The parameter archive: how many matrices it holds of each format, and the layout of each format.

    `merged` names the weights that span others, and those, in order: see `llmir_iree.params.siblings`.
    """

    file: str
    nbytes: int = Field(gt=0)
    sha256: str
    layouts: dict[str, LayoutInfo]
    formats: dict[str, int]
    merged: dict[str, tuple[str, ...]] = {}
    decode_bytes: int = Field(gt=0, description="bytes of weights that one decode step reads")

    @model_validator(mode="after")
    def _check_merged(self) -> ParametersInfo:
        for name, siblings in self.merged.items():
            if merged_name(siblings) != name:
                raise ValueError(f"{list(siblings)} do not merge into {name}")
        counts = Counter(name for siblings in self.merged.values() for name in siblings)
        for name, count in counts.items():
            if count > 1:
                raise ValueError(f"{name} is merged {count} times")
        return self


class FileInfo(_Record):
    """A file of the bundle and its hash."""

    file: str
    sha256: str


class ModuleInfo(FileInfo):
    """One compiled module, what made it and the portable module it was made from.

    `implementations` says of every op which implementations stand in for its calls, and for how many.
    """

    flags: tuple[str, ...]
    passes: tuple[str, ...]
    implementations: dict[str, dict[str, int]]
    portable_sha256: str


class TargetInfo(_Record):
    """The modules of one target: a decode, and a prefill of one kind.

    `subgroup_size` is how many lanes of a device the modules take to run in step; None where there are none.
    """

    target: str
    folder: str
    driver: str
    compiler: str
    modules: dict[Phase, ModuleInfo]
    subgroup_size: int | None = None

    @property
    def prefill_phase(self) -> PrefillPhase:
        """Which of the prefills the target has."""
        return "prefill_chunk" if "prefill_chunk" in self.modules else "prefill"

    @property
    def phases(self) -> tuple[Phase, Phase]:
        """The phases that it has modules of."""
        return self.prefill_phase, "decode"

    @model_validator(mode="after")
    def _check_phases(self) -> TargetInfo:
        if set(self.modules) != set(self.phases):
            raise ValueError(f"modules for {', '.join(self.modules)}; expected a decode and one kind of prefill")
        return self


class Manifest(_Record):
    """Everything that is known about a bundle."""

    version: Literal[3]
    generator: str
    source: str
    model: ModelInfo
    cache: CacheInfo
    parameters: ParametersInfo
    portable: dict[Phase, FileInfo]
    functions: tuple[FunctionInfo, ...]
    targets: dict[str, TargetInfo] = {}

    @model_validator(mode="after")
    def _check_consistency(self) -> Manifest:
        model, cache = self.model, self.cache
        expected = (model.layers, 2, model.kv_heads, cache.page_size, model.head_dim)
        if cache.page_shape != expected:
            raise ValueError(f"cache.page_shape is {cache.page_shape}, the model needs {expected}")
        for phase in PHASES:
            if phase not in self.portable:
                raise ValueError(f"there is no {phase} module")
        for phase in self.portable:
            if not self.batch_sizes(phase):
                raise ValueError(f"there is no {phase} function")
        return self

    def phases_for(self, *, prefill_chunks: bool) -> tuple[Phase, Phase]:
        """The phases to compile: a prefill, by chunks if that is asked for and was exported, and the decode."""
        return "prefill_chunk" if prefill_chunks and "prefill_chunk" in self.portable else "prefill", "decode"

    def batch_sizes(self, phase: Phase) -> tuple[int, ...]:
        """Batch sizes that a phase was exported for, in rising order."""
        return tuple(sorted(function.batch_size for function in self.functions if function.phase == phase))

    def function(self, phase: Phase, batch_size: int) -> FunctionInfo:
        """The function of a phase for exactly this batch size.

        Raises:
            BundleError: the bundle was not exported for it.
        """
        for function in self.functions:
            if function.phase == phase and function.batch_size == batch_size:
                return function
        known = ", ".join(map(str, self.batch_sizes(phase)))
        raise BundleError(f"the bundle has no {phase} for batch size {batch_size}; it was exported for {known}")


class Bundle:
    """A bundle on disk: its folder and its manifest."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle's folder.

        Raises:
            BundleError: no manifest there, or one that does not hold what this version expects.
        """
        folder = Path(path)
        file = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such bundle; give a folder that llmir-export wrote")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{folder}: not a bundle, it has no {MANIFEST_NAME}") from None
        except ValueError as error:
            raise BundleError(f"{file}: not JSON: {error}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != MANIFEST_VERSION:
            raise BundleError(f"{file}: manifest version {version!r}, this program reads version {MANIFEST_VERSION}")
        try:
            return cls(folder, Manifest.model_validate(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "manifest"
            raise BundleError(f"{file}: {where}: {first['msg']}") from None

    @classmethod
    def containing(cls, path: str | os.PathLike[str]) -> tuple[Bundle, str | None]:
        """Open the bundle that a path means: a bundle's folder, or a `.vmfb` inside one.

        Returns:
            The bundle, and the name of the target that the `.vmfb` belongs to (None for a folder).

        Raises:
            BundleError: the module is not the one that the manifest beside it describes.
        """
        module = Path(path)
        if module.suffix != ".vmfb":
            return cls.open(module), None
        if not module.is_file():
            raise BundleError(f"{module}: no such file")
        folder = module.resolve().parent.parent
        if not (folder / MANIFEST_NAME).is_file():
            raise BundleError(f"{module}: not inside a bundle; expected {folder / MANIFEST_NAME}")
        bundle = cls.open(folder)
        for name, target in bundle.manifest.targets.items():
            if any((folder / info.file).resolve() == module.resolve() for info in target.modules.values()):
                return bundle, name
        raise BundleError(f"{module}: the manifest of {folder} does not list it; compile it with llmir-compile")

    def path(self, file: str) -> Path:
        """Path of a file that the manifest names."""
        return self.folder / file

    def target(self, name: str | None = None) -> TargetInfo:
        """The compiled target of this name, or the only one there is.

        Raises:
            BundleError: no such target, none compiled, or several and no name.
        """
        targets = self.manifest.targets
        known = ", ".join(targets) or "none"
        if name is None and len(targets) == 1:
            return next(iter(targets.values()))
        if name is None:
            raise BundleError(f"{self.folder}: compiled targets: {known}; name one (llmir-compile --target makes more)")
        if name not in targets:
            raise BundleError(f"{self.folder}: not compiled for {name}; compiled targets: {known}")
        return targets[name]

    def checked_module(self, target: TargetInfo, phase: Phase) -> Path:
        """Path of a compiled module, after its hash was compared with the manifest's.

        Raises:
            BundleError: the file is missing, or it is not the one that was compiled for this bundle.
        """
        info = target.modules[phase]
        file = self.path(info.file)
        if not file.is_file():
            raise BundleError(f"{file}: missing; run llmir-compile {self.folder} --target {target.target}")
        if file_sha256(file) != info.sha256:
            raise BundleError(f"{file}: not the module that this bundle's manifest describes (another bundle's?)")
        if info.portable_sha256 != self.manifest.portable[phase].sha256:
            raise BundleError(f"{file}: compiled from another {phase}.mlir; run llmir-compile {self.folder} again")
        return file

    def checked_parameters(self) -> Path:
        """Path of the parameter archive, after its size was compared with the manifest's.

        Raises:
            BundleError: the file is missing or has another size.
        """
        info = self.manifest.parameters
        file = self.path(info.file)
        if not file.is_file():
            raise BundleError(f"{file}: missing; export the bundle again")
        if file.stat().st_size != info.nbytes:
            raise BundleError(f"{file}: {file.stat().st_size} bytes, the manifest says {info.nbytes}")
        return file

    def save(self, manifest: Manifest | None = None) -> None:
        """Write the manifest, beside its place first so that a reader never sees half of it."""
        self.manifest = manifest or self.manifest
        file = self.folder / MANIFEST_NAME
        partial = file.with_suffix(".json.partial")
        partial.write_text(self.manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(file)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
