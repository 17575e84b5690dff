"""A small Llama's portable modules, and what is left of them after some passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from iree.compiler import ir

from llmir_iree.params.plan import PlannedWeight
from llmir_iree.params.siblings import merge_siblings
from llmir_iree.plugins.calls import walk
from llmir_iree.plugins.lowering import Lowering, Preference
from llmir_iree.plugins.matching import operation_name
from llmir_iree.plugins.pipeline import PIPELINE
from llmir_iree.targets import resolve_target


@dataclass(frozen=True)
class Portable:
    """Portable modules by phase, and the weights that an archive of the model merges."""

    phases: dict[str, str]
    merged: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Passed:
    """A module after some passes: its text, and how often it holds each operation."""

    text: str
    counts: Counter[str]

    def llmir(self) -> dict[str, int]:
        """The `llmir` ops among the operations."""
        return {name.removeprefix("llmir."): n for name, n in self.counts.items() if name.startswith("llmir.")}


RunPasses = Callable[..., Passed]


def trace(model_type: str = "llama", weight_format: str = "q4_0", **options: object) -> Portable:
    """Trace two layers with seeded shapes; no weights are read or written."""
    from llmir_iree.export.model import build_model, load_config, weight_specs
    from llmir_iree.export.trace import TraceOptions, trace_phase

    sizes = {
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
    config = load_config({"model_type": model_type, **sizes, **options})
    plan = tuple(
        PlannedWeight(spec, "F32", "f32" if spec.kind != "linear" else weight_format) for spec in weight_specs(config)
    )
    traced = TraceOptions(batch_sizes=(1,), page_size=16, cache_dtype="f16", max_seq_len=256)
    model = build_model(config, plan)
    merged = {weight.name: weight.sibling_names for weight in merge_siblings(plan)}
    return Portable({phase: trace_phase(model, config, phase, traced).text for phase in ("prefill", "decode")}, merged)


@pytest.fixture(scope="session")
def trace_model() -> Callable[..., Portable]:
    return trace


@pytest.fixture(scope="session")
def llama() -> Portable:
    return trace()


@pytest.fixture(scope="session")
def run_passes() -> RunPasses:
    """Runs passes of the pipeline over a text, by name and in their order."""

    def run(
        text: str,
        *names: str,
        merged: dict[str, tuple[str, ...]] | None = None,
        preference: Preference = "best",
        target: str = "llvm-cpu:znver4",
    ) -> Passed:
        lowering = Lowering(resolve_target(target), preference, merged or {})
        with ir.Context(), ir.Location.unknown():
            module = ir.Module.parse(text)
            for step in PIPELINE:
                if step.name in names:
                    step.apply(module, lowering)
                    module.operation.verify()
            counts = Counter(operation_name(operation) for operation in walk(module.operation))
            return Passed(str(module), counts)

    return run
