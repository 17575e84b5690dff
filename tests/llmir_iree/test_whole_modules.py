"""Whole modules for every target: which dispatches they are made of, and what became of these in code.

The models have the real widths and two layers: more layers dispatch the same things more often, so these compile in
seconds. `make check-targets` compiles all layers.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmir_iree.bench_models import SHAPES
from llmir_iree.compile import compile_mlir
from llmir_iree.dispatch_list import DispatchList, Sizes, find_half_arithmetic, list_dispatches
from llmir_iree.export.trace import TraceOptions
from llmir_iree.gpu_code import NO_NAME
from llmir_iree.machine import cpu_count
from llmir_iree.module_check import ModuleCheck, check_module
from llmir_iree.params.errors import TargetError
from llmir_iree.plugins.lowering import Preference
from llmir_iree.plugins.pipeline import lower
from llmir_iree.plugins.seam import IMPLEMENTATIONS
from llmir_iree.shape_models import ShapeModel, trace_model, trace_shape
from llmir_iree.targets import resolve_target
from llmir_iree.trace_build import known_kernels
from llmir_iree.tracing.op_costs import Step, cost_of
from llmir_iree.tracing.stream_sites import read_stream_sites

LAYERS = 2
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MODELS = ["smollm2", "tinyllama"]
TARGETS = [
    "llvm-cpu",
    "cuda:sm_80",
    "cuda:sm_90",
    "rocm:gfx942",
    "rocm:gfx1100",
    "metal",
    "vulkan",
    "vulkan:llvmpipe",
]
PHASES = ["prefill", "decode"]

# The wide model goes to one target of each of the compiler's backends for which it is made of other dispatches;
# `make check-targets` compiles it for all.
WIDE_TARGETS = ("llvm-cpu", "cuda:sm_80", "metal")
PAIRS = [(model, name) for model in MODELS for name in TARGETS if model == "smollm2" or name in WIDE_TARGETS]

KINDS = {op: {choice.name: choice.kind for choice in choices} for op, choices in IMPLEMENTATIONS.items()}
# What a matrix formulation is on each; elsewhere kernels multiply without such instructions.
MATRIX_TARGETS = ("cuda:sm_80", "cuda:sm_90", "rocm:gfx942", "rocm:gfx1100")

Check = Callable[[str, str, str], ModuleCheck]


@pytest.fixture(scope="module")
def models() -> dict[str, ShapeModel]:
    return {
        "smollm2": trace_model("SmolLM2", SMOLLM2, "q4_1", "q8_0", TraceOptions(batch_sizes=(1, 4))),
        "tinyllama": trace_shape("tinyllama", replace(SHAPES["tinyllama"], layers=LAYERS), batch_sizes=(1,)),
    }


@pytest.fixture(scope="module")
def check(models: dict[str, ShapeModel], request: pytest.FixtureRequest) -> Iterator[Check]:
    """The check of a model's phase for a target; those that the selected tests want are made side by side."""
    selected = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    wanted = [tuple(map(call.params.get, ("model", "target", "phase"))) for call in selected if call is not None]
    with ProcessPoolExecutor(cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: dict[tuple[str, str, str], Future[ModuleCheck]] = {}
        for model, target_name, phase in dict.fromkeys(key for key in wanted if None not in key):
            target = resolve_target(target_name)
            name = "prefill_chunk" if target.prefill_chunks and phase == "prefill" else phase
            futures[model, target_name, phase] = pool.submit(check_module, models[model], name, target)

        def result(name: str, target: str, phase: str) -> ModuleCheck:
            try:
                return futures[name, target, phase].result()
            except TargetError as error:
                pytest.skip(str(error))

        yield result
        pool.shutdown(cancel_futures=True)


def chosen(module: ModuleCheck, op: str, kind: str) -> int:
    """How many calls of an op have an implementation of a kind."""
    counts = module.implementations.get(op, {})
    return sum(count for name, count in counts.items() if KINDS[op][name] == kind)


def dispatched(module: ModuleCheck, *kinds: str) -> int:
    """How often kernels of some kinds are dispatched, by all functions."""
    return sum(function.kinds.get(kind, 0) for function in module.functions for kind in kinds)


def parametrised(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.parametrize("phase", PHASES)(test)
    return pytest.mark.parametrize(("model", "target"), PAIRS)(test)


@parametrised
def test_a_module_is_made_of_what_is_injected(check: Check, model: str, target: str, phase: str) -> None:
    module = check(model, target, phase)
    assert [function.function for function in module.functions]
    assert not [name for op, names in module.implementations.items() for name in names if KINDS[op][name] == "portable"]
    if target != "llvm-cpu":
        # Kernels stand in the module as often as they were chosen; other forms are dispatches of the compiler's own.
        assert dispatched(module, "append_kv") == chosen(module, "append_kv", "kernel")
        assert dispatched(module, "paged_attention") == chosen(module, "paged_attention", "kernel")
        assert dispatched(module, "quantized_matmul", "matmul") == chosen(module, "quantized_matmul", "kernel")
    for function in module.functions:
        # Query, key and value are one matrix, gate and up are; each is read once, unpacked by whoever multiplies it.
        table = "model.embed_tokens.weight"
        read = {name: count for name, count in function.weight_readers.items() if name != table}
        head = {"smollm2": {}, "tinyllama": {"lm_head.weight": 1}}[model]
        assert Counter(re.sub(r"\.\d+\.", ".N.", name) for name in read) == Counter(
            {f"model.layers.N.{name}.weight": LAYERS for name in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj")}
            | {f"model.layers.N.{name}.weight": LAYERS for name in ("mlp.gate_proj+up_proj", "mlp.down_proj")}
            | head
        )
        assert set(read.values()) == {1}
        # A layer appends, then attends; a decode on a CPU does both at once.
        is_fused = target == "llvm-cpu" and phase == "decode"
        assert sum(function.cache_users.values()) == LAYERS * (1 if is_fused else 2)


@parametrised
def test_no_dispatch_undoes_what_kernels_are_for(check: Check, model: str, target: str, phase: str) -> None:
    """None unpacks a matrix, gathers pages, adds up in 16-bit floats, or spills where it is hot."""
    module = check(model, target, phase)
    assert module.faults == ()
    assert all(function.hot for function in module.functions)


@parametrised
def test_the_code_is_what_a_device_takes(check: Check, model: str, target: str, phase: str) -> None:
    module = check(model, target, phase)
    assert module.nbytes > 10_000
    code = {NO_NAME.sub("_", kernel.name): kernel for kernel in module.code}
    if target == "llvm-cpu":
        assert not code
        return
    exports = {NO_NAME.sub("_", name) for function in module.functions for name in function.hot}
    assert exports <= set(code)
    family = target.partition(":")[0]
    if family in ("cuda", "rocm"):
        limits = {"cuda": (255, 48 << 10), "rocm": (512, 64 << 10)}[family]
        for name in exports:
            assert 0 < (code[name].registers or 0) <= limits[0]
            assert code[name].spills == 0
        assert (module.most_shared or 0) <= limits[1]
    else:
        # spirv-val read every one, but for instructions that are newer than it.
        assert all(kernel.is_checked or kernel.matrix_instructions for kernel in module.code)
    expected = "ptxas, also for sm_90 and sm_120" if target == "cuda:sm_80" else module.read_by
    assert module.read_by == expected


@parametrised
def test_matrix_instructions_are_where_the_seam_says_so(check: Check, model: str, target: str, phase: str) -> None:
    module = check(model, target, phase)
    matrix = {NO_NAME.sub("_", kernel.name) for kernel in module.code if kernel.matrix_instructions}

    def used(counts: Mapping[str, int]) -> int:
        return sum(count for name, count in counts.items() if NO_NAME.sub("_", name) in matrix)

    multiplied = sum(used(function.readers) for function in module.functions)
    attended = sum(used(function.cache_users) for function in module.functions)
    assert multiplied == module.implementations.get("quantized_matmul", {}).get("gpu-matrix", 0)
    assert attended == module.implementations.get("paged_attention", {}).get("gpu-matrix", 0)
    # All of a chunk of a prompt, but not the head, which has one row.
    layers = LAYERS if target in MATRIX_TARGETS and phase == "prefill" else 0
    assert (multiplied, attended) == (4 * layers, layers)


# That the checks can fail


def stream_of(model: ShapeModel, phase: str, target_name: str, preference: Preference, folder: Path) -> str:
    target = resolve_target(target_name)
    lowered = lower(model.phases[phase].text, target, preference, merged=model.merged)
    output = folder / "stream.mlir"
    compile_mlir(lowered.text, output, (*target.flags, "--compile-to=stream"))
    return output.read_text(encoding="utf-8")


@pytest.mark.parametrize("phase", ["prefill_chunk", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_portable_definitions_unpack_and_gather(
    models: dict[str, ShapeModel], name: str, phase: str, tmp_path: Path
) -> None:
    stream = stream_of(models[name], phase, "vulkan:llvmpipe", "portable", tmp_path)
    for function, sizes in models[name].phases[phase].functions.items():
        found = list_dispatches(stream, function, sizes, known_kernels())
        unpacked = {match[1] for fault in found.faults if (match := re.search(r": unpacks (\S+):", fault))}
        # Of query, key and value each alone: only kernels have them merged.
        assert len(unpacked) == 7 * LAYERS + 1
        assert sum("gathers pages" in fault for fault in found.faults) == 1
        assert not any("not known" in fault for fault in found.faults)


def test_a_size_that_is_not_known_is_a_fault(models: dict[str, ShapeModel], tmp_path: Path) -> None:
    stream = stream_of(models["tinyllama"], "prefill", "vulkan:llvmpipe", "portable", tmp_path)
    [(function, sizes)] = models["tinyllama"].phases["prefill"].functions.items()

    class Unsized(Sizes):
        arguments = ()

    blind = Unsized(**vars(sizes))
    assert any("not known" in fault for fault in list_dispatches(stream, function, blind).faults)
    assert list_dispatches(stream, "no_such_function", sizes) == DispatchList(
        "no_such_function", {}, {}, {}, {}, {}, ()
    )


@pytest.mark.parametrize(
    ("line", "op"),
    [
        ("%2 = arith.addf %1, %0 : f16", "arith.addf"),
        ("%2 = arith.mulf %1, %1 fastmath<contract> : vector<2x4xbf16>", "arith.mulf"),
        ("%2 = math.exp %1 : f16", "math.exp"),
        ("%2 = linalg.softmax dimension(4) ins(%a : tensor<4x4xf16>) outs(%b : tensor<4x4xf16>)", "linalg.softmax"),
        (
            "%2 = linalg.matmul ins(%a, %b : tensor<4x4xf32>, tensor<4x4xf32>) outs(%c : tensor<4x4xbf16>)",
            "linalg.matmul",
        ),
        ("%2 = linalg.matmul ins(%a, %b : tensor<4x4xf16>, tensor<4x4xf16>) outs(%c : tensor<4x4xf32>)", None),
        ("%2 = arith.addf %1, %0 : f32", None),
        ("%2 = arith.truncf %1 : f32 to f16", None),
        ("%2 = arith.minimumf %1, %0 : f16", None),
    ],
)
def test_arithmetic_of_16_bit_floats_is_found(line: str, op: str | None) -> None:
    assert list(find_half_arithmetic(f"      {line}\n")) == ([] if op is None else [op])


# What a recording knows of kernels for GPUs


def test_kernels_of_gpus_are_known_with_their_costs(models: dict[str, ShapeModel], tmp_path: Path) -> None:
    stream = stream_of(models["tinyllama"], "decode", "vulkan:llvmpipe", "best", tmp_path)
    [(function, sizes)] = models["tinyllama"].phases["decode"].functions.items()
    kernels = known_kernels()
    step = Step(1, 1, 100)
    costs = [
        cost_of(site, kernels, step)
        for site in read_stream_sites(stream, function, sizes.arguments)
        if site.executable in kernels
    ]
    kinds = Counter(cost.kind for cost in costs)
    assert kinds == {"append_kv": 2, "paged_attention": 2, "merge_attention": 2, "quantized_matmul": 4 * LAYERS + 1}
    shapes = {cost.shape: cost.flops for cost in costs if cost.kind == "quantized_matmul"}
    assert shapes["1x11264x2048"] == 2 * 11264 * 2048
    assert shapes["1x32000x2048"] == 2 * 32000 * 2048
    [attention] = {cost for cost in costs if cost.kind == "paged_attention"}
    assert attention.flops == 4 * 101 * 32 * 64
    assert (attention.bytes_read or 0) > 101 * 2 * 4 * 64 * 2
