"""Checkpoints to time where none can be downloaded: a published model's shapes, with seeded random weights.

    python -m llmir_iree.bench_models tinyllama --output FOLDER

writes FOLDER/tinyllama-f16.gguf and, quantised by llama.cpp as llama-quantize does it, -q8_0.gguf and -q4_0.gguf (whose
output head is Q6_K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import gguf
import numpy as np
import numpy.typing as npt

from llmir_iree.cli.common import LlmirCommand
from llmir_iree.machine import cpu_count
from llmir_iree.params.errors import LlmirError
from llmir_iree.params.memory import drop_from_memory

QUANTIZED = ("q8_0", "q4_0")
"""Formats that `write_checkpoints` writes beside f16."""

_SEED = 20
_DEVIATION = 0.02
# A matrix is drawn in runs of this many weights, so that memory stays small beside the largest matrix.
_RUN = 1 << 22


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model of the llama architecture."""

    layers: int
    hidden_size: int
    inner_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int


SHAPES = {
    "tinyllama": ModelShape(
        layers=22,
        hidden_size=2048,
        inner_size=5632,
        heads=32,
        kv_heads=4,
        head_dim=64,
        vocab_size=32000,
        context=4096,
    ),
}
"""By name. TinyLlama-1.1B was trained for 2048 positions; twice that leaves room to decode behind them."""


def write_checkpoints(name: str, folder: Path, note: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write a model's checkpoints in f16 and in each of QUANTIZED.

    Args:
        name: a key of SHAPES.
        folder: where to, made if missing.
        note: takes a line about what is being done.

    Raises:
        LlmirError: llama-cpp-python is not installed, or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / f"{name}-f16.gguf"
    note(f"writing {plain}")
    _in_place(plain, partial(write_random_gguf, name, SHAPES[name]))
    files = [plain]
    for weight_format in QUANTIZED:
        file = folder / f"{name}-{weight_format}.gguf"
        note(f"writing {file}")
        _in_place(file, partial(quantize_gguf, plain, weight_format=weight_format))
        files.append(file)
    return files


def write_random_gguf(name: str, shape: ModelShape, file: Path) -> None:
    """Write a GGUF file: matrices of normally distributed float16, norms of ones, and a vocabulary of made-up words."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.inner_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, shape.vocab_size)

    shapes = dict(_tensor_shapes(shape))
    for tensor, sizes in shapes.items():
        dtype = np.dtype(np.float16 if len(sizes) == 2 else np.float32)
        writer.add_tensor_info(tensor, sizes, dtype, int(np.prod(sizes)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(_SEED)
    for sizes in shapes.values():
        writer.write_tensor_data(_random_matrix(random, sizes) if len(sizes) == 2 else np.ones(sizes, np.float32))
    writer.close()


def _tensor_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name in GGUF and its shape [rows, columns] or [columns]."""
    hidden, inner = shape.hidden_size, shape.inner_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab_size, hidden)
    for layer in range(shape.layers):
        tensors: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        for tensor, sizes in tensors.items():
            yield f"blk.{layer}.{tensor}.weight", sizes
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (shape.vocab_size, hidden)


def _random_matrix(random: np.random.Generator, sizes: tuple[int, ...]) -> npt.NDArray[np.float16]:
    values = np.empty(int(np.prod(sizes)), np.float16)
    for start in range(0, len(values), _RUN):
        run = values[start : start + _RUN]
        run[:] = random.standard_normal(len(run), np.float32) * np.float32(_DEVIATION)
    return values.reshape(sizes)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A sentencepiece vocabulary: the special tokens and bytes that a reader looks for, then numbered words."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"▁w{number}" for number in range(size - len(special) - len(bytes_))]
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    types += [kinds.BYTE] * len(bytes_) + [kinds.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *bytes_, *words])
    writer.add_token_scores([0.0] * (len(special) + len(bytes_)) + [-float(rank) for rank in range(len(words))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def quantize_gguf(plain: Path, file: Path, weight_format: str) -> None:
    """What llama-quantize does with no option but the type.

    Raises:
        LlmirError: llama-cpp-python is not installed, or refuses the file.
    """
    from llmir_iree.bench_engines import import_llama_cpp

    llama, log = import_llama_cpp()
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{weight_format.upper()}")
    params.nthread = cpu_count()
    status = llama.llama_model_quantize(str(plain).encode(), str(file).encode(), params)
    if status != 0:
        raise LlmirError(f"llama.cpp cannot quantise {plain} to {weight_format}: {log.first_error()}")


def _in_place(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write beside the file's place, and rename when it is whole."""
    unfinished = file.with_name(f"{file.name}.partial")
    try:
        write(unfinished)
        # So that a peer that maps it has large pages, as the bundle's archive has.
        drop_from_memory(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@click.command("bench_models", cls=LlmirCommand)
@click.argument("name", type=click.Choice(list(SHAPES)))
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
def main(name: str, output: Path) -> None:
    """Write the checkpoints of the model NAME: its shapes, with random weights that are the same every time."""
    write_checkpoints(name, output, lambda line: click.echo(line, err=True))


if __name__ == "__main__":
    main()
