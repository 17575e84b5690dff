"""The portable definitions compile for every family of targets, with no machine of that kind at hand."""

from pathlib import Path

import pytest

from llmir_iree.compile import compile_mlir
from llmir_iree.export.model import build_model, load_config, weight_specs
from llmir_iree.export.trace import PortableModule, TraceOptions, trace_phase
from llmir_iree.params.plan import PlannedWeight
from llmir_iree.plugins.pipeline import lower
from llmir_iree.targets import FAMILIES, resolve_target

# SmolLM2-135M but for the number of layers: IREE's GPU code generation depends on how sizes divide.
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", params=["prefill", "prefill_chunk", "decode"])
def portable(request: pytest.FixtureRequest) -> PortableModule:
    config = load_config(SMOLLM2)
    plan = tuple(
        PlannedWeight(spec, "f32", {"vector": "f32"}.get(spec.kind, "q8_0" if "embed" in spec.name else "q4_1"))
        for spec in weight_specs(config)
    )
    return trace_phase(build_model(config, plan), config, request.param, TraceOptions(batch_sizes=(1, 4)))


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_model_compiles(portable: PortableModule, family: str, tmp_path: Path) -> None:
    target = resolve_target(family)
    output = tmp_path / "module.vmfb"
    compile_mlir(lower(portable.text, target, "portable").text, output, target.flags)
    assert output.stat().st_size > 10_000
