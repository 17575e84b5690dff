"""The native builds of the kernels, behind numpy calls."""

import ctypes
import mmap
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from llmir_iree.plugins.kernels import build

GROUP, GROUP_BYTES = 32, 40

# The instruction sets that this machine runs, by a flag of /proc/cpuinfo.
_NEEDS = {"x86_64-avx512vnni": "avx512_vnni", "x86_64-avx2": "avx2", "x86_64-generic": "sse2"}


_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0
_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@contextmanager
def guarded(array):
    """Address of a copy between two pages that may not be touched, its end at the second; it is copied back after."""
    pages = -(-array.nbytes // _PAGE) * _PAGE
    memory = mmap.mmap(-1, pages + 2 * _PAGE)
    view = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(view)
    address = start + _PAGE + pages - array.nbytes
    ctypes.memmove(address, array.ctypes.data, array.nbytes)
    for guard in (start, start + _PAGE + pages):
        assert _libc.mprotect(guard, _PAGE, _NO_ACCESS) == 0
    yield address
    ctypes.memmove(array.ctypes.data, address, array.nbytes)
    del view
    memory.close()


class Kernels:
    """Calls of one shared library; the workgroups of a dispatch run one after the other."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))

    def dispatch(self, name, arrays, workgroups, sizes):
        """Run a kernel for each workgroup: arrays are passed as pointer and offset 0, what follows by its type.

        Reading or writing outside of an array ends the process.
        """
        function = getattr(self._library, name)
        function.restype = None
        with ExitStack() as stack:
            buffers = []
            for array in arrays:
                assert array.flags.c_contiguous
                buffers += [ctypes.c_void_p(stack.enter_context(guarded(array))), ctypes.c_size_t(0)]
            for workgroup in workgroups:
                scalars = (ctypes.c_float(s) if isinstance(s, float) else ctypes.c_size_t(s) for s in sizes(workgroup))
                function(*buffers, *scalars)

    def quantize(self, x, rows_per_workgroup=3):
        """Activation groups of x as bytes."""
        rows, columns = x.shape
        out = np.full(rows * columns // GROUP * GROUP_BYTES, 0xAA, np.uint8)
        workgroups = range(-(-rows // rows_per_workgroup))
        self.dispatch(
            "llmir_quantize_activations", (x, out), workgroups, lambda w: (rows, columns, w, rows_per_workgroup)
        )
        return out

    def matmul(self, weight_format, tiles, x, columns, tiles_per_workgroup=2):
        """x [rows, depth] times the tiles of a [columns, depth] matrix."""
        rows, depth = x.shape
        operand = x if weight_format in ("f16", "bf16") else self.quantize(x)
        y = np.full((rows, columns), np.nan, np.float32)
        self.dispatch(
            f"llmir_quantized_matmul_{weight_format}",
            (*tiles.values(), operand, y),
            range(-(-columns // (16 * tiles_per_workgroup))),
            lambda w: (rows, columns, depth, w, tiles_per_workgroup),
        )
        return y

    def append(self, cache, key, value, page_table, positions, layer, tokens_per_workgroup=2):
        """Write into the cache."""
        _, layers, _, kv_heads, page_size, head_dim = cache.shape
        batch, seq = positions.shape
        sizes = (batch, seq, kv_heads, head_dim, page_size, page_table.shape[1], layers, layer)
        self.dispatch(
            "llmir_append_kv_f16",
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
            "llmir_paged_attention_f16",
            (query, cache, page_table, positions, output),
            np.ndindex(-(-seq * (heads // kv_heads) // 16), kv_heads, batch),
            lambda w: (*sizes, float(scale), float(softcap), *w),
        )
        return output


_FLAGS = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


def _runnable():
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(need not in _FLAGS, reason=f"needs a processor with {need}"),
        )
        for name, need in _NEEDS.items()
    ]


@pytest.fixture(scope="session")
def runnable():
    """Names of the variants that this machine runs."""
    return {name for name, need in _NEEDS.items() if need in _FLAGS}


@pytest.fixture(scope="session", params=_runnable())
def objects(request, tmp_path_factory):
    """Folder of the freestanding objects, once for every instruction set of this machine."""
    variant = build.VARIANTS[request.param]
    return build.build_objects(tmp_path_factory.mktemp("objects"), variant)[0].parent


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The references are tiny: waking threads for them takes longer than their sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=_runnable())
def kernels(request, tmp_path_factory):
    """The kernels, once for every instruction set of this machine."""
    variant = build.VARIANTS[request.param]
    return Kernels(build.build_library(tmp_path_factory.mktemp("kernels") / f"{variant.name}.so", variant))
