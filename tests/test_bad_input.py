"""Bad input at the command lines: exit code 2, one line that names what is wrong, and nothing half written."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmir_iree.bundle import Bundle
from llmir_iree.cli import compile as compile_cli
from llmir_iree.cli import export as export_cli
from llmir_iree.cli import run as run_cli


def one_line(arguments: list[str], command: Any = export_cli.main) -> str:
    """Run a command line that must fail; its error line."""
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line.lower()]
    assert len(lines) == 1, result.stderr
    return lines[0]


def refused(source: Path | str, tmp_path: Path, *options: str) -> str:
    """Export a bad source; the error line, after checking that no bundle and no part of one is left."""
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    line = one_line([str(source), "-o", str(folder / "bundle"), "--no-compile", "--quiet", *options])
    assert list(folder.iterdir()) == []
    return line


def gguf(tensors: int, fields: bytes, count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


ARCHITECTURE = gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama")


def gguf_tensor(dimensions: list[int], offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return gguf_string("token_embd.weight") + shape + struct.pack("<IQ", 0, offset)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "nowhere.gguf" in refused(tmp_path / "nowhere.gguf", tmp_path)


def test_truncated_safetensors(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (gguf(1, ARCHITECTURE + gguf_tensor([32, 32], 1 << 40)), "token_embd.weight"),
        (gguf(0, gguf_string("a") + struct.pack("<IIQ", 9, 0, 1 << 63))[:43], "array"),
        (gguf(1, ARCHITECTURE + gguf_tensor([1 << 32, 1 << 32], 0)), "token_embd.weight"),
    ],
    ids=["offset past its end", "array of 2^63 elements", "dimensions that wrap to 0"],
)
def test_a_damaged_gguf(content: bytes, word: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    line = refused(file, tmp_path)
    assert "bad.gguf" in line
    assert word in line


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_would_execute_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"model": Payload(marker)}, tmp_path / "evil.pt")
    assert "evil.pt" in refused(tmp_path / "evil.pt", tmp_path)
    assert not marker.exists()


def test_a_missing_tensor(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder, tmp_path)


def test_a_misshapen_tensor(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 32)
    torch.save(weights, folder / "model.pt")
    line = refused(folder / "model.pt", tmp_path)
    assert "[128, 32]" in line.replace("(", "[").replace(")", "]")
    assert "[128, 64]" in line.replace("(", "[").replace(")", "]")


def test_a_state_dict_without_a_config(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(4)}, tmp_path / "model.pt")
    line = refused(tmp_path / "model.pt", tmp_path)
    assert "--config" in line
    assert "config.json" in line


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_model_that_is_not_decoder_only(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "is_encoder_decoder": model_type == "t5"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "decoder-only" in refused(folder, tmp_path)


def test_an_unknown_target(smollm2_bundle: Bundle, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    known = "unknown target 'tpu'; known: llvm-cpu, cuda, rocm, metal, vulkan"
    source = str(tiny_checkpoint("llama"))
    assert known in one_line([source, "-o", str(tmp_path / "bundle"), "--target", "tpu"])
    assert known in one_line([str(smollm2_bundle.folder), "--target", "tpu"], compile_cli.main)
    assert not (tmp_path / "bundle").exists()


def test_options_out_of_range(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    assert "256 positions" in refused(source, tmp_path, "--max-seq-len", "300")
    assert "power of two" in refused(source, tmp_path, "--page-size", "24")
    assert "1,x" in refused(source, tmp_path, "--batch", "1,x")


def test_a_folder_that_is_not_a_bundle_is_left_alone(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    line = one_line([str(tiny_checkpoint("llama")), "-o", str(tmp_path), "--no-compile", "--quiet"])
    assert "not a bundle" in line
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_module_of_another_bundle(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    target = smollm2_bundle.target("llvm-cpu")
    copy = tmp_path / "bundle"
    shutil.copytree(smollm2_bundle.folder, copy, ignore=shutil.ignore_patterns("params.irpa"))
    (copy / "params.irpa").symlink_to(smollm2_bundle.path("params.irpa"))
    shutil.copy(copy / target.modules["prefill"].file, copy / target.modules["decode"].file)
    line = one_line([str(copy / target.modules["decode"].file), "--prompt", "Hello"], run_cli.main)
    assert "not the module that this bundle's manifest describes" in line
    loose = tmp_path / "decode.vmfb"
    shutil.copy(smollm2_bundle.path(target.modules["decode"].file), loose)
    assert "not inside a bundle" in one_line([str(loose), "--prompt", "Hello"], run_cli.main)


def test_iree_compile_s_own_errors(smollm2_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(smollm2_bundle.folder, copy, ignore=shutil.ignore_patterns("params.irpa", "*.vmfb"))
    line = one_line([str(copy), "--quiet", "--", "--no-such-flag"], compile_cli.main)
    assert "--no-such-flag" in line
    assert "repeat with" in line
    assert list((copy / "llvm-cpu").iterdir()) == []


# The signal that comes with the limit would end the process; without it, writing fails with an error.
EXPORT = """
import signal
from llmir_iree.cli.export import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
main()
"""


def test_a_full_disk(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writing past it fails in the same place."""
    source = tiny_checkpoint("llama", hidden_size=512, intermediate_size=2048, head_dim=128)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    output = tmp_path / "out" / "bundle"
    output.parent.mkdir()
    program = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from llmir_iree.cli.export import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), "-o", str(output), "--no-compile", "--quiet", "--batch", "1"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(output.parent.iterdir()) == []
