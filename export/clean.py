"""Takes the noise out of a traced module: checks of what is known, repeated constants, long names."""

from __future__ import annotations

import re
from typing import Any

from iree.compiler import ir, passmanager

_ASSERTIONS = "torch.aten._assert_tensor_metadata"

# iree-turbine calls a parameter's global "__auto.model.layers.0.mlp.up_proj.weight.qs". A third of a module's text is
# such names; the archive's key, which is what counts, stands in the global's initial value.
_LONG_NAME = re.compile(r"^__auto\.(?:model\.)?")

_VALUE = re.compile(r"%[\w.$-]+")
_LOADED = re.compile(r"(%[\w.$-]+) = util\.global\.load\b")


def clean(module: Any) -> None:
    """Make a traced module small, in place.

    Before: what torch.export gave, imported by iree-turbine.
    After: no metadata assertions, one constant for every value, nothing unused, short names of globals; the functions
    compute the same.
    """
    for function in list(module.regions[0].blocks[0].operations):
        if function.operation.name == "util.global":
            _shorten(function.operation, "sym_name", ir.StringAttr.get)
        if function.operation.name != "func.func":
            continue
        for operation in list(function.operation.regions[0].blocks[0].operations):
            if operation.operation.name == _ASSERTIONS:
                operation.operation.erase()
            elif operation.operation.name == "util.global.load":
                _shorten(operation.operation, "global", ir.FlatSymbolRefAttr.get)
    passmanager.PassManager.parse("builtin.module(func.func(cse))", context=module.context).run(module)


def _shorten(operation: Any, attribute: str, make: Any) -> None:
    name = operation.attributes[attribute].value
    operation.attributes[attribute] = make(_LONG_NAME.sub("", name), context=operation.context)


def print_short(module: Any) -> str:
    """The text of a module.

    IREE names a value after the global that it is loaded from, which repeats every parameter's name twice: a tenth of
    the text. The load itself tells which global it is.
    """
    text = str(module)
    names = {name: f"%w{number}" for number, name in enumerate(dict.fromkeys(_LOADED.findall(text)))}
    return _VALUE.sub(lambda value: names.get(value[0], value[0]), text)
