"""Compiles a torch module that calls `llmir` ops through the plugin, and runs it on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import iree.runtime as rt
import ml_dtypes
import numpy as np
import pytest
import torch
from iree.turbine import aot

from llmir_iree.compile import compile_mlir
from llmir_iree.devices import to_host
from llmir_iree.plugins.lowering import Preference
from llmir_iree.plugins.pipeline import Lowered, lower
from llmir_iree.targets import resolve_target

Run = Callable[..., tuple[np.ndarray, ...]]
Compile = Callable[..., Run]


@pytest.fixture(scope="session")
def compile_for_cpu(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    def compile_for_cpu(
        module: torch.nn.Module,
        *examples: Any,
        dynamic_shapes: Any = None,
        implementations: Preference = "portable",
    ) -> Run:
        exported = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes, strict=False)
        portable = str(aot.export(exported).mlir_module)
        target = resolve_target("llvm-cpu")
        file: Path = tmp_path_factory.mktemp("compiled") / "module.vmfb"
        compile_mlir(lower(portable, target, implementations).text, file, target.flags)
        loaded = rt.load_vm_flatbuffer_file(str(file), driver="local-sync")

        def run(*arguments: torch.Tensor) -> tuple[np.ndarray, ...]:
            results = loaded.main(*map(_as_numpy, arguments))
            results = results if isinstance(results, tuple) else (results,)
            return tuple(result.to_host().copy() for result in results)

        return run

    return compile_for_cpu


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.uint8:  # signless in a module
        return tensor.view(torch.int8).numpy()
    return tensor.numpy()


def export_torch(module: torch.nn.Module, *examples: Any, dynamic_shapes: Any = None) -> str:
    """The MLIR that iree-turbine makes of a torch module."""
    exported = torch.export.export(module, examples, dynamic_shapes=dynamic_shapes, strict=False)
    return str(aot.export(exported).mlir_module)


@pytest.fixture
def run_matched(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., tuple[Lowered, np.ndarray]]:
    """Matches what a text holds, compiles it for a target and runs it; the lowering and the one result."""

    def run(
        text: str, target_name: str, *arguments: torch.Tensor, implementations: Preference = "best"
    ) -> tuple[Lowered, np.ndarray]:
        target = resolve_target(target_name)
        uri = request.getfixturevalue("lavapipe") if target.driver == "vulkan" else "local-sync"
        lowered = lower(text, target, implementations, match=True)
        file = tmp_path / "module.vmfb"
        compile_mlir(lowered.text, file, target.flags)
        device = rt.get_device(uri)
        config = rt.Config(device=device)
        loaded = rt.load_vm_module(rt.VmModule.mmap(config.vm_instance, str(file)), config)
        result = loaded.main(*map(_as_numpy, arguments))
        return lowered, to_host(device, uri, result._buffer_view)

    return run
