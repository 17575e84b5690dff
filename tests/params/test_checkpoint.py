from __future__ import annotations

from pathlib import Path

import pytest

from llmir_iree.params import ParameterError, SourceError, TensorInfo, open_checkpoint


def refusal(source: object, **options: object) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["none.gguf", "none.pt", "none", "a/b/c", "none.safetensors"])
def test_missing_source_says_what_is_valid(name, tmp_path):
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path / name} does not exist; a checkpoint is a .gguf file")
    assert "hub id" in message


def test_unknown_suffix_says_what_is_valid(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "is of no known kind; a checkpoint is a .gguf file, a state dict" in refusal(tmp_path / "model.onnx")


def test_single_safetensors_file_points_to_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "pass the folder" in refusal(tmp_path / "model.safetensors")


def test_config_goes_only_with_a_state_dict(make_gguf, gguf_spec, tmp_path):
    assert "goes only with a state dict" in refusal(make_gguf(gguf_spec), config=tmp_path / "config.json")


def test_source_may_be_a_string(make_gguf, gguf_spec):
    path = make_gguf(gguf_spec)
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.source == str(path)
        assert checkpoint.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())


def test_unreadable_file_is_a_source_error(make_gguf, gguf_spec, monkeypatch):
    path = make_gguf(gguf_spec)

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("numpy.memmap", deny)
    assert refusal(path) == f"{path} cannot be read: Permission denied"


def test_unknown_tensor_is_a_parameter_error(make_gguf, gguf_spec):
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint, pytest.raises(ParameterError, match="has no tensor nope"):
        checkpoint.read("nope")


def test_arrays_outlive_the_checkpoint(make_gguf, gguf_spec, weights):
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        norm = checkpoint.read("model.norm.weight")
    assert (norm == weights["model.norm.weight"]).all()


def test_tensor_info_refuses_negative_sizes():
    with pytest.raises(ValueError, match="negative"):
        TensorInfo("x", (-1, 4), "f32", 16)


def test_package_import_is_light():
    import subprocess
    import sys

    code = "import sys, llmir_iree.params; sys.exit(bool({'torch', 'transformers', 'iree.runtime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.home(), check=False).returncode == 0
