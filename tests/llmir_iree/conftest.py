"""A bundle small enough to build in seconds, whose answers can be worked out by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import iree.runtime as rt
import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from iree.compiler import tools
from tokenizers import decoders, models, pre_tokenizers, processors

from llmir_iree import bundle as b
from llmir_iree.build import BuildOptions, build_bundle

PAGE_SIZE = 4
MAX_SEQ_LEN = 64
BATCH_SIZES = {"prefill": (1,), "decode": (1, 4)}
BOS, EOS = 0, 1
# The last two are the bytes of "é".
VOCAB = ("<s>", "</s>", "<|user|>", "<|assistant|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "Ã", "©")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """The bundle, and what its model computes."""

    folder: Path
    table: npt.NDArray[np.float32]

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        state = sum(token * (position + 1) for position, token in enumerate(tokens))
        return self.table[state % len(VOCAB)]

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, each the likeliest."""
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(np.argmax(self.logits(tokens))))
        return tokens[-count:]


def tiny_mlir(phase: str) -> str:
    """The source of a phase's module, with a function for each batch size."""
    source = Path(__file__).with_name("tiny.mlir").read_text(encoding="utf-8")
    types, head, function = source.split("// -----")
    is_decode = phase == "decode"

    def fill(text: str, batch_size: int = 0) -> str:
        return Template(text).substitute(
            PHASE=phase,
            BATCH=batch_size,
            VOCAB=len(VOCAB),
            SEQ=1 if is_decode else "?",
            SEQ_SIZE="" if is_decode else "%seq",
        )

    sizes = BATCH_SIZES[phase]
    head, function = head.removeprefix(" head"), function.removeprefix(" function")
    parts = [*(fill(types, size) for size in sizes), fill(head), *(fill(function, size) for size in sizes), "}\n"]
    return "\n".join(parts)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of single characters, with a chat template."""
    model = models.BPE(vocab={token: index for index, token in enumerate(VOCAB)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(VOCAB[:4]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_bundle(folder: Path) -> Tiny:
    folder.mkdir()
    write_tokenizer(folder / "tokenizer")

    vocab = len(VOCAB)
    random = np.random.default_rng(7)
    table = random.normal(size=(vocab, vocab)).astype(np.float32)
    table[np.arange(vocab), random.permutation(vocab)] = 9  # Every token follows some state.
    index = rt.ParameterIndex()
    index.add_buffer("table", table)
    index.create_archive_file(str(folder / "params.irpa"))

    (folder / "cpu").mkdir()
    portable: dict[b.Phase, b.FileInfo] = {}
    compiled: dict[b.Phase, b.ModuleInfo] = {}
    functions = []
    for phase in b.PHASES:
        source = folder / f"{phase}.mlir"
        source.write_text(tiny_mlir(phase))
        module = folder / "cpu" / f"{phase}.vmfb"
        flags = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")
        flags += ("--iree-llvmcpu-target-cpu=generic", "--iree-opt-level=O0")
        tools.compile_file(str(source), output_file=str(module), extra_args=list(flags))
        portable[phase] = b.FileInfo(file=source.name, sha256=b.file_sha256(source))
        compiled[phase] = b.ModuleInfo(
            file=f"cpu/{phase}.vmfb",
            sha256=b.file_sha256(module),
            flags=flags,
            passes=(),
            implementations={},
            portable_sha256=portable[phase].sha256,
        )
        functions += [
            b.FunctionInfo(name=f"{phase}_bs{size}", phase=phase, batch_size=size, arguments=(), results=())
            for size in BATCH_SIZES[phase]
        ]
    archive = folder / "params.irpa"
    manifest = b.Manifest(
        version=3,
        generator="test",
        source="by hand",
        model=b.ModelInfo(
            name="tiny",
            model_type="llama",
            layers=1,
            heads=1,
            kv_heads=1,
            head_dim=2,
            hidden_size=2,
            vocab_size=vocab,
            max_seq_len=MAX_SEQ_LEN,
            bos_token_id=BOS,
            eos_token_ids=(EOS,),
        ),
        cache=b.CacheInfo(dtype="f32", page_size=PAGE_SIZE, page_shape=(1, 2, 1, PAGE_SIZE, 2)),
        parameters=b.ParametersInfo(
            file=archive.name,
            nbytes=archive.stat().st_size,
            sha256=b.file_sha256(archive),
            layouts={"f32": b.LayoutInfo(name="planes", version=1)},
            formats={"f32": table.nbytes},
            decode_bytes=table.nbytes,
        ),
        portable=portable,
        functions=tuple(functions),
        targets={
            "cpu": b.TargetInfo(target="cpu", folder="cpu", driver="local-task", compiler="test", modules=compiled)
        },
    )
    b.Bundle(folder, manifest).save()
    return Tiny(folder, table)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The bundle; tests that change files take `tiny_copy`."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> b.Bundle:
    """A model of two layers with random weights of 4 bits, exported for chunks of 64, not compiled; no tokenizer."""
    source = str(tiny_checkpoint("llama"))
    output = tmp_path_factory.mktemp("bundles") / "exported"
    return build_bundle(BuildOptions(source, output, quant="q4_0", batch_sizes=(1, 2), page_size=8, chunk_tokens=64))


@pytest.fixture
def tiny_copy(tiny: Tiny, tmp_path: Path) -> Tiny:
    """A copy of the bundle that a test may damage."""
    shutil.copytree(tiny.folder, tmp_path / "tiny")
    return Tiny(tmp_path / "tiny", tiny.table)
