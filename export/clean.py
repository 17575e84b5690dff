"""Takes the noise out of a traced module: checks of what is known, and constants that are repeated at every use."""

from __future__ import annotations

from typing import Any

from iree.compiler import passmanager

_ASSERTIONS = "torch.aten._assert_tensor_metadata"


def clean(module: Any) -> None:
    """Make a traced module small, in place.

    Before: what torch.export gave, imported by iree-turbine.
    After: no metadata assertions, one constant for every value, nothing unused; the functions compute the same.
    """
    functions = [operation for operation in module.regions[0].blocks[0].operations if operation.name == "func.func"]
    for function in functions:
        for operation in list(function.regions[0].blocks[0].operations):
            if operation.operation.name == _ASSERTIONS:
                operation.operation.erase()
    passmanager.PassManager.parse("builtin.module(func.func(cse))", context=module.context).run(module)
