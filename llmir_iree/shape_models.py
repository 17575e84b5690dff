"""Models to compile: what a bundle holds, or a published model's shapes, traced without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmir_iree.dispatch_list import Sizes

if TYPE_CHECKING:
    from llmir_iree.bench_models import ModelShape
    from llmir_iree.bundle import Bundle
    from llmir_iree.export.trace import TraceOptions

# The prompt that a prefill of any length is looked at with: shorter than the narrowest matrix is wide.
_PROMPT_TOKENS = 33


@dataclass(frozen=True)
class Phase:
    """A portable module, and the sizes that each of its functions works on."""

    text: str
    functions: Mapping[str, Sizes]


@dataclass(frozen=True)
class ShapeModel:
    """Portable modules of a model by phase.

    `merged` are the weights of its archive that span others. A model of so many `layers` dispatches as often in each
    as one of more layers, and different things in the first and in the last only.
    """

    name: str
    layers: int
    phases: Mapping[str, Phase]
    merged: Mapping[str, tuple[str, ...]]

    def phases_for(self, *, prefill_chunks: bool) -> tuple[str, str]:
        """Which modules a target wants, prefill and decode."""
        return ("prefill_chunk" if prefill_chunks else "prefill", "decode")


def read_model(source: str) -> ShapeModel:
    """A bundle's model, or one of `bench_models.SHAPES` by its name.

    Raises:
        BundleError: neither.
    """
    from llmir_iree.bench_models import SHAPES
    from llmir_iree.bundle import Bundle
    from llmir_iree.params.errors import BundleError

    if source in SHAPES and not Path(source).exists():
        return trace_shape(source, SHAPES[source])
    try:
        return bundle_model(Bundle.open(source))
    except BundleError as error:
        raise BundleError(f"{error}; or name a model's shapes: {', '.join(SHAPES)}") from None


def bundle_model(bundle: Bundle) -> ShapeModel:
    """What a bundle holds; raises BundleError where a portable module was changed."""
    from llmir_iree.compile import read_portable

    manifest = bundle.manifest
    narrowest = min(manifest.model.hidden_size, manifest.model.heads * manifest.model.head_dim)
    phases: dict[str, Phase] = {}
    for phase in manifest.portable:
        functions = {
            function.name: Sizes(
                batch=function.batch_size,
                tokens=function.columns or _PROMPT_TOKENS,
                page_shape=manifest.cache.page_shape,
                cache_dtype=manifest.cache.dtype,
                columns=narrowest,
                formats=tuple(manifest.parameters.formats),
            )
            for function in manifest.functions
            if function.phase == phase
        }
        phases[phase] = Phase(read_portable(bundle, phase), functions)
    return ShapeModel(manifest.model.name, manifest.model.layers, phases, manifest.parameters.merged)


def trace_shape(name: str, shape: ModelShape, batch_sizes: tuple[int, ...] = (1, 4)) -> ShapeModel:
    """A model of these shapes in the formats that llama-quantize gives one as Q4_0: its head is Q6_K."""
    from llmir_iree.export.trace import TraceOptions

    config = {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.inner_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
    }
    return trace_model(
        f"{name} shapes, Q4_0", config, "q4_0", "q6_k", TraceOptions(batch_sizes, max_seq_len=shape.context)
    )


def trace_model(
    name: str, config_data: Mapping[str, Any], matrix_format: str, head_format: str, options: TraceOptions
) -> ShapeModel:
    """Trace a model of which there is a config only.

    Args:
        name: what to call it.
        config_data: content of a config.json.
        matrix_format: of all matrices but the head.
        head_format: of the output head, which is the embedding as well if the config ties them.
        options: what it is exported for.

    Raises:
        SourceError: a config that is not supported.
    """
    from llmir_iree.export.model import build_model, load_config, page_shape, weight_specs
    from llmir_iree.export.trace import PHASES, trace_phase
    from llmir_iree.params.plan import PlannedWeight
    from llmir_iree.params.siblings import merge_siblings

    config = load_config(config_data)
    specs = weight_specs(config)
    head = "lm_head.weight" if any(spec.name == "lm_head.weight" for spec in specs) else "model.embed_tokens.weight"
    plan = tuple(
        PlannedWeight(
            spec, "F32", "f32" if spec.kind == "vector" else head_format if spec.name == head else matrix_format
        )
        for spec in specs
    )
    pages = page_shape(config, options.page_size)
    phases = {}
    for phase in PHASES:
        traced = trace_phase(build_model(config, plan), config, phase, options)
        functions = {}
        for function in traced.functions:
            columns = function.arguments[0].shape[1]
            functions[function.name] = Sizes(
                batch=function.batch_size,
                tokens=columns if isinstance(columns, int) else _PROMPT_TOKENS,
                page_shape=pages,
                cache_dtype=options.cache_dtype,
                columns=min(weight.spec.shape[1] for weight in plan if weight.spec.kind != "vector"),
                formats=tuple(dict.fromkeys(weight.format for weight in plan if weight.spec.kind != "vector")),
            )
        phases[phase] = Phase(traced.text, functions)
    merged = {weight.name: weight.sibling_names for weight in merge_siblings(plan)}
    return ShapeModel(name, config.num_hidden_layers, phases, merged)
