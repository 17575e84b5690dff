from __future__ import annotations

import contextlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmir_iree.params import SourceError, open_checkpoint


def refusal(folder):
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder).read("w")
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_raw(folder, header, data=b""):
    """Write a safetensors file with any header at all."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return folder


def entry(shape=(2, 4), offsets=(0, 32), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("shards", [1, 3])
def test_folder_is_read(shards, make_folder, weights, tiny_config):
    with open_checkpoint(make_folder(weights, shards)) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.config == tiny_config
        assert set(checkpoint.tensors) == set(weights)
        assert checkpoint.nbytes == sum(values.nbytes for values in weights.values())
        for name, values in weights.items():
            assert checkpoint.tensors[name].shape == values.shape
            assert (checkpoint.read(name) == values).all()
            assert (checkpoint.read_rows(name, 1, 3) == values[1:3]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_of_weights(dtype, make_folder):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    with open_checkpoint(make_folder({"w": values})) as checkpoint:
        array = checkpoint.read("w")
        assert array.dtype == dtype
        assert (array == values).all()


def test_tensors_are_mapped_not_read(make_folder, weights):
    with open_checkpoint(make_folder(weights)) as checkpoint:
        array = checkpoint.read("model.embed_tokens.weight")
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


def test_scalars_and_empty_tensors(tmp_path):
    folder = write_raw(tmp_path / "f", {"s": entry((), (0, 4)), "w": entry((0, 4), (4, 4))}, b"\0\0\x80?")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read("s") == 1.0
        assert checkpoint.read("w").shape == (0, 4)


def test_folder_without_weights(tmp_path):
    assert "holds no weights: neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_folder_without_config(make_folder, weights):
    folder = make_folder(weights)
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder / 'config.json'} does not exist"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": 3}', "[" * 100000])
def test_damaged_config(content, make_folder, weights):
    folder = make_folder(weights)
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_truncated_file(make_folder, weights):
    folder = make_folder(weights)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(folder)
    assert "is truncated: tensor model." in message
    assert f"the file at {file.stat().st_size}" in message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry(offsets=(4, 36))}, "is truncated: tensor w ends at byte"),
        ({"w": entry(offsets=(0, 28))}, r"tensor w of shape \[2, 4\] in F32 needs 32 bytes, has 28"),
        ({"w": entry((1 << 32, 1 << 32), (0, 0))}, "needs 73786976294838206464 bytes, has 0"),
        ({"w": entry((-2, -4))}, r"tensor w has shape \[-2, -4\]"),
        ({"w": entry((2, 4.0))}, r"tensor w has shape \[2, 4.0\]"),
        ({"w": entry((True, 8))}, "tensor w has shape"),
        ({"w": entry(offsets=(32, 0))}, "needs 32 bytes, has -32"),
        ({"w": entry(offsets=(0, 16, 32))}, "data_offsets"),
        ({"w": entry(dtype="F99")}, "tensor w has the unknown dtype 'F99'; known are BOOL"),
        ({"w": entry(dtype=["F32"])}, "unknown dtype"),
        ({"w": entry(dtype="F8_E4M3", offsets=(0, 8))}, "tensor w is stored as f8_e4m3; weights must be f32, f16 or"),
        ({"w": entry(), "v": entry((2, 2), (16, 32))}, "tensors w and v overlap at byte"),
        ({"w": 5}, "tensor w is described by a JSON int"),
        ({"w": {}}, "unknown dtype None"),
        ([], "its header is a JSON list"),
        (b"{", "its header is not JSON"),
        (b"\xff", "its header is not JSON"),
    ],
)
def test_damaged_headers(header, message, tmp_path):
    folder = write_raw(tmp_path / "f", header, bytes(32))
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(folder).read("w")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 63), struct.pack("<Q", 9) + b"{}"])
def test_header_length_beyond_the_file(content, make_folder, weights):
    folder = make_folder(weights)
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors is" in refusal(folder)


def test_header_over_the_limit_of_the_format(tmp_path):
    folder = write_raw(tmp_path / "f", {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    assert "a header of 100000001 bytes in a file of 200000000 (at most 100000000)" in refusal(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "a\\b"])
def test_index_may_not_lead_out_of_the_folder(shard, make_folder, weights):
    folder = make_folder(weights, 2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    assert "tensor w is said to be in" in refusal(folder)
    assert "which is no file of this folder" in refusal(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "gone.safetensors"}, "names the shard gone.safetensors, which does not exist"),
        ({"w": "model-00001-of-00002.safetensors"}, "model-00001-of-00002.safetensors, which does not hold it"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_damaged_index(weight_map, message, make_folder, weights):
    folder = make_folder(weights, 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert message in refusal(folder)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(data, tmp_path):
    header = {"__metadata__": {"format": "pt"}, "w": entry(), "v": entry((3,), (32, 38), "BF16")}
    folder = write_raw(tmp_path / "f", header, bytes(38))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 39))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(SourceError), open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name).sum()
