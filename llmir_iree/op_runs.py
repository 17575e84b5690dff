"""Runs one `llmir` op alone, as a target computes it, and holds it to the op's definition in torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import iree.runtime as rt
import numpy as np
import numpy.typing as npt
import torch

import llmir_iree.export.ops  # noqa: F401  registers the ops
from llmir_iree.devices import open_device, to_host
from llmir_iree.params.formats import FORMATS
from llmir_iree.plugins.calls import LlmirCall, TensorType, find_calls
from llmir_iree.plugins.lowering import Lowering, Preference
from llmir_iree.plugins.seam import choose
from llmir_iree.targets import Target

# What stands for dynamic dimensions: rows and pages that divide by nothing that a kernel might count on.
_SEQ, _TABLE = 33, 4
_LAYER = 1
_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32, "i8": torch.int8}


@dataclass(frozen=True)
class OpModule:
    """MLIR with a function `main` that makes one call, and the name of the implementation behind it."""

    call: LlmirCall
    text: str
    implementation: str


def distinct_calls(portable: str) -> list[LlmirCall]:
    """The ops of a portable module, one for every definition that they need, in program order."""
    from iree.compiler import ir

    with ir.Context(), ir.Location.unknown():
        calls = {site.call.symbol: site.call for site in find_calls(ir.Module.parse(portable))}
    return list(calls.values())


def describe(call: LlmirCall) -> str:
    """A call in a few words: the op, what it works on."""
    sizes = "x".join("?" if size is None else str(size) for size in call.operands[0].shape)
    if call.op == "quantized_matmul":
        return f"{call.constant('format')} {sizes} -> {call.constant('out_features')}"
    if call.op == "append_kv":
        sizes = "x".join("?" if size is None else str(size) for size in call.operands[1].shape)
    return f"{call.op} {sizes}"


def build_module(call: LlmirCall, target: Target, preference: Preference = "best") -> OpModule:
    """A module for one call, lowered as the seam chooses for a target."""
    implementation = choose(call, Lowering(target, preference))
    definitions = implementation.emit(call, target)
    arguments = [f"%v{index}: {kind}" for index, kind in enumerate(call.operands)]
    values = [f"%v{index}" for index in range(len(call.operands))]
    types = [*map(str, call.operands)]
    if call.layer is not None:
        values.append("%layer")
        types.append("index")
    results = ", ".join(f"%r{index}" for index in range(len(call.results)))
    result_types = ", ".join(map(str, call.results))
    main = (
        f"util.func public @main({', '.join(arguments)}) -> ({result_types}) {{\n"
        f"  %layer = arith.constant {_LAYER} : index\n"
        f"  {results} = util.call @{call.symbol}({', '.join(values)}) : ({', '.join(types)}) -> ({result_types})\n"
        f"  util.return {results} : {result_types}\n}}\n"
    )
    return OpModule(call, "\n".join([*definitions.values(), main]), implementation.name)


def measure_error(call: LlmirCall, module: Path, device_uri: str) -> float:
    """Run a compiled `OpModule` on random numbers.

    Args:
        call: what it computes.
        module: the compiled module.
        device_uri: an IREE device URI.

    Returns:
        The largest difference from the op in torch, over the largest number that it gives, of all results.

    Raises:
        TargetError: there is no such device.
    """
    inputs = _inputs(call)
    expected = _reference(call, inputs)
    results = _run(module, device_uri, inputs)
    return max(_error(got, want.float().numpy()) for got, want in zip(results, expected, strict=True))


def _error(got: npt.NDArray[Any], want: npt.NDArray[np.float32]) -> float:
    difference = np.abs(got.astype(np.float32) - want).max()
    # Not-a-number fails every comparison, and so would pass as an error of nothing.
    return float("inf") if np.isnan(difference) else float(difference / max(np.abs(want).max(), 1e-30))


def _inputs(call: LlmirCall) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(call.symbol))
    if call.op == "quantized_matmul":
        x = torch.randn(_sizes(call.operands[0], (_SEQ,)), generator=generator)
        planes = FORMATS[str(call.constant("format"))].planes
        weights = [
            _plane(kind, plane.dtype.kind == "u", generator)
            for kind, plane in zip(call.operands[1:], planes, strict=True)
        ]
        return [x, *weights]
    batch, seq = _sizes(call.operands[-1], (_SEQ,))
    cache_type = next(kind for kind in call.operands if len(kind.shape) == 6)
    page_size = cache_type.shape[4] or 1
    # Enough pages for whatever is new, behind half a page that the cache holds already.
    held = page_size // 2 + 1
    entries = max(_TABLE, -(-(held + seq) // page_size))
    pages = 1 + batch * entries
    tensors = []
    for kind in call.operands[:-2]:
        sizes = _sizes(kind, (pages,) if len(kind.shape) == 6 else (_SEQ,))
        tensors.append(torch.randn(sizes, generator=generator).to(_TORCH[kind.element]))
    order = torch.randperm(pages - 1, generator=generator)[: batch * entries] + 1
    lengths = torch.tensor([max(1, seq - 3 * row) for row in range(batch)])
    offsets = torch.arange(seq) - seq + lengths[:, None]
    positions = torch.where(offsets >= 0, offsets + held, -1)
    return [*tensors, order.reshape(batch, entries).to(torch.int32), positions.to(torch.int32)]


def _sizes(kind: TensorType, dynamic: Iterable[int]) -> list[int]:
    left = iter(dynamic)
    return [next(left) if size is None else size for size in kind.shape]


def _plane(kind: TensorType, is_unsigned: bool, generator: torch.Generator) -> torch.Tensor:
    """Random bits, or scales that keep weights near one."""
    sizes = _sizes(kind, ())
    if kind.element == "i8":
        bits = torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
        return bits if is_unsigned else bits.view(torch.int8)
    return (torch.randn(sizes, generator=generator) * 0.01).to(_TORCH[kind.element])


def _reference(call: LlmirCall, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    constants = dict(call.constants)
    if call.op == "quantized_matmul":
        x, *planes = inputs
        named = (constants["format"], constants["layout"], constants["out_features"])
        results = torch.ops.llmir.quantized_matmul(x, planes, *named)
    elif call.op == "append_kv":
        results = torch.ops.llmir.append_kv(*inputs, _LAYER)
    else:
        named = (float(constants["scale"]), int(constants["window"]), float(constants["softcap"]))
        results = torch.ops.llmir.paged_attention(*inputs, _LAYER, *named)
    return results if isinstance(results, tuple) else (results,)


def _run(module: Path, device_uri: str, inputs: list[torch.Tensor]) -> list[npt.NDArray[Any]]:
    device = open_device(device_uri)
    config = rt.Config(device=device)
    loaded = rt.load_vm_module(rt.VmModule.copy_buffer(config.vm_instance, module.read_bytes()), config)
    results = loaded.main(*map(_as_numpy, inputs))
    results = results if isinstance(results, tuple) else (results,)
    return [to_host(device, device_uri, result._buffer_view) for result in results]


def _as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    if tensor.dtype == torch.uint8:  # Integers of a module have no sign.
        tensor = tensor.view(torch.int8)
    return np.asarray(tensor.numpy())
