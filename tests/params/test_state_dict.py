from __future__ import annotations

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from llmir_iree.params import SourceError, open_checkpoint


@pytest.fixture
def tensors(weights):
    return {name: torch.from_numpy(values) for name, values in weights.items()}


@pytest.fixture
def config_file(tmp_path, tiny_config):
    path = tmp_path / "elsewhere" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(tiny_config))
    return path


def refusal(path):
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_config_by_argument(suffix, tensors, weights, config_file, tiny_config, tmp_path):
    path = tmp_path / f"model{suffix}"
    torch.save(tensors, path)
    with open_checkpoint(path, config=config_file) as checkpoint:
        assert checkpoint.kind == "state_dict"
        assert checkpoint.config == tiny_config
        assert set(checkpoint.tensors) == set(weights)
        for name, values in weights.items():
            assert (checkpoint.read(name) == values).all()
            assert (checkpoint.read_rows(name, 1, 3) == values[1:3]).all()


def test_config_beside(tensors, tiny_config, tmp_path):
    torch.save(tensors, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    assert open_checkpoint(tmp_path / "model.pt").config == tiny_config


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_config_inside(key, tensors, weights, tiny_config, tmp_path):
    torch.save({"epoch": 3, key: tensors, "config": tiny_config}, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert checkpoint.config == tiny_config
    assert set(checkpoint.tensors) == set(weights)


def test_no_config_names_the_three_places(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "give one (--config FILE), put config.json beside it" in message
    assert 'save it under "config" inside it' in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_leave_no_prefix(prefix, tensors, weights, config_file, tmp_path):
    torch.save({prefix + name: value for name, value in tensors.items()}, tmp_path / "model.pt")
    assert set(open_checkpoint(tmp_path / "model.pt", config=config_file).tensors) == set(weights)


def test_dtypes_and_strides(config_file, tmp_path):
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "bf16": values.bfloat16(),
        "f16": values.half(),
        "transposed": values.T,
        "scalar": torch.tensor(2.0),
        "i64": values.long(),
        "parameter": torch.nn.Parameter(values),
    }
    torch.save(state, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt", config=config_file) as checkpoint:
        assert checkpoint.tensors["bf16"].encoding == "bf16"
        assert checkpoint.read("bf16").dtype == ml_dtypes.bfloat16
        assert (checkpoint.read("bf16").astype(np.float32) == values.numpy()).all()
        assert checkpoint.read("f16").dtype == np.float16
        assert (checkpoint.read("transposed") == values.numpy().T).all()
        assert checkpoint.read("scalar") == 2.0
        assert (checkpoint.read("parameter") == values.numpy()).all()
        with pytest.raises(SourceError, match="tensor i64 is stored as int64; weights must be f32, f16 or bf16"):
            checkpoint.read("i64")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_pickle_is_never_run(inside, tensors, tmp_path):
    marker = tmp_path / "marker"
    torch.save({**tensors, "x": Malicious(marker)} if inside else Malicious(marker), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "holds Python objects other than tensors, which are never run" in message
    assert not marker.exists()


def test_bare_pickles_are_never_run(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    refusal(tmp_path / "model.pt")
    assert not (tmp_path / "marker").exists()


def test_legacy_file_says_how_to_save_it_anew(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert "re-save it: torch.save(torch.load(old, weights_only=True), new)" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -1000])
def test_truncated_file(keep, tensors, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(path)


def test_compressed_zip_is_refused(tensors, tmp_path):
    torch.save(tensors, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "model.pt", "w", 8) as packed:
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    assert "is not stored plainly inside the file" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": "b"}}, {}])
def test_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "not a state dict" in message or "holds no tensors" in message


def test_tokenizer_must_stand_beside(tensors, config_file, tmp_path):
    torch.save(tensors, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt", config=config_file) as checkpoint:
        with pytest.raises(SourceError, match=r"a state dict holds no tokenizer, and .* has no tokenizer: neither"):
            checkpoint.save_tokenizer(tmp_path / "out")
        (tmp_path / "tokenizer.json").write_text("{}")
        checkpoint.save_tokenizer(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
