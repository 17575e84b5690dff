import pytest

from llmir_iree.plugins.kernels import build


def test_objects_need_nothing_from_outside(objects):
    assert sorted(path.name for path in objects.iterdir()) == [f"{source.stem}.o" for source in build.sources()]
    assert not any(build.undefined_symbols(path) for path in objects.iterdir())


def test_objects_of_different_instruction_sets_can_be_linked_together(objects):
    suffix = objects.name.partition("-")[2]
    names = [name for path in objects.iterdir() for name in build.exported_symbols(path)]
    assert f"llmir_append_kv_f16_{suffix}" in names
    assert all(name.startswith("llmir_") and name.endswith(f"_{suffix}") for name in names)


def replace_sources(monkeypatch, tmp_path, text):
    source = tmp_path / "kernel.c"
    source.write_text(text)
    monkeypatch.setattr(build, "sources", lambda: [source])


def test_a_kernel_that_calls_libc_is_refused(monkeypatch, tmp_path):
    replace_sources(
        monkeypatch,
        tmp_path,
        "void *memcpy(void *, const void *, unsigned long);\n"
        "void f(char *a, char *b, unsigned long n) { memcpy(a, b, n); }\n",
    )
    with pytest.raises(build.KernelBuildError, match=r"kernel\.c for x86_64-generic needs memcpy: not freestanding"):
        build.build_objects(tmp_path, build.VARIANTS["x86_64-generic"])


def test_a_compiler_error_is_shown_with_its_command(monkeypatch, tmp_path):
    replace_sources(monkeypatch, tmp_path, "int f(void) { return nothing; }\n")
    with pytest.raises(build.KernelBuildError, match=r"(?s)ziglang cc .*kernel\.c.*undeclared identifier 'nothing'"):
        build.build_objects(tmp_path, build.VARIANTS["x86_64-generic"])


def test_what_an_object_exports_is_renamed_and_nothing_else(monkeypatch, tmp_path):
    replace_sources(
        monkeypatch,
        tmp_path,
        "static int state;\n"
        "__attribute__((noinline)) static int next(void) { return ++state; }\n"
        "int first(void) { return next(); }\n"
        "int second(void) { return first() + next(); }\n",
    )
    for name in ("x86_64-avx2", "aarch64-i8mm"):
        (path,) = build.build_objects(tmp_path, build.VARIANTS[name])
        suffix = name.partition("-")[2]
        assert sorted(build.exported_symbols(path)) == [f"first_{suffix}", f"second_{suffix}"]
        assert build.undefined_symbols(path) == []


def test_a_variant_is_named_after_its_architecture():
    with pytest.raises(ValueError, match="variant neon must be named after its architecture aarch64"):
        build.Variant("neon", "aarch64", "generic")
