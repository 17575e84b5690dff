"""Joins dispatches to the IR: the n-th that a call makes is the n-th that the IR of its function has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llmir_iree.tracing.capture import CaptureError, DispatchRun, Site
from llmir_iree.tracing.ir_values import Shape
from llmir_iree.tracing.op_costs import Kernel, Step, cost_of, parse_key
from llmir_iree.tracing.stream_sites import Binding, read_stream_sites

# A layer's weights are named after it, as in model.layers.7.mlp.down_proj.weight.
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h|blk)\.(\d+)\.")
_LAYER_CONSTANT = "layer"

_FUNCTION_LINE = re.compile(r"\s*(?:func|util)\.func\b")
_OP_LENGTH = 240


def join_sites(
    runs: Iterable[DispatchRun],
    function: str,
    *,
    stream_ir: str,
    portable: str,
    shapes: Sequence[Shape | None] = (),
    kernels: Mapping[str, Kernel] | None = None,
    step: Step | None = None,
) -> list[Site]:
    """Describe every site of a function from the IR that its module was compiled from.

    Args:
        runs: of all functions; those of this one have to be what the IR says, dispatch by dispatch.
        function: name of an exported function.
        stream_ir: the module at stream level, with locations.
        portable: text that iree-compile was given, to which locations point.
        shapes: of the function's arguments; None, or none at all, for those that are not known.
        kernels: those that a bundle brings with it, by the symbol of their executable.
        step: what each call worked on, if the function is a bundle's.

    Raises:
        CaptureError: the IR dispatches something else than the binary did.
    """
    known = kernels or {}
    stream_sites = read_stream_sites(stream_ir, function, shapes)
    for run in runs:
        if run.function == function and (run.site >= len(stream_sites) or stream_sites[run.site].key != run.key):
            told = stream_sites[run.site].key if run.site < len(stream_sites) else "nothing"
            raise CaptureError(
                f"{function}: dispatch {run.site} of a call was {run.key}, the IR has {told} there; the module was "
                "compiled from something else, with other flags, or for another machine"
            )
    lines = portable.splitlines()
    weights = [_weight(site.bindings) for site in stream_sites]
    layers = _layers(
        [
            _layer(weight, _scalar(known.get(site.executable), site.scalars))
            for site, weight in zip(stream_sites, weights, strict=True)
        ],
        [weight is not None for weight in weights],
    )
    sites = []
    for number, (site, weight, layer) in enumerate(zip(stream_sites, weights, layers, strict=True)):
        cost = cost_of(site, known, step)
        line = _op_line(site.lines, lines)
        sites.append(
            Site(
                function=function,
                site=number,
                key=site.key,
                executable=site.executable,
                kind=cost.kind,
                op=lines[line - 1].strip()[:_OP_LENGTH] if line is not None else None,
                line=line,
                weight=weight,
                layer=layer,
                shape=cost.shape,
                bytes_read=cost.bytes_read,
                bytes_written=cost.bytes_written,
                flops=cost.flops,
            )
        )
    return sites


def place_runs(keys: Sequence[str], of_ir: Sequence[str]) -> list[int]:
    """The site of each dispatch of one call, where only the order is known in which they began.

    What may run at the same time may begin in another order than it stands in the IR; the n-th run of an export is then
    at the n-th place that dispatches it.

    Args:
        keys: of the dispatches, by their starts.
        of_ir: of the sites, in their order.

    Raises:
        CaptureError: the call dispatched something else, or another number of times.
    """
    places: dict[str, list[int]] = {}
    for site, key in enumerate(of_ir):
        places.setdefault(key, []).append(site)
    counts = Counter(keys)
    for key in {**places, **counts}:
        if counts[key] != len(places.get(key, ())):
            raise CaptureError(
                f"a call dispatched {key} {counts[key]} times, in the IR it is {len(places.get(key, ()))}"
            )
    turn = {key: iter(sites) for key, sites in places.items()}
    return [next(turn[key]) for key in keys]


def sites_of_binary(runs: Iterable[DispatchRun]) -> list[Site]:
    """What the names of exports tell, where there is no IR: kind and shape, and nothing else."""
    sites = []
    # A site that dispatched different exports in different calls has a row for each.
    for function, number, key in sorted({(run.function, run.site, run.key) for run in runs}):
        kind, shape = parse_key(key)
        executable = re.sub(r"(_dispatch_\d+)_.*$", r"\1", key)
        sites.append(Site(function=function, site=number, key=key, executable=executable, kind=kind, shape=shape))
    return sites


def _weight(bindings: Sequence[Binding]) -> str | None:
    """The parameter that a dispatch reads most of; of a matrix in planes the name of the matrix."""
    sizes: dict[str, int] = {}
    for binding in bindings:
        if binding.parameter is not None:
            parent, _, leaf = binding.parameter.rpartition(".")
            name = parent if parent.endswith("weight") and leaf != "weight" else binding.parameter
            sizes[name] = sizes.get(name, 0) + (binding.nbytes or 0)
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _scalar(kernel: Kernel | None, scalars: Sequence[int | None]) -> int | None:
    """The layer that a kernel is passed."""
    if kernel is None or _LAYER_CONSTANT not in kernel.constants:
        return None
    return scalars[kernel.constants.index(_LAYER_CONSTANT)]


def _layer(weight: str | None, passed: int | None) -> int | None:
    match = _LAYER.search(weight or "")
    return int(match[1]) if match else passed


def _layers(known: Sequence[int | None], has_weight: Sequence[bool]) -> list[int | None]:
    """Layers of all sites: one between two of layers belongs to the former, as what follows a layer's last matmul does.

    A weight outside layers, such as the head's, ends them.
    """
    layers = list(known)
    for index, layer in enumerate(known):
        if layer is None and not has_weight[index]:
            before = _nearest(known, has_weight, range(index - 1, -1, -1))
            after = _nearest(known, has_weight, range(index + 1, len(known)))
            layers[index] = before if after is not None else None
    return layers


def _nearest(known: Sequence[int | None], has_weight: Sequence[bool], order: range) -> int | None:
    """The layer of the nearest site of which it is known whether it is in one."""
    return next((known[index] for index in order if known[index] is not None or has_weight[index]), None)


def _op_line(chain: Sequence[int], lines: Sequence[str]) -> int | None:
    """The line of the op, out of a chain from the inside out: where its definition was called, in the function."""
    for line in reversed(chain):
        if 0 < line <= len(lines) and not _FUNCTION_LINE.match(lines[line - 1]):
            return line
    return None
