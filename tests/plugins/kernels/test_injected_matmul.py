"""Kernels inside compiled modules: through the definition, iree-compile and the runtime."""

import numpy as np
import pytest
import torch
from iree import runtime
from iree.compiler import ir
from iree.compiler.tools import compile_str

from llmir_iree.export.dequantize import dequantize
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import pack_tile16
from llmir_iree.plugins.calls import LlmirCall, TensorType
from llmir_iree.plugins.kernels import build, definitions
from llmir_iree.plugins.kernels import objects as objects_module
from llmir_iree.plugins.kernels.definitions import accepts_quantized_matmul, quantized_matmul
from llmir_iree.targets import resolve_target

TARGET = resolve_target("llvm-cpu")


def matmul_call(weight_format, tiles, columns, depth, seq, layout="tile16"):
    planes = tuple(TensorType(plane.shape, "f16" if plane.dtype == np.float16 else "i8") for plane in tiles.values())
    constants = (("format", weight_format), ("layout", layout), ("out_features", columns))
    y = TensorType((2, seq, columns), "f32")
    return LlmirCall("quantized_matmul", (TensorType((2, seq, depth), "f32"), *planes), (y,), constants)


def module_of(call):
    """A module whose function `main` takes x and the planes of one call."""
    functions = quantized_matmul(call, TARGET)
    names = [f"%argument{index}" for index in range(len(call.operands))]
    arguments = ", ".join(f"{name}: {operand}" for name, operand in zip(names, call.operands, strict=True))
    operands = ", ".join(map(str, call.operands))
    return "\n".join(functions.values()) + (
        f"\nutil.func public @main({arguments}) -> {call.results[0]} {{\n"
        f"  %y = util.call @{call.symbol}({', '.join(names)}) : ({operands}) -> {call.results[0]}\n"
        f"  util.return %y : {call.results[0]}\n}}"
    )


@pytest.mark.parametrize("weight_format", ["q4_0", "q4_1", "q8_0", "q6_k"])
def test_compiled_module_multiplies(objects, weight_format, monkeypatch):
    columns, depth = 41, 512
    rng = np.random.default_rng(0)
    shapes = FORMATS[weight_format].plane_shapes(columns, depth)
    planes = {}
    for plane in FORMATS[weight_format].planes:
        shape = shapes[plane.name]
        if plane.dtype == np.float16:
            planes[plane.name] = rng.standard_normal(shape).astype(np.float16)
        else:
            planes[plane.name] = rng.integers(0, 256, shape, np.uint8).view(plane.dtype)
    tiles = pack_tile16(weight_format, planes)
    call = matmul_call(weight_format, tiles, columns, depth, None)
    assert accepts_quantized_matmul(call, TARGET)
    monkeypatch.setattr(objects_module, "PACKAGED", objects.parent)
    monkeypatch.setattr(definitions, "find_variants", lambda _: [build.VARIANTS[objects.name]])
    text = module_of(call)
    with ir.Context(), ir.Location.unknown():
        ir.Module.parse(text).operation.verify()
    binary = compile_str(text, input_type="none", extra_args=TARGET.flags)
    config = runtime.Config("local-sync")
    instance = runtime.VmModule.copy_buffer(config.vm_instance, binary)
    module = runtime.load_vm_module(instance, config)

    weights = dequantize(weight_format, [torch.from_numpy(plane) for plane in planes.values()]).double().numpy()
    for seq in (1, 5):
        x = rng.standard_normal((2, seq, depth)).astype(np.float32)
        y = module.main(x, *(plane.view(np.int8) if plane.dtype == np.uint8 else plane for plane in tiles.values()))
        size = np.abs(x.astype(np.float64)) @ np.abs(weights).T
        error = np.abs(y.to_host() - x.astype(np.float64) @ weights.T) / size
        assert error.max() < 4e-3


def test_only_tiles_are_accepted():
    planes = {name: np.zeros(shape, np.float16) for name, shape in FORMATS["q4_0"].plane_shapes(32, 64).items()}
    assert not accepts_quantized_matmul(matmul_call("q4_0", planes, 32, 64, 1), TARGET)
    assert not accepts_quantized_matmul(matmul_call("q4_0", planes, 32, 64, 1, layout="planes"), TARGET)
