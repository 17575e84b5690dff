"""The kernels behind numpy calls, in programs of their own: for this machine, for others, and with sanitizers."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from llmir_iree.plugins.kernels import build
from llmir_iree.plugins.kernels.objects import find_object
from tests.sharing import shared_folder

GROUP = 32
ATTENDED_QUERIES = 32

# What /proc/cpuinfo says of a processor that runs an instruction set.
_NEEDS = {
    "x86_64-avx512vnni": "avx512_vnni",
    "x86_64-avx2": "avx2",
    "x86_64-generic": "sse2",
    "aarch64-i8mm": "i8mm",
    "aarch64-dotprod": "asimddp",
    "aarch64-generic": "asimd",
}
_FLAGS = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
_RUNNABLE = [name for name, need in _NEEDS.items() if need in _FLAGS]
_EMULATOR = {"aarch64": "qemu-aarch64"}

_DRIVER = Path(__file__).parent / "driver.c"
_LANES = Path(__file__).parent / "lanes.c"
_FAULTY = Path(__file__).parent / "faulty.c"
_GCC_FLAGS = (
    *("-std=gnu17", "-O1", "-g1", "-fno-math-errno", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    # Checks are calls instead of code in place: compiling takes a third less.
    *("--param", "asan-instrumentation-with-call-threshold=0"),
)
_GCC_PROCESSOR = {
    "x86_64-avx512vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "x86_64-avx2": ("-march=x86-64-v3",),
    "x86_64-generic": ("-march=x86-64",),
    **dict.fromkeys(("aarch64-i8mm", "aarch64-dotprod", "aarch64-generic"), ("-mcpu=native",)),
}

_RECORD = np.dtype(
    [
        ("codes", np.int8, GROUP),
        ("scale", np.float32),
        ("start", np.int32),
        ("scaled_start", np.float32),
        *((name, np.int16) for name in ("low_start", "has_rest")),
    ]
)


def read_records(packed, rows, columns):
    """Records [rows, groups, 2] of quantised activations, as activations.h lays them out; those missing are zero."""
    groups = columns // GROUP
    halves = []
    for records in np.split(packed.view(_RECORD), 2):
        blocks = [
            records[first * groups : min(rows, first + 32) * groups].reshape(groups, -1) for first in range(0, rows, 32)
        ]
        halves.append(np.concatenate([block.T for block in blocks]))
    first, second = halves
    return np.stack((first, np.where(first["has_rest"] != 0, second, np.zeros_like(second))), axis=-1)


def dequantize_activations(packed, rows, columns):
    """What quantised activations stand for, float64 [rows, columns]."""
    records = read_records(packed, rows, columns)
    values = records["codes"] * records["scale"][..., None].astype(np.float64)
    return values.sum(2).reshape(rows, columns)


def rounding_bound(x, has_rest=False):
    """How far each of x may be from what it is rounded to: half a step of its group of 32, and float32's rounding.

    A step is the group's largest magnitude / 127; a second record divides it by 254 once more, in groups `has_rest`
    [rows, groups].
    """
    reach = np.abs(x.astype(np.float64).reshape(len(x), -1, GROUP)).max(-1)
    steps = np.where(has_rest, 254.0**2, 254.0)
    bound = reach / steps * (1 + 1e-4) + 2.0**-22 * reach + 2.0**-120
    return np.repeat(bound, GROUP, axis=-1)


class Program:
    """Kernels in a process of their own, which driver.c serves; the requests are described there."""

    def __init__(self, command, symbol):
        self._command = command
        self._symbol = symbol
        self._process = None

    def call(self, name, arrays, calls):
        """Call a kernel once for each tuple of sizes, whose floats are always the same.

        Reading or writing outside of an array ends the other process.
        """
        if self._process is None:
            # In its folder, where a core that an emulator dumps is in nobody's way.
            self._process = subprocess.Popen(
                self._command, cwd=self._command[-1].parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        symbol = self._symbol(name).encode()
        floats = np.array([size for size in calls[0] if isinstance(size, float)], np.float32)
        integers = np.array([[size for size in sizes if not isinstance(size, float)] for sizes in calls], np.uint64)
        request = [np.uint64(len(symbol)), symbol, np.uint64(len(arrays))]
        for array in arrays:
            request += [np.uint64(array.nbytes), array]
        request += [np.uint64(len(floats)), floats, *np.array(integers.shape, np.uint64), integers]
        try:
            for part in request:
                self._process.stdin.write(part if isinstance(part, bytes) else part.tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail(name)
        for array in arrays:
            answer = self._process.stdout.read(array.nbytes)
            if len(answer) < array.nbytes:
                self._fail(name)
            array.reshape(-1).view(np.uint8)[...] = np.frombuffer(answer, np.uint8)

    def close(self):
        """End the process; it must not have failed."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            assert self._process.wait() == 0

    def _fail(self, name):
        # The next test gets a new process.
        process, self._process = self._process, None
        process.stdin.close()
        process.stdout.close()
        pytest.fail(f"{name}: {self._command[-1]} ended with {process.wait()}, see stderr")


class Kernels:
    """Kernels of one build; the workgroups of a dispatch run one after the other."""

    def __init__(self, program):
        self._program = program

    def dispatch(self, name, arrays, workgroups, sizes):
        """Run a kernel for each workgroup: arrays are passed as pointer and offset 0, what follows by its type."""
        assert all(array.flags.c_contiguous for array in arrays)
        self._program.call(name, arrays, [sizes(workgroup) for workgroup in workgroups])

    def quantize(self, x, rows_per_workgroup=3):
        """Quantised activations of x as bytes."""
        return self._quantize("llmir_quantize_activations", (x,), (), rows_per_workgroup)

    def norm_quantize(self, x, weight, epsilon, rows_per_workgroup=3):
        """Quantised activations of the norm of x."""
        return self._quantize("llmir_norm_quantize", (x, weight), (epsilon,), rows_per_workgroup)

    def add_norm_quantize(self, x, residual, weight, epsilon, rows_per_workgroup=3):
        """The sum of x and residual, and quantised activations of its norm."""
        total = np.full_like(x, np.nan)
        arrays = (x, residual, weight, total)
        return total, self._quantize("llmir_add_norm_quantize", arrays, (epsilon,), rows_per_workgroup)

    def _quantize(self, name, arrays, floats, rows_per_workgroup):
        rows, columns = arrays[0].shape
        out = _codes(rows, columns)
        self.dispatch(
            name,
            (*arrays, out),
            range(-(-rows // rows_per_workgroup)),
            lambda w: (rows, columns, *floats, w, rows_per_workgroup),
        )
        return out

    def matmul(self, weight_format, tiles, x, columns, workgroups=3):
        """x [rows, depth] times the tiles of a [columns, depth] matrix."""
        rows, depth = x.shape
        is_plain = weight_format in ("f16", "bf16")
        y = np.full((rows, columns), np.nan, np.float32)
        self.dispatch(
            f"llmir_quantized_matmul_{weight_format}",
            (*tiles.values(), x if is_plain else self.quantize(x), y),
            range(workgroups),
            lambda w: (rows, columns, depth, w, workgroups),
        )
        return y

    def gated_matmul(self, weight_format, tiles, codes, rows, columns, depth, workgroups=3):
        """Quantised activations of silu(gate) * up, from those of x and the tiles of gates and ups."""
        out = _codes(rows, columns)
        self.dispatch(
            f"llmir_gated_matmul_{weight_format}",
            (*tiles.values(), codes, out),
            range(workgroups),
            lambda w: (rows, columns, depth, w, workgroups),
        )
        return out

    def append(self, cache, key, value, page_table, positions, layer, tokens_per_workgroup=2):
        """Write into the cache."""
        _, layers, _, kv_heads, page_size, head_dim = cache.shape
        batch, seq = positions.shape
        sizes = (batch, seq, kv_heads, head_dim, page_size, page_table.shape[1], layers, layer)
        self.dispatch(
            f"llmir_append_kv_{_element(cache)}",
            (cache, key, value, page_table, positions),
            range(-(-batch * seq // tokens_per_workgroup)),
            lambda w: (*sizes, w, tokens_per_workgroup),
        )

    def attend(self, query, cache, page_table, positions, layer, scale, window=0, softcap=0.0):
        """Output, shaped like the query."""
        _, layers, _, kv_heads, page_size, head_dim = cache.shape
        batch, seq, heads, _ = query.shape
        output = np.full_like(query, np.nan)
        sizes = (seq, heads, kv_heads, head_dim, page_size, page_table.shape[1], layers, layer, window)
        self.dispatch(
            f"llmir_paged_attention_{_element(cache)}",
            (query, cache, page_table, positions, output),
            np.ndindex(-(-seq * (heads // kv_heads) // ATTENDED_QUERIES), kv_heads, batch),
            lambda w: (*sizes, float(scale), float(softcap), *w),
        )
        return output

    def rope_append(self, cache, qkv, page_table, positions, rotation, layer, tokens_per_workgroup=2):
        """Write the rotated keys and the values of `qkv` [batch, seq, columns] into the cache."""
        _, layers, _, kv_heads, page_size, head_dim = cache.shape
        batch, seq, columns = qkv.shape
        sizes = (batch, seq, kv_heads, head_dim, page_size, page_table.shape[1], layers, layer)
        places = (columns, columns - 2 * kv_heads * head_dim, columns, columns - kv_heads * head_dim)
        self.dispatch(
            f"llmir_rope_append_{_element(cache)}",
            (cache, qkv, qkv, page_table, positions, *rotation),
            range(-(-batch * seq // tokens_per_workgroup)),
            lambda w: (*sizes, *places, w, tokens_per_workgroup),
        )

    def rope_attend(self, qkv, cache, page_table, positions, rotation, layer, scale, window=0, softcap=0.0):
        """Output [batch, seq, heads, head_dim] of the rotated queries in `qkv` [batch, seq, columns]."""
        _, layers, _, kv_heads, page_size, head_dim = cache.shape
        batch, seq, columns = qkv.shape
        heads = columns // head_dim - 2 * kv_heads
        output = np.full((batch, seq, heads, head_dim), np.nan, np.float32)
        sizes = (seq, heads, kv_heads, head_dim, page_size, page_table.shape[1], layers, layer, columns, 0, window)
        self.dispatch(
            f"llmir_rope_attend_{_element(cache)}",
            (qkv, cache, page_table, positions, *rotation, output),
            np.ndindex(-(-seq * (heads // kv_heads) // ATTENDED_QUERIES), kv_heads, batch),
            lambda w: (*sizes, float(scale), float(softcap), *w),
        )
        return output

    def rope_append_attend(
        self, cache, qkv, page_table, positions, rotation, layer, scale, window=0, softcap=0.0, splits=1, order=1
    ):
        """Partials [batch, heads, splits, head_dim + 2]; the workgroups run forwards or backwards, as `order` says."""
        _, layers, _, kv_heads, page_size, head_dim = cache.shape
        batch, _, columns = qkv.shape
        heads = columns // head_dim - 2 * kv_heads
        partials = np.full((batch, heads, splits, head_dim + 2), np.nan, np.float32)
        sizes = (heads, kv_heads, head_dim, page_size, page_table.shape[1], layers, layer)
        key_first, value_first = heads * head_dim, (heads + kv_heads) * head_dim
        places = (columns, 0, columns, key_first, columns, value_first)
        self.dispatch(
            f"llmir_rope_append_attend_{_element(cache)}",
            (cache, qkv, qkv, qkv, page_table, positions, *rotation, partials),
            list(np.ndindex(splits, kv_heads, batch))[::order],
            lambda w: (*sizes, *places, window, float(scale), float(softcap), splits, *w),
        )
        return partials

    def merge_quantize(self, partials, columns_per_workgroup=512):
        """Quantised output of partials."""
        batch, heads, splits, head_dim = (*partials.shape[:3], partials.shape[3] - 2)
        out = _codes(batch, heads * head_dim)
        self.dispatch(
            "llmir_merge_attention_quantize",
            (partials, out),
            np.ndindex(-(-heads * head_dim // columns_per_workgroup), batch),
            lambda w: (batch, heads, head_dim, splits, *w, columns_per_workgroup),
        )
        return out

    def merge(self, partials, columns_per_workgroup=512):
        """Output [batch, 1, heads, head_dim] of partials."""
        batch, heads, splits, head_dim = (*partials.shape[:3], partials.shape[3] - 2)
        output = np.full((batch, 1, heads, head_dim), np.nan, np.float32)
        self.dispatch(
            "llmir_merge_attention",
            (partials, output),
            np.ndindex(-(-heads * head_dim // columns_per_workgroup), batch),
            lambda w: (heads, head_dim, splits, *w, columns_per_workgroup),
        )
        return output


def _element(cache):
    return {"float16": "f16", "bfloat16": "bf16"}[cache.dtype.name]


def _codes(rows, columns):
    return np.full(rows * columns // GROUP * 2 * _RECORD.itemsize, 0xAA, np.uint8)


def _table(objects):
    """The flag that tells driver.c what it is linked with."""
    return "-DKERNELS=" + " ".join(f"KERNEL({name})" for path in objects for name in build.exported_symbols(path))


def _build_sanitized(folder, variant):
    """The driver and the kernels, compiled by GCC: the clang in ziglang comes without AddressSanitizer."""
    command = ["gcc", *_GCC_FLAGS, *_GCC_PROCESSOR[variant.name]]

    def compile_object(source):
        subprocess.run([*command, "-c", source, "-o", folder / f"{source.stem}.o"], check=True)
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_object, build.sources()))
    subprocess.run([*command, _table(objects), _DRIVER, *objects, "-o", folder / "driver"], check=True)


def _run_sanitized(folder, _variant):
    return Program([folder / "driver"], str)


def _build(folder, variant):
    """The driver with the objects that the installation holds, linked as they are, and those of the tests."""
    released = [find_object(variant, source.stem) for source in build.sources() if source.parent == build.SOURCES]
    with pytest.MonkeyPatch.context() as patch:
        own = [source for source in build.sources() if source.parent != build.SOURCES]
        patch.setattr(build, "sources", lambda: own)
        objects = [*released, *build.build_objects(folder, variant)]
    build.build_program(folder / "driver", variant, [_DRIVER, *objects], [_table(objects)])


def _run(folder, variant):
    emulator = () if variant.name in _RUNNABLE else (_EMULATOR[variant.architecture],)
    return Program([*emulator, folder / "driver"], variant.symbol)


def _skip(is_skipped, reason):
    return pytest.mark.skipif(is_skipped, reason=reason)


def _builds():
    """All instruction sets as they are released, and one with sanitizers."""
    for name, variant in build.VARIANTS.items():
        emulator = _EMULATOR.get(variant.architecture)
        reason = f"needs a processor with {_NEEDS[name]}" + (f", or {emulator} of qemu-user" if emulator else "")
        is_skipped = name not in _RUNNABLE and (emulator is None or shutil.which(emulator) is None)
        yield pytest.param((_build, _run, name), id=name, marks=_skip(is_skipped, reason))
    yield _SANITIZED


# The best of this machine's; those that are left compute other values, but no other addresses.
_SANITIZED = pytest.param(
    (_build_sanitized, _run_sanitized, _RUNNABLE[0]),
    id=f"{_RUNNABLE[0]}-sanitized",
    marks=_skip(not shutil.which("gcc"), "needs gcc"),
)


@contextmanager
def _program(param, factory, folder_name, sources):
    build_driver, run_driver, name = param
    variant = build.VARIANTS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "sources", lambda: sources)
        with shared_folder(factory, f"{folder_name}-{build_driver.__name__}-{name}") as (folder, is_filled):
            if not is_filled:
                build_driver(folder, variant)
    program = run_driver(folder, variant)
    yield program
    program.close()


@pytest.fixture(scope="session")
def runnable():
    """Names of the variants that this machine runs."""
    return _RUNNABLE


@pytest.fixture(
    scope="session",
    params=[name for name, variant in build.VARIANTS.items() if variant.architecture == platform.machine()],
)
def objects(request):
    """Folder of the freestanding objects, once for every instruction set of this architecture, whatever runs here."""
    return find_object(build.VARIANTS[request.param], build.sources()[0].stem).parent


@pytest.fixture
def runnable_objects(objects):
    """The same, where this machine runs them."""
    if objects.name not in _RUNNABLE:
        pytest.skip(f"needs a processor with {_NEEDS[objects.name]}")
    return objects


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The references are tiny: waking threads for them takes longer than their sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=_builds())
def kernels(request, tmp_path_factory):
    """The kernels, once for every instruction set that runs here or under an emulator, and once with sanitizers."""
    with _program(request.param, tmp_path_factory, "kernels", [*build.sources(), _LANES]) as program:
        yield Kernels(program)


@pytest.fixture(scope="session", params=_builds())
def faulty(request, tmp_path_factory):
    """Kernels that do what none may do, in all these builds."""
    with _program(request.param, tmp_path_factory, "faulty", [_FAULTY]) as program:
        yield program


@pytest.fixture(scope="session", params=[_SANITIZED])
def faulty_sanitized(request, tmp_path_factory):
    """The same where what does no harm is noticed, too."""
    with _program(request.param, tmp_path_factory, "faulty", [_FAULTY]) as program:
        yield program
