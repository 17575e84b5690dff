"""The pipeline of the plugin: named passes over a portable module, in order, for a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from iree.compiler import ir

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.lowering import Lowering, Preference, Target
from llmir_iree.plugins.passes.fold_silu_mul import fold_silu_mul
from llmir_iree.plugins.passes.fuse_append_attention import fuse_append_attention
from llmir_iree.plugins.passes.fuse_attention_quantization import fuse_attention_quantization
from llmir_iree.plugins.passes.fuse_norm_quantization import fuse_norm_quantization
from llmir_iree.plugins.passes.lower_llmir_ops import lower_llmir_ops
from llmir_iree.plugins.passes.match_paged_attention import match_paged_attention
from llmir_iree.plugins.passes.match_quantized_matmul import match_quantized_matmul
from llmir_iree.plugins.passes.merge_sibling_matmuls import merge_sibling_matmuls
from llmir_iree.plugins.passes.share_quantization import share_quantization
from llmir_iree.plugins.passes.split_argmax import split_argmax


@dataclass(frozen=True)
class Pass:
    """A rewrite of a whole module; those that are `required` make it compile, the others make it fast.

    One that is `on_request` looks for what other exports than ours have, and is left out unless it is asked for.
    """

    name: str
    summary: str
    apply: Callable[[ir.Module, Lowering], None]
    required: bool = False
    on_request: bool = False


PIPELINE: tuple[Pass, ...] = (
    Pass(
        "split-argmax",
        "replace the arg-max by two reductions on targets that cannot compile it",
        split_argmax,
        required=True,
    ),
    # What torch has no ops for becomes ops of the export.
    Pass(
        "match-paged-attention",
        "take scaled_dot_product_attention over gathered pages for paged_attention",
        match_paged_attention,
        on_request=True,
    ),
    Pass(
        "match-quantized-matmul",
        "take a linear layer of unpacked 4-bit weights for quantized_matmul",
        match_quantized_matmul,
        on_request=True,
    ),
    # Ops of the export become fewer and larger ones, where kernels compute them.
    Pass(
        "merge-sibling-matmuls",
        "one matmul for q, k and v, one for gate and up",
        merge_sibling_matmuls,
    ),
    Pass(
        "fuse-append-attention",
        "rotate, append and attend in one op, in two for a prefill",
        fuse_append_attention,
    ),
    Pass(
        "share-quantization",
        "quantise activations once for all matmuls that take them",
        share_quantization,
    ),
    Pass(
        "fold-silu-mul",
        "let the matmul of gate and up write silu(gate) * up, quantised",
        fold_silu_mul,
    ),
    Pass(
        "fuse-norm-quantization",
        "fuse the residual add, the norm and the quantisation that follow each other",
        fuse_norm_quantization,
    ),
    Pass(
        "fuse-attention-quantization",
        "let the attention of a decode write its output quantised",
        fuse_attention_quantization,
    ),
    # No llmir op is left.
    Pass(
        "lower-llmir-ops",
        "replace each llmir op by the definition that the seam chooses",
        lower_llmir_ops,
        required=True,
    ),
)


@dataclass(frozen=True)
class Lowered:
    """What the pipeline made of a portable module: MLIR for iree-compile, the passes that ran, and what they chose.

    `implementations` says of every op how many calls each implementation stands in for, `left_alone` what passes that
    match left as it was, and why.
    """

    text: str
    passes: tuple[str, ...]
    implementations: dict[str, dict[str, int]]
    left_alone: tuple[str, ...] = ()


def select_passes(names: Iterable[str], *, match: bool = False) -> tuple[str, ...]:
    """Names of the passes that run, in order.

    Args:
        names: the passes to run beside the required ones; or, each with a minus in front, those not to run; none for
            all but those that are only run on request.
        match: whether that is requested.

    Raises:
        CompileError: an unknown pass, one that may not be left out, or names with and without a minus.
    """
    asked = tuple(names)
    known = {step.name: step for step in PIPELINE}
    plain = {name.removeprefix("-") for name in asked}
    is_exclusion = all(name.startswith("-") for name in asked)
    if unknown := sorted(plain - set(known)):
        raise CompileError(f"unknown pass {unknown[0]!r}; known: {', '.join(known)}")
    if not is_exclusion and any(name.startswith("-") for name in asked):
        raise CompileError("passes are either named to run, or with a minus in front not to run; not both at once")
    if is_exclusion and (needed := [name for name in known if known[name].required and name in plain]):
        raise CompileError(f"pass {needed[0]} cannot be left out; without it modules do not compile")
    return tuple(name for name, step in known.items() if _is_selected(step, plain, match, is_exclusion=is_exclusion))


def _is_selected(step: Pass, names: set[str], match: bool, *, is_exclusion: bool) -> bool:
    if step.on_request and match:
        return not (is_exclusion and step.name in names)
    if is_exclusion:
        return step.required or not (step.on_request or step.name in names)
    return step.required or step.name in names


def lower(
    portable: str | bytes,
    target: Target,
    preference: Preference = "best",
    *,
    merged: Mapping[str, tuple[str, ...]] | None = None,
    passes: Iterable[str] = (),
    match: bool = False,
) -> Lowered:
    """Run the pipeline over a portable module.

    Args:
        portable: MLIR of the torch dialect with `llmir` ops, as the export writes it; text or bytecode.
        target: what the module is compiled for, with all flags of the compiler; the seam chooses by it.
        preference: which implementations the seam may choose.
        merged: names of weights in the archive that span others, and of those others in order.
        passes: which passes to run, see `select_passes`.
        match: whether to look for what is no `llmir` op yet, see `select_passes`.

    Raises:
        CompileError: the text is not MLIR, or a pass left a module that does not verify.
    """
    lowering = Lowering(target, preference, dict(merged or {}))
    selected = select_passes(passes, match=match)
    with ir.Context(), ir.Location.unknown():
        try:
            module = ir.Module.parse(portable)
        except ir.MLIRError as error:
            raise CompileError(f"the module is not valid MLIR: {error}") from None
        for step in (step for step in PIPELINE if step.name in selected):
            step.apply(module, lowering)
            try:
                module.operation.verify()
            except ir.MLIRError as error:
                raise CompileError(f"pass {step.name} left an invalid module: {error}") from None
        implementations = {op: dict(names) for op, names in lowering.implementations.items()}
        return Lowered(str(module), selected, implementations, tuple(lowering.left_alone))
