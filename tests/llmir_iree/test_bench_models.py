"""The checkpoints to time are whole: the project reads them, llama.cpp quantises them, twice they are the same."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from llmir_iree import bench_models
from llmir_iree.bench_models import SHAPES, ModelShape, main, quantize_gguf, write_checkpoints, write_random_gguf
from llmir_iree.export.model import load_config, weight_specs
from llmir_iree.params.checkpoint import open_checkpoint
from llmir_iree.params.errors import LlmirError
from llmir_iree.params.plan import plan_weights

# As small as llama.cpp can quantise to Q6_K, whose blocks are 256 weights long.
SMALL = ModelShape(
    layers=1, hidden_size=256, inner_size=512, heads=4, kv_heads=2, head_dim=64, vocab_size=300, context=128
)


def test_a_checkpoint_is_read_as_any_other(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    write_random_gguf("small", SMALL, file)
    with open_checkpoint(str(file)) as checkpoint:
        config = load_config(checkpoint.config)
        plan = plan_weights(checkpoint, weight_specs(config))
        checkpoint.save_tokenizer(tmp_path / "tokenizer")
        table = checkpoint.read("model.embed_tokens.weight")
        norm = checkpoint.read("model.norm.weight")
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert sizes == (1, 256, 512, 4)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 64, 300)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (128, False)
    assert {weight.format for weight in plan if weight.spec.kind != "vector"} == {"f16"}
    assert table.astype(np.float32).std() == pytest.approx(0.02, rel=0.02)
    assert (norm == 1).all()


def test_the_weights_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_gguf("small", SMALL, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_two_runs_of_a_matrix_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "_RUN", 7)
    values = bench_models._random_matrix(np.random.default_rng(0), (4, 5)).ravel()
    assert len(set(values.tolist())) == 20


def test_tinyllama_has_the_published_number_of_weights() -> None:
    assert sum(int(np.prod(sizes)) for _, sizes in bench_models._tensor_shapes(SHAPES["tinyllama"])) == 1_100_048_384


def test_llama_cpp_quantises_as_its_own_tool_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason='needs llama.cpp: pip install "llmir-iree[bench]"')
    monkeypatch.setitem(SHAPES, "small", SMALL)
    files = write_checkpoints("small", tmp_path / "models")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(file.name for file in files)
    formats = {}
    for file in files:
        tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
        formats[file.name] = (tensors["blk.0.ffn_up.weight"], tensors["output.weight"], tensors["output_norm.weight"])
    assert formats == {
        "small-f16.gguf": ("F16", "F16", "F32"),
        "small-q8_0.gguf": ("Q8_0", "Q8_0", "F32"),
        "small-q4_0.gguf": ("Q4_0", "Q6_K", "F32"),
    }


def test_what_llama_cpp_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason='needs llama.cpp: pip install "llmir-iree[bench]"')
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(LlmirError, match=r"cannot quantise .*bad\.gguf to q8_0: .*gguf"):
        quantize_gguf(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q8_0")


def test_a_file_that_could_not_be_written_whole_is_not_left(tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        bench_models._in_place(tmp_path / "model.gguf", write)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["gpt", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "'gpt' is not 'tinyllama'" in result.output
