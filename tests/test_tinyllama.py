"""TinyLlama-1.1B shapes with seeded random weights, from a `.pt`: exports, compiles, runs, within its memory."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmir_iree.bundle import Bundle

SHAPES = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
MIB = 1 << 20
PAGES = 33


def state_dict() -> dict[str, torch.Tensor]:
    """float16 weights under their transformers names; repeats of one random run, which is quick to make."""
    from transformers import AutoConfig, AutoModelForCausalLM

    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES))
    weights = {}
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        is_norm = parameter.dim() == 1
        values = torch.ones(size, dtype=torch.float16) if is_norm else noise.repeat(-(-size // len(noise)))[:size]
        weights[name] = values.reshape(parameter.shape)
    return weights


def peak_anonymous_mib(command: list[str]) -> float:
    """Run a command and watch the anonymous memory of its process: the largest RssAnon seen, in MiB."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            match = re.search(r"RssAnon:\s+(\d+) kB", status)
            peak = max(peak, int(match[1]) if match else 0)
            time.sleep(0.02)
        assert process.stderr is not None
        assert process.wait() == 0, process.stderr.read()
    return peak / 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("tinyllama") / "model.pt"
    torch.save({"config": SHAPES, "model": state_dict()}, file)
    yield file
    file.unlink()


def test_exports_compiles_and_decodes_within_its_memory(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    command = [str(Path(sys.executable).with_name("llmir-export")), str(checkpoint), "-o", str(bundle)]
    exporting = peak_anonymous_mib([*command, "--quant", "q4_0", "--batch", "1", "--quiet"])
    assert exporting < checkpoint.stat().st_size / MIB / 4 + 1024

    cache = PAGES * Bundle.open(bundle).manifest.cache.page_bytes
    running = peak_anonymous_mib([sys.executable, "-c", RUN, str(bundle), str(PAGES)])
    assert running < 200 + cache / MIB + ACTIVATIONS_MIB


# One prefill of 64 tokens: logits, the hidden states of a layer, and scores of 32 heads.
ACTIVATIONS_MIB = 8

RUN = """
import sys
import numpy as np
from llmir_iree.bundle import Bundle
from llmir_iree.session import Session

session = Session(Bundle.open(sys.argv[1]), pages=int(sys.argv[2]), max_seq_len=1024)
table = np.arange(1, 5, dtype=np.int32)[None]
one = np.ones(1, np.int32)
prompt = np.random.default_rng(0).integers(0, 32000, (1, 64), dtype=np.int32)
result = session.run("prefill", 1, prompt, 0 * one, 64 * one, table)
seen = [result.next_token()[0]]
for position in range(64, 68):
    result = session.run("decode", 1, result.next_token()[:, None], position * one, one, table)
    seen.append(result.next_token()[0])
    assert np.isfinite(result.logits()).all() and result.logits().std() > 0
"""
