"""Merged weights: which matrices of a plan become siblings, and what IREE finds in the archive then."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmir_iree.compile import compile_mlir
from llmir_iree.params import (
    LlmirError,
    PlannedWeight,
    WeightSpec,
    open_checkpoint,
    plan_weights,
    read_archive_index,
    write_archive,
)
from llmir_iree.params.archive import ArchiveEntry, _span
from llmir_iree.params.irpa import set_spans
from llmir_iree.params.layouts import pack_tile16
from llmir_iree.params.siblings import merge_siblings, merged_name
from llmir_iree.targets import resolve_target

ATTENTION = "model.layers.0.self_attn."
MLP = "model.layers.0.mlp."


def planned(name, rows, columns=256, weight_format="q8_0", kind="linear"):
    return PlannedWeight(WeightSpec(name, (rows, columns), kind), weight_format, weight_format)


def attention(q=64, k=32, v=32, **changes):
    rows = {"q_proj": q, "k_proj": k, "v_proj": v}
    return [planned(f"{ATTENTION}{module}.weight", rows[module], **changes.get(module, {})) for module in rows]


def merged(plan):
    return {group.name: group.sibling_names for group in merge_siblings(plan)}


QKV = {
    f"{ATTENTION}q_proj+k_proj+v_proj.weight": (
        f"{ATTENTION}q_proj.weight",
        f"{ATTENTION}k_proj.weight",
        f"{ATTENTION}v_proj.weight",
    )
}
QK = {f"{ATTENTION}q_proj+k_proj.weight": (f"{ATTENTION}q_proj.weight", f"{ATTENTION}k_proj.weight")}


def test_query_key_and_value_merge_in_this_order_whatever_the_plans():
    assert merged(attention()) == QKV
    assert merged(reversed(attention())) == QKV


def test_gate_comes_before_up():
    plan = [planned(f"{MLP}{module}.weight", 48) for module in ("up_proj", "gate_proj", "down_proj")]
    assert merged(plan) == {f"{MLP}gate_proj+up_proj.weight": (f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight")}


def test_biases_and_other_layers_do_not_matter():
    biases = [
        PlannedWeight(WeightSpec(f"{ATTENTION}{module}.bias", (64,), "vector"), "f32", "f32")
        for module in ("q_proj", "k_proj", "v_proj")
    ]
    other_layer = planned("model.layers.1.self_attn.q_proj.weight", 64)
    assert merged([*biases, *attention(), other_layer]) == QKV


def test_a_value_of_another_format_stays_apart():
    assert merged(attention(v_proj={"weight_format": "q6_k"})) == QK


@pytest.mark.parametrize(
    "plan",
    [
        attention(k_proj={"weight_format": "f16"}),
        attention(q_proj={"weight_format": "f16"}),
        attention(q=65),
        attention(k_proj={"columns": 512}),
        attention(k_proj={"kind": "embedding"}),
        attention()[:1],
        attention()[1:],
        [planned(f"{ATTENTION}{module}.weight", 64, weight_format="f32") for module in ("q_proj", "k_proj", "v_proj")],
        # 16 rows of one block: the plane of scales has 32 bytes.
        attention(q=16, **{module: {"columns": 32} for module in ("q_proj", "k_proj", "v_proj")}),
    ],
    ids=["key", "query", "rows", "columns", "lookup", "query alone", "no query", "no tiles", "alignment"],
)
def test_no_siblings(plan):
    assert merged(plan) == {}


def test_only_the_last_may_end_inside_a_tile():
    assert merged(attention(v=33)) == QKV
    assert merged(attention(k=33)) == QK


def test_the_spans_of_every_plane():
    (group,) = merge_siblings(attention())
    (name,), (siblings,) = QKV.keys(), QKV.values()
    assert group.spans == {f"{name}.{plane}": tuple(f"{s}.{plane}" for s in siblings) for plane in ("d", "qs")}


def test_the_name_is_found_from_the_siblings():
    ((name, siblings),) = QKV.items()
    assert merged_name(siblings) == name
    assert merged_name(["q_proj.weight", "k_proj.weight"]) == "q_proj+k_proj.weight"
    assert merged_name(siblings[::-1]) is None
    assert merged_name(siblings[:1]) is None
    assert merged_name([siblings[0], siblings[1].replace(".0.", ".1.")]) is None
    assert merged_name([name.replace("weight", "bias") for name in siblings]) is None
    assert merged_name([]) is None


def entry_contents(path):
    contents = path.read_bytes()
    return {key: contents[entry.offset :][: entry.nbytes] for key, entry in read_archive_index(path).items()}


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q8_0"])
def test_entries_hold_the_same_with_and_without_merging(kind, make_gguf, gguf_spec, all_specs, monkeypatch, tmp_path):
    gguf_spec.matrix_type = gguf.GGMLQuantizationType[kind]
    with open_checkpoint(make_gguf(gguf_spec)) as checkpoint:
        plan = plan_weights(checkpoint, all_specs(checkpoint))
        info = write_archive(checkpoint, plan, tmp_path / "merged.irpa")
        monkeypatch.setattr("llmir_iree.params.archive.merge_siblings", lambda plan: ())
        apart_info = write_archive(checkpoint, plan, tmp_path / "apart.irpa")
    entries, apart = entry_contents(tmp_path / "merged.irpa"), entry_contents(tmp_path / "apart.irpa")
    spans = {key: keys for group in info.merged for key, keys in group.spans.items()}
    assert len(info.merged) == 4
    assert set(apart) == {key for weight in plan for key in weight.planes}
    assert set(entries) == {*apart, *spans}
    for key, contents in apart.items():
        assert entries[key] == contents, key
    for key, siblings in spans.items():
        assert entries[key] == b"".join(apart[sibling] for sibling in siblings), key
    # No byte is stored twice: what merging adds is names and places.
    assert info.nbytes - apart_info.nbytes <= 4096


@pytest.mark.parametrize(("rows", "columns"), [(17, 32), (16, 33)], ids=["tile", "alignment"])
def test_siblings_that_do_not_fit_stay_apart(rows, columns, make_folder, tmp_path):
    """The first ends inside a tile, or off the alignment; reading the index back checks that every entry is aligned."""
    rng = np.random.default_rng(rows)
    weights = {
        f"{MLP}{module}.weight": rng.standard_normal((rows, columns)).astype(np.float16)
        for module in ("gate_proj", "up_proj")
    }
    with open_checkpoint(make_folder(weights)) as checkpoint:
        specs = [WeightSpec(name, values.shape, "linear") for name, values in weights.items()]
        info = write_archive(checkpoint, plan_weights(checkpoint, specs), tmp_path / "params.irpa")
    assert info.merged == ()
    contents = entry_contents(tmp_path / "params.irpa")
    assert contents == {f"{name}.w": pack_tile16("f16", {"w": w})["w"].tobytes() for name, w in weights.items()}


PROBE = """
module @probe {{
  util.global private @merged = #flow.parameter.named<"model"::"{merged}.w"> : tensor<{tiles}x{columns}x16xf16>
  util.global private @up = #flow.parameter.named<"model"::"{up}.w"> : tensor<{up_tiles}x{columns}x16xf16>
  func.func @main() -> (tensor<1x{columns}x16xf16>, tensor<1x{columns}x16xf16>) {{
    %merged = util.global.load @merged : tensor<{tiles}x{columns}x16xf16>
    %up = util.global.load @up : tensor<{up_tiles}x{columns}x16xf16>
    %part = tensor.extract_slice %merged[{gate_tiles}, 0, 0] [1, {columns}, 16] [1, 1, 1]
        : tensor<{tiles}x{columns}x16xf16> to tensor<1x{columns}x16xf16>
    %whole = tensor.extract_slice %up[0, 0, 0] [1, {columns}, 16] [1, 1, 1]
        : tensor<{up_tiles}x{columns}x16xf16> to tensor<1x{columns}x16xf16>
    return %part, %whole : tensor<1x{columns}x16xf16>, tensor<1x{columns}x16xf16>
  }}
}}
"""

PROBE_CHILD = """
import sys
import iree.runtime as rt
from llmir_iree.machine import anonymous_memory
module, archive = sys.argv[1:]
config = rt.Config("local-sync")
index = rt.ParameterIndex()
index.load(archive, mmap=True)
before = anonymous_memory()
parameters = rt.create_io_parameters_module(config.vm_instance, index.create_provider(scope="model"))
modules = rt.load_vm_modules(parameters, rt.VmModule.mmap(config.vm_instance, module), config=config)
part, whole = (result.to_host() for result in modules[-1].main())
print(int((part == whole).all()), int(part.any()), anonymous_memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to tell anonymous memory from mapped")
def test_a_module_maps_a_merged_weight_and_a_sibling_onto_the_same_file(make_folder, tmp_path):
    gate_rows, up_rows, columns = 16384, 8192, 1024
    rng = np.random.default_rng(0)
    gate, up = f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"
    weights = {
        name: rng.integers(0, 0x3C00, (rows, columns), np.uint16).view(np.float16)
        for name, rows in ((gate, gate_rows), (up, up_rows))
    }
    archive = tmp_path / "params.irpa"
    with open_checkpoint(make_folder(weights)) as checkpoint:
        specs = [WeightSpec(name, values.shape, "linear") for name, values in weights.items()]
        (merged_weight,) = write_archive(checkpoint, plan_weights(checkpoint, specs), archive).merged
    probe = PROBE.format(
        merged=merged_weight.name,
        up=up,
        columns=columns,
        tiles=(gate_rows + up_rows) // 16,
        gate_tiles=gate_rows // 16,
        up_tiles=up_rows // 16,
    )
    compile_mlir(probe, tmp_path / "probe.vmfb", resolve_target("llvm-cpu").flags)
    command = [sys.executable, "-c", PROBE_CHILD, str(tmp_path / "probe.vmfb"), str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    equal, nonzero, growth = map(int, done.stdout.split())
    assert equal
    assert nonzero
    assert growth < up_rows * columns * 2  # neither was copied: the smaller has 16 MiB, both 64


def test_entries_with_a_gap_are_not_spanned():
    with pytest.raises(LlmirError, match="an entry at byte 192, not behind the one at 0"):
        _span([ArchiveEntry(0, 128), ArchiveEntry(192, 64)])
    assert _span([ArchiveEntry(64, 128), ArchiveEntry(192, 40)]) == (64, 168)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: b"GGUF" + header[4:], "b'GGUF' 0.0; known is b'IRPA' 0.0"),
        (lambda header: header[:4] + b"\1" + header[5:], r"b'IRPA' 1\.0; known"),
        (lambda header: header, "IREE wrote no entry v"),
    ],
)
def test_archives_that_iree_did_not_write_as_expected(change, message, make_folder, tmp_path):
    path = tmp_path / "params.irpa"
    with open_checkpoint(make_folder({"w": np.ones((2, 32), np.float32)})) as checkpoint:
        write_archive(checkpoint, plan_weights(checkpoint, [WeightSpec("w", (2, 32), "linear")]), path)
    path.write_bytes(change(path.read_bytes()))
    with path.open("r+b") as file, pytest.raises(LlmirError, match=message):
        set_spans(file, {"v": (4096, 64)})
