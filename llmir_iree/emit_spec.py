"""Writes a bundle's modules so that iree-compile alone makes of them what the plugin does.

Of each phase there is a module in which functions stand for the ops, and a transform spec that puts implementations
into their place; beside them lie the objects that these link:

    DIR/<phase>.mlir  DIR/<phase>_spec.mlir  DIR/objects/
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmir_iree.bundle import Bundle
from llmir_iree.compile import check_cpu, new_folder, read_portable
from llmir_iree.plugins.lowering import Preference
from llmir_iree.targets import Target

OBJECTS = "objects"
_DEFINITIONS = frozenset({"util.func", "hal.executable", "hal.executable.source"})
_OBJECT_PATH = re.compile(r'(#hal\.executable\.object<\{path = ")([^"]+)(")')


def emit_spec(
    bundle: Bundle,
    target: Target,
    folder: Path,
    extra_flags: Sequence[str] = (),
    implementations: Preference = "best",
    passes: Sequence[str] = (),
) -> list[list[str]]:
    """Write a bundle's modules and specs for a target.

    Without its spec a module still compiles: it holds the portable definition of every op that has one. Ops that only
    passes make have none; they would fail when they are reached.

    Args:
        bundle: an exported bundle.
        target: what to compile for.
        folder: to be made; it appears when everything is in it.
        extra_flags: more flags for iree-compile, after those of the target.
        implementations: as `compile_bundle` takes it.
        passes: as `compile_bundle` takes it.

    Returns:
        For each phase, the words of the command that compiles it, from the program's name on.

    Raises:
        BundleError: a portable module is missing or was changed.
        CompileError: the folder is there already, or a pass fails.
    """
    from llmir_iree.plugins.pipeline import lower

    flagged = replace(target, flags=(*target.flags, *extra_flags))
    check_cpu(flagged)
    merged = bundle.manifest.parameters.merged
    commands = []
    with new_folder(folder, "the spec") as partial:
        for phase in bundle.manifest.phases_for(prefill_chunks=target.prefill_chunks):
            portable = read_portable(bundle, phase)
            lowered = lower(portable, flagged, implementations, merged=merged, passes=passes).text
            reference = lower(portable, flagged, "portable", merged=merged, passes=passes).text
            module, spec = split_module(lowered, reference)
            (partial / f"{phase}.mlir").write_text(module, encoding="utf-8")
            (partial / f"{phase}_spec.mlir").write_text(_collect_objects(spec, partial), encoding="utf-8")
            commands.append(
                [
                    "iree-compile",
                    str(folder / f"{phase}.mlir"),
                    "-o",
                    str(folder / f"{phase}.vmfb"),
                    *flagged.flags,
                    f"--iree-preprocessing-transform-spec-filename={folder / f'{phase}_spec.mlir'}",
                    f"--iree-hal-executable-object-search-path={folder}",
                ]
            )
    return commands


def split_module(lowered: str, reference: str) -> tuple[str, str]:
    """Take the definitions out of a lowered module.

    Args:
        lowered: MLIR as `lower` gives it.
        reference: the same with portable implementations.

    Returns:
        The module with functions that stand for the definitions, and a transform spec that puts those back.
    """
    from iree.compiler import ir

    with ir.Context(), ir.Location.unknown():
        module, stand_ins = ir.Module.parse(lowered), ir.Module.parse(reference)
        definitions = ir.Module.create()
        for operation in _definitions(module):
            definitions.body.append(operation.detach_from_parent())
        called = _inline_helpers(definitions)
        for operation in _definitions(stand_ins):
            if operation.name == "util.func":
                # A body that were inlined could not be replaced.
                operation.attributes["inlining_policy"] = ir.Attribute.parse("#util.inline.never")
            module.body.append(operation.detach_from_parent())
        known = {_symbol(operation) for operation in _definitions(module)}
        for name, kind in called.items():
            if name not in known:
                stub = ir.Module.parse(_unreachable(name, kind))
                module.body.append(next(iter(stub.body.operations)).operation.detach_from_parent())
        module.operation.verify()
        return str(module) + "\n", _spec(_definitions(definitions))


def _definitions(module: Any) -> list[Any]:
    """Functions and executables at the top of a module; the functions of an export are of another dialect."""
    return [op.operation for op in module.body.operations if op.operation.name in _DEFINITIONS]


def _symbol(operation: Any) -> str:
    from iree.compiler import ir

    return str(ir.StringAttr(operation.attributes["sym_name"]).value)


def _inline_helpers(definitions: Any) -> dict[str, str]:
    """Leave no function that another one calls, and give the types of those that are left by their names.

    What a spec imports lies in front of its callers, and where it calls in turn, IREE 3.13 changes the arguments of the
    one and not of the other.
    """
    from iree.compiler import ir, passmanager

    functions = [operation for operation in _definitions(definitions) if operation.name == "util.func"]
    text = str(definitions)
    for function in functions:
        if f"util.call @{_symbol(function)}(" not in text:
            function.attributes["sym_visibility"] = ir.StringAttr.get("public")  # Else it would be taken for dead.
    passmanager.PassManager.parse("builtin.module(inline)").run(definitions.operation)
    left = [operation for operation in _definitions(definitions) if operation.name == "util.func"]
    for function in left:
        function.attributes["sym_visibility"] = ir.StringAttr.get("private")
    return {_symbol(function): str(function.attributes["function_type"]) for function in left}


def _unreachable(name: str, kind: str) -> str:
    """A private function of a type `(...) -> ...` that must be replaced before it is called."""
    from iree.compiler import ir

    function_type = ir.FunctionType(ir.TypeAttr(ir.Attribute.parse(kind)).value)
    arguments = ", ".join(f"%a{index}: {type_}" for index, type_ in enumerate(function_type.inputs))
    results = ", ".join(map(str, function_type.results))
    return (
        f"util.func private @{name}({arguments}) -> ({results})\n"
        f"    attributes {{inlining_policy = #util.inline.never}} {{\n"
        f'  util.unreachable "the transform spec was not applied"\n}}\n'
    )


def _spec(definitions: list[Any]) -> str:
    """A transform spec that imports definitions in place of what a module has of their names."""
    imports = [
        f"    %{index} = transform.util.import_symbol force @{_symbol(definition)} into %module "
        f": (!transform.any_op) -> !transform.any_op"
        for index, definition in enumerate(definitions)
    ]
    return "\n".join(
        [
            "module attributes {transform.with_named_sequence} {",
            *(str(definition.get_asm(use_local_scope=True)) for definition in definitions),
            "  transform.named_sequence @__transform_main(%module: !transform.any_op) {",
            *imports,
            # As iree-compile does with functions that it has from the beginning, before it forms dispatches.
            '    %inlined = transform.apply_registered_pass "inline" to %module '
            ": (!transform.any_op) -> !transform.any_op",
            "    transform.yield",
            "  }",
            "}\n",
        ]
    )


def _collect_objects(spec: str, folder: Path) -> str:
    """Copy the objects that a spec names into the folder, and name the copies, relative to it."""

    def collect(match: re.Match[str]) -> str:
        source = Path(match[2])
        # Objects of different instruction sets share their names; their folders differ.
        copy = Path(OBJECTS) / source.parent.name / source.name
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / copy)
        return f"{match[1]}{copy.as_posix()}{match[3]}"

    return _OBJECT_PATH.sub(collect, spec)
