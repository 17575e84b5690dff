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
from llmir_iree.plugins.kernels.definitions import accepts_quantized_matmul, quantized_matmul, quantized_type
from llmir_iree.targets import resolve_target
from tests.plugins.kernels.conftest import dequantize_activations, rounding_bound

TARGET = resolve_target("llvm-cpu")


def matmul_call(weight_format, tiles, columns, depth, seq, layout="tile16"):
    constants = (("format", weight_format), ("layout", layout), ("out_features", columns))
    y = TensorType((2, seq, columns), "f32")
    return LlmirCall("quantized_matmul", (TensorType((2, seq, depth), "f32"), *types_of(tiles)), (y,), constants)


def module_of(call):
    """A module whose function `main` takes x and the planes of one call."""
    return wrap([(call, quantized_matmul, range(len(call.operands)))], call.operands, call.results)


def wrap(steps, inputs, outputs):
    """A module whose function `main` makes calls one after the other.

    Each step is a call, its definition, and where its operands stand among the inputs and all results so far; the last
    results are the outputs.
    """
    functions, lines = {}, []
    values = [f"%input{index}" for index in range(len(inputs))]
    arguments = ", ".join(f"{name}: {kind}" for name, kind in zip(values, inputs, strict=True))
    for call, define, operands in steps:
        functions |= define(call, TARGET)
        results = [f"%value{len(values) + index}" for index in range(len(call.results))]
        lines.append(
            f"  {', '.join(results)} = util.call @{call.symbol}({', '.join(values[index] for index in operands)}) : "
            f"({', '.join(map(str, call.operands))}) -> ({', '.join(map(str, call.results))})"
        )
        values += results
    types = ", ".join(map(str, outputs))
    lines.append(f"  util.return {', '.join(values[-len(outputs) :])} : {types}")
    body = "\n".join(lines)
    return "\n".join(functions.values()) + f"\nutil.func public @main({arguments}) -> ({types}) {{\n{body}\n}}"


def random_planes(rng, weight_format, columns, depth, scale=1.0):
    """Tiles of a random matrix as a module takes them, and the float64 weights that they stand for."""
    shapes = FORMATS[weight_format].plane_shapes(columns, depth)
    planes = {}
    for plane in FORMATS[weight_format].planes:
        shape = shapes[plane.name]
        if plane.dtype == np.float16:
            planes[plane.name] = (rng.standard_normal(shape) * scale).astype(np.float16)
        else:
            planes[plane.name] = rng.integers(0, 256, shape, np.uint8).view(plane.dtype)
    weights = dequantize(weight_format, [torch.from_numpy(plane) for plane in planes.values()]).double().numpy()
    return pack_tile16(weight_format, planes), weights


def as_arguments(tiles):
    """Tiles with their unsigned bytes as the signless ones of a module."""
    return [plane.view(np.int8) if plane.dtype == np.uint8 else plane for plane in tiles.values()]


def types_of(tiles):
    """Types of a module's arguments that are tiles."""
    return tuple(TensorType(plane.shape, "f16" if plane.dtype == np.float16 else "i8") for plane in tiles.values())


def compile_and_load(text):
    """The module, compiled and loaded."""
    with ir.Context(), ir.Location.unknown():
        ir.Module.parse(text).operation.verify()
    binary = compile_str(text, input_type="none", extra_args=TARGET.flags)
    config = runtime.Config("local-sync")
    return runtime.load_vm_module(runtime.VmModule.copy_buffer(config.vm_instance, binary), config)


@pytest.fixture
def load(runnable_objects, monkeypatch):
    """Compile a module with one instruction set's kernels, which `wrap` finds while it runs, and load it."""
    monkeypatch.setattr(objects_module, "PACKAGED", runnable_objects.parent)
    monkeypatch.setattr(definitions, "find_variants", lambda _: [build.VARIANTS[runnable_objects.name]])
    return compile_and_load


def relative_error(y, x, weights):
    """Largest error of a product, as a part of what the magnitudes of its terms add up to."""
    return (np.abs(y - x @ weights.T) / (np.abs(x) @ np.abs(weights).T)).max()


@pytest.mark.parametrize("weight_format", ["q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k"])
def test_compiled_module_multiplies(load, weight_format):
    columns, depth = 41, 512
    rng = np.random.default_rng(0)
    tiles, weights = random_planes(rng, weight_format, columns, depth)
    call = matmul_call(weight_format, tiles, columns, depth, None)
    assert accepts_quantized_matmul(call, TARGET)
    module = load(module_of(call))
    for seq in (1, 5):
        x = rng.standard_normal((2, seq, depth)).astype(np.float32)
        y = module.main(x, *as_arguments(tiles)).to_host()
        assert relative_error(y, x.astype(np.float64), weights) < 4e-3


def test_compiled_module_runs_a_gated_layer(load):
    """A norm of a sum times gates and ups, and the product of what they give."""
    batch, depth, columns, width = 2, 256, 512, 41
    rng = np.random.default_rng(1)
    gated, gated_weights = random_planes(rng, "q4_0", 2 * columns, depth, 0.01)
    down, down_weights = random_planes(rng, "q6_k", width, columns, 0.01)
    x = TensorType((batch, None, depth), "f32")
    codes = quantized_type(x)
    hidden = quantized_type(TensorType((batch, None, columns), "f32"))
    y = TensorType((batch, None, width), "f32")
    weight = TensorType((depth,), "f32")
    norm = (("epsilon", 1e-5),)
    up = (("format", "q4_0"), ("out_features", columns))
    last = (("format", "q6_k"), ("out_features", width))
    inputs = (x, x, weight, *types_of(gated), *types_of(down))
    add = LlmirCall("add_norm_quantize", (x, x, weight), (x, codes), norm)
    gate = LlmirCall("gated_multiply", (codes, *types_of(gated)), (hidden,), up)
    multiply = LlmirCall("multiply", (hidden, *types_of(down)), (y,), last)
    text = wrap(
        [
            (add, definitions.add_norm_quantize, (0, 1, 2)),
            (gate, definitions.gated_multiply, (10, 3, 4)),
            (multiply, definitions.multiply, (11, 5, 6, 7, 8)),
        ],
        inputs,
        (y,),
    )
    module = load(text)
    for seq in (1, 5):
        values, residual = rng.standard_normal((2, batch, seq, depth)).astype(np.float32)
        factors = rng.standard_normal(depth).astype(np.float32)
        found = module.main(values, residual, factors, *as_arguments(gated), *as_arguments(down)).to_host()
        total = (values + residual).astype(np.float64)
        normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * factors
        gates, ups = np.split(normed @ gated_weights.T, 2, axis=-1)
        assert relative_error(found, gates / (1 + np.exp(-gates)) * ups, down_weights) < 4e-3


def test_compiled_module_returns_sums_and_norms(load):
    """The norm of a sum, which is a result too, and the norm of x alone, each times the same weights."""
    depth, width = 256, 41
    rng = np.random.default_rng(2)
    tiles, weights = random_planes(rng, "q8_0", width, depth, 0.01)
    x = TensorType((1, None, depth), "f32")
    codes = quantized_type(x)
    y = TensorType((1, None, width), "f32")
    weight = TensorType((depth,), "f32")
    norm = (("epsilon", 1e-5),)
    constants = (("format", "q8_0"), ("out_features", width))
    multiply = LlmirCall("multiply", (codes, *types_of(tiles)), (y,), constants)
    both = LlmirCall("add_norm_quantize", (x, x, weight), (x, codes), norm)
    one = LlmirCall("norm_quantize", (x, weight), (codes,), norm)
    inputs = (x, x, weight, *types_of(tiles))
    values, residual = rng.standard_normal((2, 1, 3, depth)).astype(np.float32)
    factors = rng.standard_normal(depth).astype(np.float32)

    def normed(total):
        total = total.astype(np.float64)
        return total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * factors

    alone = load(
        wrap([(one, definitions.norm_quantize, (0, 2)), (multiply, definitions.multiply, (5, 3, 4))], inputs, (y,))
    )
    found = alone.main(values, residual, factors, *as_arguments(tiles)).to_host()
    assert relative_error(found, normed(values), weights) < 4e-3

    summed = load(wrap([(both, definitions.add_norm_quantize, (0, 1, 2))], inputs[:3], (x, codes)))
    total, packed = (result.to_host() for result in summed.main(values, residual, factors))
    np.testing.assert_array_equal(total, values + residual)
    error = np.abs(
        dequantize_activations(np.ascontiguousarray(packed).view(np.uint8).reshape(-1), 3, depth) - normed(total)[0]
    )
    assert (error <= rounding_bound(normed(total)[0]) + 1e-6 * np.abs(normed(total)[0])).all()


def test_only_tiles_are_accepted():
    planes = {name: np.zeros(shape, np.float16) for name, shape in FORMATS["q4_0"].plane_shapes(32, 64).items()}
    assert not accepts_quantized_matmul(matmul_call("q4_0", planes, 32, 64, 1), TARGET)
    assert not accepts_quantized_matmul(matmul_call("q4_0", planes, 32, 64, 1, layout="planes"), TARGET)
