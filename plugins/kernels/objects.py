"""Finds the compiled kernels: in the package, where a wheel has them, or in a cache that is filled on first use."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.kernels import build

PACKAGED = Path(__file__).parent / build.OBJECTS_FOLDER


def find_object(variant: build.Variant, name: str) -> Path:
    """The object of a kernel file for an instruction set.

    Raises:
        CompileError: the installation holds no objects, as an editable one does, and they cannot be compiled.
    """
    folder = PACKAGED / variant.name
    if not folder.is_dir():
        folder = _cached(variant)
    return folder / f"{name}.o"


def cache_folder() -> Path:
    """Where objects of installations that hold none are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmir-iree" / "kernels"


def _cached(variant: build.Variant) -> Path:
    """Folder of a variant's objects in the cache, compiled if the sources are new."""
    digest = hashlib.sha256()
    for source in [*sorted(build.SOURCES.glob("*.[ch]")), Path(build.__file__)]:
        digest.update(source.name.encode() + source.read_bytes())
    folder = cache_folder() / digest.hexdigest()[:16] / variant.name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside their place, so that who comes at the same time sees all objects or none.
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            built = build.build_objects(Path(partial), variant)[0].parent
            try:
                built.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except build.KernelBuildError as error:
        raise CompileError(
            f"this installation holds no compiled kernels, and they cannot be compiled: "
            f"{' | '.join(str(error).splitlines())} (install the "
            f"package from a wheel, or install ziglang=={build.COMPILER_VERSION}, or ask for portable implementations)"
        ) from None
    except OSError as error:
        raise CompileError(f"cannot keep compiled kernels in {folder}: {error.strerror or error}") from None
    return folder
