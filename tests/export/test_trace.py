"""The portable modules of a 22-layer model: small, without weights, with the ops left whole."""

import math
import re
from typing import Any

import pytest

from llmir_iree.bundle import Bundle
from llmir_iree.export.model import build_model, load_config, weight_specs
from llmir_iree.export.trace import PHASES, PortableModule, TraceOptions, trace_phase
from llmir_iree.params.errors import RequestError, SourceError
from llmir_iree.params.plan import PlannedWeight

TINYLLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
FORMATS = {"linear": "q4_0", "embedding": "q4_0", "vector": "f32"}


@pytest.fixture(scope="module", params=["prefill", "prefill_chunk", "decode"])
def portable(request: pytest.FixtureRequest) -> PortableModule:
    config = load_config(TINYLLAMA)
    plan = tuple(PlannedWeight(spec, "f32", FORMATS[spec.kind]) for spec in weight_specs(config))
    return trace_phase(build_model(config, plan), config, request.param, TraceOptions(batch_sizes=(1, 4)))


def test_is_under_one_megabyte(portable: PortableModule) -> None:
    assert len(portable.text.encode()) < 1_000_000


def test_thirty_layers_of_three_planes_are_too(smollm2_bundle: Bundle) -> None:
    for phase in PHASES:
        path = smollm2_bundle.path(smollm2_bundle.manifest.portable[phase].file)
        assert path.stat().st_size < 1_000_000


def test_holds_no_constant_over_one_kibibyte(portable: PortableModule) -> None:
    literals = re.findall(r"(dense(?:_resource)?)<([^>]*)> : tensor<([^>]*)>", portable.text)
    assert literals, "the rotary frequencies are a literal; finding none means that the pattern is wrong"
    for kind, value, shape in literals:
        elements = math.prod(int(size) for size in re.findall(r"(\d+)x", shape))
        is_splat = kind == "dense" and "," not in value and '"' not in value
        assert is_splat or elements * 8 <= 1024, f"a constant of {shape}"


def test_keeps_the_ops_and_drops_the_noise(portable: PortableModule) -> None:
    layers, functions = TINYLLAMA["num_hidden_layers"], len(portable.functions)
    for op, count in {"append_kv": 1, "paged_attention": 1, "quantized_matmul": 7}.items():
        heads = 1 if op == "quantized_matmul" else 0
        assert portable.text.count(f'"torch.llmir.{op}"') == functions * (layers * count + heads)
    assert "_assert_tensor_metadata" not in portable.text
    assert portable.text.count("torch.constant.int 1\n") <= functions


def test_names_parameters_as_the_archive_does(portable: PortableModule) -> None:
    assert '#flow.parameter.named<"model"::"model.layers.21.mlp.down_proj.weight.qs">' in portable.text
    assert '#flow.parameter.named<"model"::"lm_head.weight.d">' in portable.text


def test_describes_its_functions(portable: PortableModule) -> None:
    batch_sizes = (1,) if portable.phase == "prefill_chunk" else (1, 4)
    assert [function.name for function in portable.functions] == [f"{portable.phase}_bs{size}" for size in batch_sizes]
    for function in portable.functions:
        assert f"func.func @{function.name}(" in portable.text
        tokens, *_, cache = function.arguments
        columns = {"prefill": "seq", "prefill_chunk": 128, "decode": 1}
        assert tokens.shape == (function.batch_size, columns[portable.phase])
        assert cache.shape == ("pages", 22, 2, 4, 32, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported decoder-only models: llama"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder; only decoder-only"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"hidden_size": "many"}, "transformers refuses it"),
    ],
)
def test_refuses_other_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_config({**TINYLLAMA, **change})


@pytest.mark.parametrize(
    "options",
    [{"batch_sizes": (1, 1)}, {"page_size": 24}, {"cache_dtype": "f8"}, {"max_seq_len": 1}, {"chunk_tokens": 96}],
)
def test_refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        TraceOptions(**options)
