"""The transformers model on the meta device, with its matrices swapped for packed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmir_iree.export import ops  # noqa: F401  registers the ops that the packed modules call
from llmir_iree.export.dequantize import look_up
from llmir_iree.params.errors import SourceError
from llmir_iree.params.formats import FORMATS
from llmir_iree.params.layouts import layout_of, stored_shapes
from llmir_iree.params.plan import PlannedWeight, WeightKind, WeightSpec

# What transformers calls the architectures whose modelling code was traced and compared; each is one `model_type`.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# Rotary scalings whose frequencies do not depend on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class PackedWeight(nn.Module):
    """The planes of one matrix, as parameters named after them."""

    def __init__(self, weight_format: str, rows: int, columns: int) -> None:
        super().__init__()
        self.format = weight_format
        self.layout = layout_of(weight_format).name
        self.rows = rows
        self.names = tuple(plane.name for plane in FORMATS[weight_format].planes)
        shapes = stored_shapes(weight_format, rows, columns)
        for plane in FORMATS[weight_format].planes:
            dtype = _torch_dtype(plane.dtype.name)
            self.register_parameter(
                plane.name, nn.Parameter(torch.empty(shapes[plane.name], dtype=dtype), requires_grad=False)
            )

    @property
    def planes(self) -> list[Tensor]:
        """The planes in the order of the format."""
        return [getattr(self, name) for name in self.names]


class PackedLinear(nn.Module):
    """A linear layer over packed weights: x [..., in_features] -> [..., out_features]."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, then add the bias if there is one."""
        weight = self.weight
        y: Tensor = torch.ops.llmir.quantized_matmul(x, weight.planes, weight.format, weight.layout, weight.rows)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """A lookup in packed weights: ids [...] -> float32 [..., embedding_dim]."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """Pick the rows of every plane, then dequantise only those."""
        # torch-mlir lowers an index of 32 bits into a comparison with one of 64, which does not verify.
        return look_up(self.weight.format, self.weight.layout, self.weight.planes, ids.long())


def load_config(data: Mapping[str, Any]) -> Any:
    """The transformers config that the content of a config.json describes.

    Raises:
        SourceError: an architecture or a rotary scaling that is not supported, or values that transformers refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = dict(data)
    model_type = values.pop("model_type", None)
    known = ", ".join(ARCHITECTURES)
    if values.get("is_encoder_decoder"):
        raise SourceError(f"config: {model_type} is an encoder-decoder; only decoder-only models are read: {known}")
    if model_type not in ARCHITECTURES:
        raise SourceError(f"config: model_type {model_type!r} is not supported; supported decoder-only models: {known}")
    # transformers would take these two from the file as the dtype and the implementation to load with.
    for key in ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "quantization_config"):
        values.pop(key, None)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise SourceError(f"config: transformers refuses it: {error}") from None
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise SourceError(f"config: rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    return config


def weight_specs(config: Any) -> tuple[WeightSpec, ...]:
    """What the model wants to find in a checkpoint, in the order of its modules; tied tables stand once, as linear."""
    model = _meta_model(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kinds: dict[str, WeightKind] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kinds[f"{name}.weight"] = "linear"
        elif isinstance(module, nn.Embedding):
            kinds[f"{name}.weight"] = "linear" if tied else "embedding"
    return tuple(
        WeightSpec(name, tuple(parameter.shape), kinds.get(name, "vector"))
        for name, parameter in model.named_parameters()
    )


def page_shape(config: Any, page_size: int) -> tuple[int, int, int, int, int]:
    """Shape of one page of the cache: layers, 2 (key, value), kv_heads, page_size, head_dim."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, 2, kv_heads, page_size, head_dim


def build_model(config: Any, plan: tuple[PlannedWeight, ...]) -> nn.Module:
    """The model with packed weights, ready to trace: parameters are allocated but never written.

    Args:
        config: what `load_config` gave.
        plan: the format of every weight of `weight_specs(config)`.

    Returns:
        transformers' own causal language model in float32 on the CPU, attending through the `llmir` ops.
    """
    from llmir_iree.export.step import register_attention

    model = _meta_model(config)
    model.config._attn_implementation = register_attention()
    formats = {weight.spec.name: weight for weight in plan}
    packed: dict[str, PackedWeight] = {}

    def pack(name: str) -> PackedWeight:
        if name not in packed:
            rows, columns = formats[name].spec.shape
            packed[name] = PackedWeight(formats[name].format, rows, columns)
        return packed[name]

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Embedding:
                model.set_submodule(name, PackedEmbedding(pack(f"{name}.weight")))
                embedding_name = name
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                source = embedding_name if module is head and tied else name
                model.set_submodule(name, PackedLinear(pack(f"{source}.weight"), module.bias))
    _restore_buffers(model, config)
    return _materialize(model)


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _restore_buffers(model: nn.Module, config: Any) -> None:
    """Compute anew, on the CPU, the buffers that no checkpoint holds (rotary frequencies)."""
    for name, module in list(model.named_modules()):
        if any(True for _ in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=config))


def _materialize(model: nn.Module) -> nn.Module:
    """Allocate the meta parameters on the CPU; pages that nobody touches cost no memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
    return model


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
