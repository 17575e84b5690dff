"""The table of targets, held to what iree-compile knows of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmir_iree.cli import compile as compile_cli
from llmir_iree.compile import compile_mlir
from llmir_iree.params.errors import TargetError
from llmir_iree.targets import FAMILIES, Chip, Family, resolve_target

MODULE = "func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> { return %a : tensor<4xf32> }"
GPU_CHIPS = [(family, chip) for family in FAMILIES if family.name != "llvm-cpu" for chip in family.chips]


@pytest.mark.parametrize(("family", "chip"), GPU_CHIPS, ids=lambda value: value.name or "default")
def test_the_compiler_knows_a_chip_as_the_table_does(family: Family, chip: Chip, tmp_path: Path) -> None:
    output = tmp_path / "module.mlir"
    compile_mlir(MODULE, output, (*family.flags, *chip.flags, "--compile-to=preprocessing"))
    known = output.read_text()
    assert set(re.findall(r'#hal\.device\.target<"(\w+)"', known)) == {family.driver}
    [choices] = set(re.findall(r"subgroup_size_choices = \[([\d, ]+)\]", known))
    assert chip.subgroup_size == int(choices.split(",")[0])
    mma = re.findall(r"<\w*M\w*MA\w*_\w+>", known)
    features = {
        "f16-mma": any(re.search(r"F32_\d+x\d+x\d+_F16>", name) for name in mma),
        "bf16-mma": any(re.search(r"F32_\d+x\d+x\d+_BF16>", name) for name in mma),
        "i8-mma": any(re.search(r"I32_\d+x\d+x\d+_I8>", name) for name in mma),
        "i8-dot": "dp4xi8toi32" in known,
    }
    assert chip.features == tuple(name for name, has in features.items() if has)


def test_a_family_alone_means_its_first_chip() -> None:
    assert resolve_target("cuda").chip == "sm_80"
    assert resolve_target("cuda").flags == resolve_target("cuda:sm_80").flags
    assert resolve_target("cuda").folder != resolve_target("cuda:sm_80").folder
    assert resolve_target("host") == resolve_target("llvm-cpu")
    assert resolve_target("rocm:gfx1100").subgroup_size == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "unknown target 'tpu'; known: llvm-cpu, cuda, rocm, metal, vulkan, host"),
        ("cuda:sm_81", "target 'cuda:sm_81': unknown chip; known for cuda: sm_80, .*sm_90, sm_120"),
        ("cuda:", "target 'cuda:': unknown chip"),
        ("vulkan:sm_90", "known for vulkan: rdna3, .*llvmpipe"),
        ("metal:m3", "target 'metal:m3': unknown chip; known for metal: none, write the family alone"),
        ("llvm-cpu:a b", "target 'llvm-cpu:a b': unknown chip; known for llvm-cpu: host, generic"),
    ],
)
def test_what_is_not_in_the_table_is_refused(name: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve_target(name)


def test_the_list_names_every_target() -> None:
    listed = CliRunner().invoke(compile_cli.main, ["--list-targets"])
    data = CliRunner().invoke(compile_cli.main, ["--list-targets", "--json"])
    assert (listed.exit_code, data.exit_code) == (0, 0)
    targets = {target["name"]: target for target in json.loads(data.stdout)}
    text = " ".join(listed.stdout.split())
    for family in FAMILIES:
        for chip in family.chips:
            name = f"{family.name}:{chip.name}".rstrip(":")
            assert f" {chip.name or family.name} " in text
            assert targets[name]["driver"] == family.driver
    assert targets["vulkan:llvmpipe"]["subgroup_size"] == 8
    assert CliRunner().invoke(compile_cli.main, []).exit_code == 2
