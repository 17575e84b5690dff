"""Compiles `llmir` ops with what the seam chooses for a GPU, and runs them on lavapipe, Vulkan's software device."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import iree.runtime as rt
import ml_dtypes
import numpy as np
import pytest
import torch

from llmir_iree.compile import compile_mlir
from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.lowering import Lowering, Target
from llmir_iree.plugins.seam import choose
from llmir_iree.targets import resolve_target

LAVAPIPE = "vulkan:llvmpipe"

Run = Callable[..., tuple[np.ndarray, ...]]
Step = tuple[LlmirCall, Sequence[int]]
Emit = Callable[[LlmirCall, Target], dict[str, str]]


def module_of(
    target_name: str,
    steps: Sequence[Step],
    inputs: Sequence[TensorType],
    outputs: Sequence[int],
    emit: Emit | None = None,
    layer: int = 1,
) -> str:
    """A module whose function `main` makes calls one after the other.

    Args:
        target_name: what to compile for.
        steps: calls, and where their operands stand among the inputs and all results so far.
        inputs: types of the arguments.
        outputs: which of the inputs and results to return.
        emit: what gives the calls' definitions; by default the implementations that are chosen.
        layer: what calls with a layer are passed.
    """
    target = resolve_target(target_name)
    functions: dict[str, str] = {}
    lines = [f"  %layer = arith.constant {layer} : index"]
    kinds = list(inputs)
    for call, operands in steps:
        functions |= (emit or choose(call, Lowering(target)).emit)(call, target)
        results = ", ".join(f"%v{len(kinds) + index}" for index in range(len(call.results)))
        values = [f"%v{index}" for index in operands] + ["%layer"] * (call.layer is not None)
        types = [*map(str, call.operands)] + ["index"] * (call.layer is not None)
        lines.append(
            f"  {results} = util.call @{call.symbol}({', '.join(values)}) : "
            f"({', '.join(types)}) -> ({', '.join(map(str, call.results))})"
        )
        kinds += call.results
    arguments = ", ".join(f"%v{index}: {kind}" for index, kind in enumerate(inputs))
    returned = ", ".join(str(kinds[index]) for index in outputs)
    lines.append(f"  util.return {', '.join(f'%v{index}' for index in outputs)} : {returned}")
    body = "\n".join(lines)
    return "\n".join(functions.values()) + f"\nutil.func public @main({arguments}) -> ({returned}) {{\n{body}\n}}\n"


def load(text: str, target_name: str, device: rt.HalDevice, folder: Path) -> Run:
    """Compile a module in a folder of its own, and give what runs its function `main` on tensors."""
    file = folder / "module.vmfb"
    compile_mlir(text, file, resolve_target(target_name).flags)
    config = rt.Config(device=device)
    module = rt.load_vm_module(rt.VmModule.mmap(config.vm_instance, str(file)), config)

    def run(*arguments: torch.Tensor) -> tuple[np.ndarray, ...]:
        results = module.main(*map(_as_numpy, arguments))
        results = results if isinstance(results, tuple) else (results,)
        return tuple(read_back(device, result) for result in results)

    return run


@pytest.fixture(scope="module")
def vulkan_device(lavapipe: str) -> rt.HalDevice:
    """The software device, opened."""
    return rt.get_device(lavapipe)


@pytest.fixture(scope="module")
def run_on_lavapipe(vulkan_device: rt.HalDevice, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Compiles what `module_of` makes of its other arguments, and gives what runs it."""

    def compile_and_load(steps: Sequence[Step], inputs: Sequence[TensorType], outputs: Sequence[int]) -> Run:
        text = module_of(LAVAPIPE, steps, inputs, outputs)
        return load(text, LAVAPIPE, vulkan_device, tmp_path_factory.mktemp("compiled"))

    return compile_and_load


def type_of(tensor: torch.Tensor, *dynamic: int) -> TensorType:
    """A tensor's type in a module, with some of its dimensions dynamic."""
    elements = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "uint8": "i8", "int8": "i8"}
    shape = tuple(None if index in dynamic else size for index, size in enumerate(tensor.shape))
    return TensorType(shape, elements[str(tensor.dtype).removeprefix("torch.")])


def read_back(device: rt.HalDevice, array: Any) -> np.ndarray:
    """A copy of an array, by way of a buffer that both sides see: IREE 3.13 cannot import the host's own on Vulkan."""
    view = array._buffer_view
    source = view.get_buffer()
    staging = device.allocator.allocate_buffer(
        memory_type=int(rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE),
        allowed_usage=int(rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING_SCOPED),
        allocation_size=source.byte_length(),
    )
    semaphore = device.create_semaphore(0)
    done = rt.HalFence.create_at(semaphore, 1)
    device.queue_copy(source, staging, wait_semaphores=rt.HalFence.create_at(semaphore, 0), signal_semaphores=done)
    done.wait()
    element = rt.HalElementType.map_to_dtype(view.element_type)
    return np.array(staging.map().asarray(view.shape, element))


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.uint8:  # signless in a module
        return tensor.view(torch.int8).numpy()
    return tensor.numpy()
