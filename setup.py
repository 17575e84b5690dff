"""Adds the compiled kernels to a wheel; all else stands in pyproject.toml."""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "plugins" / "kernels"


class BuildWithKernels(build_py):
    """Copies the package, then compiles the kernels beside their copied sources.

    An editable install has no copy; it compiles on first use.
    """

    def run(self) -> None:
        """Run the command."""
        super().run()
        if self.editable_mode:
            return
        build = load_build()
        directory = Path(self.build_lib, "llmir_iree", "plugins", "kernels", build.OBJECTS_FOLDER)
        for variant in build.VARIANTS.values():
            build.build_objects(directory, variant)


def load_build():
    """The module that compiles; the package that it belongs to cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("llmir_kernels_build", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup(cmdclass={"build_py": BuildWithKernels})
