from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmir_iree.params import (
    FORMATS,
    BundleError,
    LlmirError,
    ParameterError,
    WeightSpec,
    open_checkpoint,
    plan_weights,
    read_archive_index,
    write_archive,
)
from llmir_iree.params.layouts import TILE16, layout_of, unpack_tile16
from llmir_iree.params.quantize import dequantize

MATRIX_TYPES = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name not in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0")
]


def stored_plane(path, key, dtype, shape):
    """Read an entry through its offset, not through IREE."""
    entry = read_archive_index(path)[key]
    assert entry.offset % 64 == 0
    assert entry.nbytes == np.prod(shape) * dtype.itemsize
    return np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset).view(dtype).reshape(shape)


def reassemble(path, weight):
    """Join the planes of a matrix into the rows of blocks that they came from, field by field."""
    rows, columns = weight.spec.shape
    blocks = columns // weight.weight_format.block_size
    planes = {
        key.rpartition(".")[2]: stored_plane(path, key, dtype, shape) for key, (dtype, shape) in weight.planes.items()
    }
    if layout_of(weight.format) == TILE16:
        planes = unpack_tile16(weight.format, planes, rows)
    fields = [plane.reshape(rows, blocks, -1).view(np.uint8).reshape(rows, blocks, -1) for plane in planes.values()]
    return np.concatenate(fields, axis=-1).reshape(rows, -1)


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=lambda kind: kind.name.lower())
def test_every_gguf_type_is_read_planned_and_archived(kind, gguf_spec, make_gguf, tmp_path):
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 33, 512
    # Bytes below 0x3c make f16 scales below 1 whatever the struct, and exponents that are small.
    blocks = np.random.default_rng(1).integers(0, 0x3C, (rows, columns // block * nbytes), np.uint8)
    if kind.name == "MXFP4":
        blocks[:, ::nbytes] = 120  # its exponent alone is a bare byte, and q8_0's f16 scales end at 2^-24
    writer_type = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    path = make_gguf(gguf_spec)
    path = add_tensor(path, "blk.9.ffn_up.weight", blocks if writer_type is None else blocks.view(writer_type), kind)
    name, encoding = "model.layers.9.mlp.up_proj.weight", kind.name.lower()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors[name].shape == (rows, columns)
        assert checkpoint.tensors[name].encoding == encoding
        plan = plan_weights(checkpoint, [WeightSpec(name, (rows, columns), "linear")])
        assert plan[0].format == (encoding if encoding in FORMATS else "q8_0")
        write_archive(checkpoint, plan, tmp_path / "params.irpa")
        source = dequantize(checkpoint.read(name), encoding, (rows, columns))
    packed = reassemble(tmp_path / "params.irpa", plan[0])
    if not plan[0].converted:
        assert (packed == blocks).all()
        return
    expected = gguf.quants.dequantize(blocks, kind)
    assert (source == expected).all()
    error = np.abs(dequantize(packed, "q8_0", (rows, columns)) - expected).max()
    assert error <= np.abs(expected).max() / 127


def add_tensor(path, name, data, kind):
    """Rewrite a GGUF file with one more tensor."""
    old = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("more.gguf"), "llama")
    for key, field in old.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in old.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("more.gguf")


def test_archive_holds_the_whole_model(make_gguf, gguf_spec, weights, all_specs, tmp_path):
    gguf_spec.matrix_type = gguf.GGMLQuantizationType.F32
    seen = []
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        plan = plan_weights(checkpoint, all_specs(checkpoint))
        path = tmp_path / "params.irpa"
        info = write_archive(checkpoint, plan, path, lambda name, nbytes: seen.append((name, nbytes)))
    for weight in plan:
        ((key, (dtype, shape)),) = weight.planes.items()
        assert (stored_plane(path, key, dtype, shape) == weights[weight.spec.name]).all()
    assert info.nbytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.entries == read_archive_index(path)
    assert {name for name, _ in seen} == set(weights)
    assert sum(nbytes for _, nbytes in seen) == sum(values.nbytes for values in weights.values())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["params.irpa", "tiny.gguf"]


def test_iree_reads_the_archive_back(make_gguf, gguf_spec, weights, all_specs, tmp_path):
    from iree.runtime import ParameterIndex

    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        plan = plan_weights(checkpoint, all_specs(checkpoint))
        info = write_archive(checkpoint, plan, tmp_path / "params.irpa")
    index = ParameterIndex()
    index.load(str(tmp_path / "params.irpa"))
    entries = dict(index.items())
    spans = {key for weight in info.merged for key in weight.spans}
    assert set(entries) == {key for weight in plan for key in weight.planes} | spans
    norm = np.asarray(entries["model.norm.weight"].file_view).view(np.float32)
    assert (norm == weights["model.norm.weight"]).all()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 33])
def test_chunks_join_seamlessly(rows, make_folder, weights, monkeypatch, tmp_path):
    table = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
    monkeypatch.setattr("llmir_iree.params.archive._CHUNK_VALUES", 64 * 16)
    with open_checkpoint(make_folder({"w": table})) as checkpoint:
        for quant, name in (("keep", "f32"), ("q4_0", "q4_0")):
            plan = plan_weights(checkpoint, [WeightSpec("w", table.shape, "linear")], quant)
            write_archive(checkpoint, plan, tmp_path / "params.irpa")
            expected = table.view(np.uint8) if name == "f32" else gguf.quants.quantize(table, plan_type(name))
            assert (reassemble(tmp_path / "params.irpa", plan[0]) == expected).all()


def plan_type(name):
    return gguf.GGMLQuantizationType[name.upper()]


def test_an_older_archive_is_replaced_and_kept_on_failure(make_folder, tmp_path):
    path = tmp_path / "params.irpa"
    path.write_bytes(b"old")
    spec = WeightSpec("w", (2, 32), "linear")
    values = np.full((2, 32), 1e5, np.float32)
    with open_checkpoint(make_folder({"w": values})) as checkpoint:
        with pytest.raises(ParameterError, match="tensor w holds values too large for f16"):
            write_archive(checkpoint, plan_weights(checkpoint, [spec], "f16"), path)
        assert path.read_bytes() == b"old"
        assert not list(tmp_path.glob("*.partial"))
        write_archive(checkpoint, plan_weights(checkpoint, [spec]), path)
    assert list(read_archive_index(path)) == ["w.w"]


def test_an_empty_plan_is_refused(make_folder, weights, tmp_path):
    with open_checkpoint(make_folder(weights)) as checkpoint, pytest.raises(LlmirError, match="no weights to write"):
        write_archive(checkpoint, (), tmp_path / "params.irpa")


@pytest.mark.parametrize("keep", [0, 1, 64, 300, -1, -4096])
def test_truncated_archive_is_refused(keep, make_gguf, gguf_spec, all_specs, tmp_path):
    path = tmp_path / "params.irpa"
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        info = write_archive(checkpoint, plan_weights(checkpoint, all_specs(checkpoint)), path)
    last = max(entry.offset + entry.nbytes for entry in info.entries.values())
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else last + keep])
    with pytest.raises(BundleError) as caught:
        read_archive_index(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_archive_is_refused(tmp_path):
    with pytest.raises(BundleError, match="there is no parameter archive"):
        read_archive_index(tmp_path / "params.irpa")


def test_disk_full_leaves_nothing(make_gguf, gguf_spec, all_specs, monkeypatch, tmp_path):
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_space, raising=False)
    target = tmp_path / "out" / "params.irpa"
    target.parent.mkdir()
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        plan = plan_weights(checkpoint, all_specs(checkpoint))
        with pytest.raises(LlmirError) as caught:
            write_archive(checkpoint, plan, target)
    assert str(caught.value) == f"cannot write {target}: No space left on device"
    assert not list(target.parent.iterdir())


def run_child(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=Path.home())
    assert done.returncode == 0, done.stderr
    return done.stdout


LIMITED_CHILD = """
    import os, resource, sys
    from pathlib import Path
    from llmir_iree.params import LlmirError, WeightSpec, open_checkpoint, plan_weights, write_archive
    source, target, reserve = sys.argv[1:]
    if reserve == "no":
        del os.posix_fallocate
    with open_checkpoint(source) as checkpoint:
        specs = [WeightSpec(n, i.shape, "linear") for n, i in checkpoint.tensors.items() if len(i.shape) == 2]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            write_archive(checkpoint, plan_weights(checkpoint, specs), Path(target))
        except LlmirError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files: run on Linux")
@pytest.mark.parametrize("reserve", ["yes", "no"])
def test_a_write_that_fails_midway_leaves_nothing(reserve, make_gguf, gguf_spec, tmp_path):
    target = tmp_path / "out" / "params.irpa"
    target.parent.mkdir()
    lines = run_child(LIMITED_CHILD, make_gguf(gguf_spec), target, reserve).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"cannot write {target}: ")
    assert not list(target.parent.iterdir())


STREAMING_CHILD = """
    import sys
    from pathlib import Path
    import iree.runtime
    from llmir_iree.params import WeightSpec, open_checkpoint, plan_weights, write_archive
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10
    source, target, quant = sys.argv[1:]
    with open_checkpoint(source) as checkpoint:
        specs = [WeightSpec(name, info.shape, "linear") for name, info in checkpoint.tensors.items()]
        plan = plan_weights(checkpoint, specs, quant)
        before = peak = anonymous()
        def watch(name, nbytes):
            global peak
            peak = max(peak, anonymous())
        write_archive(checkpoint, plan, Path(target), watch)
        print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon: run on Linux")
@pytest.mark.parametrize("quant", ["keep", "bf16"])
def test_memory_does_not_grow_with_the_checkpoint(quant, make_folder, tmp_path):
    folder = make_folder({"w": np.zeros((1, 4096), np.float32)})
    rows, columns = 9216, 4096  # 302 MB with its sibling, of which the file has only the header: the rest is a hole
    nbytes = rows * columns * 4
    tensors = {
        f"{module}.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, start + nbytes]}
        for module, start in (("gate_proj", 0), ("up_proj", nbytes))
    }
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * nbytes)
    growth = int(run_child(STREAMING_CHILD, folder, tmp_path / "params.irpa", quant))
    assert growth < 100 << 20


def test_smollm2_is_kept_bit_for_bit(smollm2, all_specs, tmp_path):
    plan = plan_weights(smollm2, all_specs(smollm2))
    assert {weight.format for weight in plan} == {"q4_1", "q8_0", "f32"}
    write_archive(smollm2, plan, tmp_path / "params.irpa")
    for weight in plan[:12]:
        if weight.spec.kind != "vector":
            assert (reassemble(tmp_path / "params.irpa", weight) == smollm2.read(weight.spec.name)).all()
