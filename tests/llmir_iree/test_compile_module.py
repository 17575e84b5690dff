"""llmir-compile MODULE.mlir: what it compiles, what it says, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import iree.runtime as rt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from iree.compiler import ir
from iree.turbine import aot
from torch import Tensor

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.cli.compile import main

CACHE, QUERY = (5, 2, 2, 8, 16), (1, 4, 1, 16)


class Op(torch.nn.Module):
    """One of our ops, called by its name."""

    def forward(self, query: Tensor, cache: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        return torch.ops.llmir.paged_attention(query, cache, table, positions, 0, 0.25, 0, 0.0)[0]


class Plain(torch.nn.Module):
    """The same as torch has it, and an attention that is none over pages."""

    def forward(self, query: Tensor, cache: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        key, value = cache[table].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).float()
        mask = torch.arange(key.shape[2]) <= positions[:, None, :, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return F.scaled_dot_product_attention(attended, attended, attended).transpose(1, 2)


def arguments() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    table, positions = torch.tensor([[3, 1]]), torch.tensor([[12]])
    return torch.randn(QUERY), torch.randn(CACHE).half(), table, positions


def write(module: torch.nn.Module, file: Path, *tensors: Tensor) -> Path:
    aot.export(torch.export.export(module, tensors, strict=False)).save_mlir(file)
    return file


@pytest.fixture(scope="module")
def op_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    query, cache, table, positions = arguments()
    tensors = (query.transpose(1, 2), cache[:, None], table.int(), positions.int())
    return write(Op(), tmp_path_factory.mktemp("op") / "op.mlir", *tensors)


@pytest.fixture(scope="module")
def plain_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Plain(), tmp_path_factory.mktemp("plain") / "plain.mlir", *arguments())


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["--quiet", *map(str, words)], prog_name="llmir-compile")


def output_of(file: Path, *tensors: Tensor) -> np.ndarray:
    module = rt.load_vm_flatbuffer_file(str(file), driver="local-sync")
    result: np.ndarray = module.main(*(tensor.numpy() for tensor in tensors)).to_host()
    return result


def test_a_module_with_our_ops(op_module: Path, tmp_path: Path) -> None:
    done = run(op_module, "-o", tmp_path / "op.vmfb")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "paged_attention: 1 by cpu-kernels\n"
    query, cache, table, positions = arguments()
    tensors = (query.transpose(1, 2).contiguous(), cache[:, None], table.int(), positions.int())
    np.testing.assert_allclose(output_of(tmp_path / "op.vmfb", *tensors), Op()(*tensors).numpy(), atol=1e-6)


def test_a_plain_module_with_match_says_what_it_did(plain_module: Path, tmp_path: Path) -> None:
    output = tmp_path / "plain.vmfb"
    done = run(plain_module, "--match", "-o", output, "--json", "--target", "llvm-cpu", "--", "--iree-opt-level=O2")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["implementations"] == {"paged_attention": {"cpu-kernels": 1}}
    assert (said["file"], said["target"], said["driver"]) == (str(output), "llvm-cpu", "local-task")
    assert said["flags"][-1] == "--iree-opt-level=O2"
    assert {"match-paged-attention", "match-quantized-matmul", "lower-llmir-ops"} <= set(said["passes"])
    [line] = said["left_alone"]
    assert line.startswith("scaled_dot_product_attention number 2, of queries vtensor<[1,4,1,16],f32>: keys and values")
    np.testing.assert_allclose(output_of(output, *arguments()), Plain()(*arguments()).numpy(), atol=1e-6)
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_left_alone_is_told_on_stderr(plain_module: Path, tmp_path: Path) -> None:
    done = run(plain_module, "--match", "-o", tmp_path / "plain.vmfb", "--implementations", "portable")
    assert done.stdout == "paged_attention: 1 by portable\n"
    assert done.stderr.startswith("left alone: scaled_dot_product_attention number 2")


def test_bytecode_is_read_as_well(op_module: Path, tmp_path: Path) -> None:
    with ir.Context(), ir.Location.unknown(), (tmp_path / "op.mlirbc").open("wb") as stream:
        ir.Module.parse(op_module.read_text()).operation.write_bytecode(stream)
    done = run(tmp_path / "op.mlirbc", "-o", tmp_path / "op.vmfb")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "op.vmfb").stat().st_size > 1000


def refusal(*words: str | Path) -> str:
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("llmir-compile: error: ")
    return line.removeprefix("llmir-compile: error: ")


def test_files_that_are_no_module(op_module: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.vmfb"
    assert refusal(tmp_path / "none.mlir", "-o", output) == f"{tmp_path / 'none.mlir'}: no such file"
    assert refusal(tmp_path / "none", "-o", output) == f"{tmp_path / 'none'}: no such file"
    (tmp_path / "words.mlir").write_text("Once upon a time\n" * 1000)
    assert refusal(tmp_path / "words.mlir", "-o", output).startswith(
        f"{tmp_path / 'words.mlir'}: the module is not valid MLIR: "
    )
    (tmp_path / "bytes.mlir").write_bytes(bytes(range(256)))
    assert "is not valid MLIR: neither text nor bytecode" in refusal(tmp_path / "bytes.mlir", "-o", output)
    (tmp_path / "cut.mlirbc").write_bytes(b"ML\xefR\x01")
    assert "is not valid MLIR" in refusal(tmp_path / "cut.mlirbc", "-o", output)
    assert not output.exists()


def test_a_module_without_anything_to_put_in(plain_module: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.vmfb"
    line = refusal(plain_module, "-o", output)
    assert 'it holds no op of ours (torch.operator "torch.llmir.*")' in line
    assert "--match also takes attention over gathered pages" in line
    near = write(Near(), tmp_path / "near.mlir", torch.randn(QUERY))
    assert "number 1, of queries vtensor<[1,4,1,16],f32>: " in refusal(near, "-o", output, "--match")
    empty = tmp_path / "empty.mlir"
    empty.write_text("module {}")
    assert "neither attention nor a product by unpacked weights" in refusal(empty, "-o", output, "--match")


class Near(torch.nn.Module):
    def forward(self, query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query)


def test_options_that_go_with_the_other_kind(op_module: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.vmfb"
    assert "a module needs a file to be compiled to; name it with -o" in refusal(op_module)
    one_target = "a module is compiled for one --target; --dump-ir and --emit-spec are for bundles"
    assert refusal(op_module, "-o", output, "--emit-spec", tmp_path / "spec") == one_target
    assert refusal(op_module, "-o", output, "--dump-ir", tmp_path / "dump") == one_target
    assert refusal(op_module, "-o", output, "--target", "llvm-cpu", "--target", "cuda") == one_target
    assert "--output and --match are for modules" in refusal(tmp_path, "--match")
    assert "--output and --match are for modules" in refusal(tmp_path, "-o", output)
    assert refusal(op_module, "-o", tmp_path / "no" / "out.vmfb").endswith("there is no such folder to write to")
    assert refusal(op_module, "-o", tmp_path).endswith("is a folder")
    assert "unknown target" in refusal(op_module, "-o", output, "--target", "tpu")


def test_a_size_that_must_be_known(op_module: Path, tmp_path: Path) -> None:
    text = op_module.read_text().replace("[1,1,4,16]", "[?,1,4,16]")
    (tmp_path / "dynamic.mlir").write_text(text)
    line = refusal(tmp_path / "dynamic.mlir", "-o", tmp_path / "out.vmfb")
    assert "llmir.paged_attention: size 0 of operand 0 must be known, it is tensor<?x1x4x16xf32>" in line


def test_a_failure_leaves_what_was_there(op_module: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.vmfb"
    shutil.copyfile(op_module, output)
    assert "no-such-flag" in refusal(op_module, "-o", output, "--", "--no-such-flag")
    assert output.read_bytes() == op_module.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"out.vmfb"}
