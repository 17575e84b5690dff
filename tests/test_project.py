"""What the repository promises about itself: its table of folders, what is packaged, who may import whom."""

import ast
import importlib
import importlib.resources
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]

# Whom the modules of a folder may import, of this project; `llmir_iree` itself stands above all others.
MAY_IMPORT = {
    "params": ["llmir_iree.params"],
    "export": ["llmir_iree.export", "llmir_iree.params"],
    "plugins": ["llmir_iree.plugins", "llmir_iree.params", "llmir_iree.export"],
    "tracing": ["llmir_iree.tracing", "llmir_iree.bundle", "llmir_iree.params.errors"],
}


def folder_of(package: str) -> Path:
    """Where a package stands in the repository."""
    name, rest = package, []
    while name not in SETUPTOOLS["package-dir"]:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    return ROOT.joinpath(SETUPTOOLS["package-dir"][name], *rest)


def project_imports(source: str) -> Iterator[str]:
    """Full names of what a source file imports from this project."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "llmir_iree")


def test_readme_tells_every_package_in_its_own_words() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w/]+)` \| (.+) \|$", readme, flags=re.MULTILINE))
    told = {str(folder_of(name).relative_to(ROOT)): importlib.import_module(name).__doc__ for name in PACKAGES}
    assert table == told


def test_every_folder_with_modules_is_a_package() -> None:
    tops = [ROOT / folder for folder in SETUPTOOLS["package-dir"].values()]
    folders = {path.parent for top in tops for path in top.rglob("*.py")}
    assert folders == {folder_of(package) for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_installed_package_holds_all_files(package: str) -> None:
    installed = {file.name for file in importlib.resources.files(package).iterdir()}
    files = {path.name for path in folder_of(package).iterdir() if path.suffix in (".py", ".mlir", ".typed")}
    assert files <= installed


def test_templates_are_found() -> None:
    # A guard of the test above: it would pass on an empty folder as well.
    assert list(folder_of("llmir_iree.plugins.portable").glob("*.mlir"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    allowed = [re.compile(rf"{re.escape(name)}(\.|$)") for name in MAY_IMPORT[folder]]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in project_imports(path.read_text(encoding="utf-8"))
        if not any(pattern.match(name) for pattern in allowed)
    ]
    assert not wrong


def test_imports_are_seen_in_every_form() -> None:
    source = "import llmir_iree.a\nfrom llmir_iree import b\ndef f():\n    from llmir_iree.c import d\nimport os"
    assert set(project_imports(source)) == {"llmir_iree.a", "llmir_iree.b", "llmir_iree.c.d"}
