"""What this machine's cores give at best: bytes read, and bytes or floats multiplied, measured by kernels of our own.

They run as a bundle's modules do, compiled by IREE and on the threads of its device, so that both meet the same limits.
"""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import iree.runtime as rt
import numpy as np
import numpy.typing as npt

from llmir_iree.compile import compile_mlir
from llmir_iree.machine import cpu_count
from llmir_iree.params.errors import CompileError
from llmir_iree.plugins.kernels.peaks import PRODUCTS, Multiplied, peaks_module
from llmir_iree.scheduling import behind_workers
from llmir_iree.targets import resolve_target

_TARGET = "llvm-cpu"

# Several times the last-level cache of most machines, and small enough not to show in a process's memory.
_BUFFER_BYTES = 96 << 20
_FILE_BYTES = 512 << 20
_VECTOR_BYTES = 64
# Some for each core, so that one that comes late does not keep the others waiting.
_WORKGROUPS_PER_CORE = 8
# Of a workgroup; some milliseconds together.
_ROUNDS = 100_000
_PASSES = 12
_PATIENCE_S = 0.3

_DEVICE_LOCAL = int(rt.MemoryType.DEVICE_LOCAL)
_HOST_VISIBLE = int(rt.MemoryType.HOST_VISIBLE)
_MAPPED_USAGE = int(rt.BufferUsage.DEFAULT) | int(rt.BufferUsage.MAPPING)
_ELEMENT_TYPES = {"int8": rt.HalElementType.SINT_8, "float32": rt.HalElementType.FLOAT_32}


@dataclass(frozen=True)
class Rate:
    """What some passes did a second.

    Attributes:
        best: of the fastest pass: what disturbs one makes it slower, never faster.
        mean: of all passes together: what whoever else ran for as long could have had.
    """

    best: float
    mean: float

    @classmethod
    def of(cls, amount: float, seconds: Sequence[float]) -> Rate:
        """The rate of passes that did `amount` each."""
        return cls(amount / min(seconds), amount / fmean(seconds))


class PeakMeter:
    """The compiled kernels, loaded on all cores."""

    def __init__(self, module: Path) -> None:
        """Load what `peaks_module` describes, compiled."""
        self._device = rt.get_device(resolve_target(_TARGET).driver)
        instance = rt.VmInstance()
        with module.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._module = rt.VmModule.wrap_buffer(instance, mapped)
        self._context = rt.VmContext(instance, [rt.create_hal_module(instance, self._device), self._module])
        self._workgroups = _WORKGROUPS_PER_CORE * cpu_count()

    def bandwidth(self, file: Path | None = None) -> Rate:
        """Bytes a second of a plain read of memory by all cores, in under half a second.

        Args:
            file: read this file's pages instead of a buffer of our own, where it is large enough to defeat the caches.
                It should be in the page cache already, as weights are that a run has just read.
        """
        memory = _memory(file)
        nbytes = len(memory) // _VECTOR_BYTES * _VECTOR_BYTES
        buffer = self._device.allocator.import_host_allocation(
            memory, memory_type=_DEVICE_LOCAL | _HOST_VISIBLE, allowed_usage=_MAPPED_USAGE
        )
        view = rt.HalBufferView(buffer, (nbytes,), rt.HalElementType.SINT_8)
        return Rate.of(nbytes, _time_passes(lambda: self._call("read_memory", view, self._workgroups)))

    def macs(self, multiplied: Multiplied = "bytes") -> Rate:
        """Products a second, each added to a sum of 32 bits, by all cores, in under half a second."""
        products = PRODUCTS[multiplied]
        operand = self._upload(np.ones(products.shape, products.dtype))
        seconds = _time_passes(lambda: self._call(products.function, operand, operand, self._workgroups, _ROUNDS))
        return Rate.of(self._workgroups * _ROUNDS * products.macs_per_round, seconds)

    def _upload(self, values: npt.NDArray[np.generic]) -> rt.HalBufferView:
        buffer = self._device.allocator.allocate_buffer_copy(
            memory_type=_DEVICE_LOCAL, allowed_usage=_MAPPED_USAGE, device=self._device, buffer=values
        )
        return rt.HalBufferView(buffer, values.shape, _ELEMENT_TYPES[values.dtype.name])

    def _call(self, function: str, *arguments: rt.HalBufferView | int) -> npt.NDArray[np.generic]:
        """Run a function and return its result, which is there only when all workgroups are done."""
        packed, results = rt.VmVariantList(len(arguments)), rt.VmVariantList(1)
        for argument in arguments:
            if isinstance(argument, int):
                packed.push_int(argument)
            else:
                packed.push_ref(argument)
        with behind_workers():
            self._context.invoke(self._module.lookup_function(function), packed, results)
        view = results.get_as_object(0, rt.HalBufferView)
        values: npt.NDArray[np.generic] = rt.DeviceArray(self._device, view).to_host()
        return values


@lru_cache(maxsize=1)
def open_peak_meter() -> PeakMeter | None:
    """The kernels, compiled for this machine on the first call, which takes about a second.

    Returns:
        None where there are no kernels for this machine, or where the installation lacks them and cannot compile them:
        the machine's peaks are not known then.
    """
    target = resolve_target(_TARGET)
    try:
        text = peaks_module(target)
    except CompileError:
        return None
    if text is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "peaks.vmfb"
        compile_mlir(text, module, target.flags)
        return PeakMeter(module)


def measure_bandwidth(file: Path | None = None) -> float | None:
    """The best `PeakMeter.bandwidth` of this machine, None where it cannot be measured."""
    meter = open_peak_meter()
    return None if meter is None else meter.bandwidth(file).best


def _memory(file: Path | None) -> mmap.mmap:
    """Memory to read: the file's first pages if there are enough, else a buffer of our own."""
    if file is not None and file.stat().st_size >= _BUFFER_BYTES:
        with file.open("rb") as stream:
            # The runtime takes no read-only memory; of this, a page that nobody writes is still the file's own.
            return mmap.mmap(stream.fileno(), min(file.stat().st_size, _FILE_BYTES), access=mmap.ACCESS_COPY)
    memory = mmap.mmap(-1, _BUFFER_BYTES)
    # Written once: pages that never were are all the same one.
    np.frombuffer(memory, np.uint8)[:] = 1
    return memory


def _time_passes(run: Callable[[], object]) -> list[float]:
    """The seconds of some passes, after one that is not timed."""
    run()
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < _PASSES:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        seconds.append(end - start)
        if end - begin > _PATIENCE_S:
            break
    return seconds
