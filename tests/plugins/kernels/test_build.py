import pytest

from llmir_iree.plugins.kernels import build


@pytest.mark.parametrize("variant", build.VARIANTS.values(), ids=lambda variant: variant.name)
def test_objects_need_nothing_from_outside(tmp_path, variant):
    objects = build.build_objects(tmp_path, variant)
    assert [path.stem for path in objects] == [source.stem for source in build.sources()]
    assert {path.parent.name for path in objects} == {variant.name}


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


def test_a_variant_is_named_after_its_architecture():
    with pytest.raises(ValueError, match="variant neon must be named after its architecture aarch64"):
        build.Variant("neon", "aarch64", "generic")
