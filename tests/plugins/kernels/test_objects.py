import importlib.util

import pytest

from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.kernels import build, objects

AVX2 = build.VARIANTS["x86_64-avx2"]


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "PACKAGED", tmp_path / "no-objects")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_packaged_objects_come_first(monkeypatch, tmp_path):
    (tmp_path / AVX2.name).mkdir()
    monkeypatch.setattr(objects, "PACKAGED", tmp_path)
    assert objects.find_object(AVX2, "append_kv") == tmp_path / AVX2.name / "append_kv.o"


def test_without_packaged_objects_they_are_compiled_once(empty_cache, monkeypatch):
    built = []

    def build_objects(directory, variant):
        built.append(variant.name)
        (directory / variant.name).mkdir()
        (directory / variant.name / "append_kv.o").write_bytes(b"object")
        return [directory / variant.name / "append_kv.o"]

    monkeypatch.setattr(build, "build_objects", build_objects)
    paths = [objects.find_object(AVX2, "append_kv") for _ in range(2)]
    assert built == [AVX2.name]
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == b"object"
    assert empty_cache in paths[0].parents
    assert [path.name for path in paths[0].parent.parent.iterdir()] == [AVX2.name]


def test_without_objects_and_compiler_the_error_says_what_to_do(empty_cache, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else find_spec(name))
    with pytest.raises(
        CompileError, match=r"no compiled kernels.*ziglang, which is not installed.*from a wheel"
    ) as caught:
        objects.find_object(AVX2, "append_kv")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(empty_cache):
    empty_cache.write_text("a file, where a folder should be")
    with pytest.raises(CompileError, match=r"cannot keep compiled kernels in .*cache"):
        objects.find_object(AVX2, "append_kv")
