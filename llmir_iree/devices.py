"""Devices: opening them, what they say of themselves, and reading their buffers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import iree.runtime as rt
import numpy.typing as npt

from llmir_iree.bundle import Bundle, TargetInfo
from llmir_iree.params.errors import BundleError, TargetError
from llmir_iree.targets import FAMILIES

# What IREE's bindings raise for a failed status.
IREE_ERRORS = (RuntimeError, ValueError, IndexError, NotImplementedError)

_STAGING_MEMORY = int(rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE)
_STAGING_USAGE = int(rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING_SCOPED)

# One module serves both CPU drivers.
_SAME_DRIVERS = frozenset({"local-task", "local-sync"})


@dataclass(frozen=True)
class Subgroups:
    """The subgroup sizes that a device can run: its own choice, and those that a module may require."""

    default: int
    smallest: int
    largest: int

    def has(self, size: int) -> bool:
        """Whether a module for subgroups of this size computes what it should."""
        return self.smallest <= size <= self.largest

    def __str__(self) -> str:
        """One number, or the first and the last."""
        return str(self.default) if self.smallest == self.largest else f"{self.smallest} to {self.largest}"


def driver_of(uri: str) -> str:
    """The driver that a device URI names."""
    return uri.partition(":")[0]


def open_device(uri: str) -> rt.HalDevice:
    """Open a device.

    Raises:
        TargetError: this runtime has no such driver, or the driver no such device; the message says what it needs.
    """
    _check_driver(uri)
    try:
        return rt.get_device(uri)
    except IREE_ERRORS as error:
        raise TargetError(f"device {uri!r} cannot be opened: {first_line(error)}{_requirement(uri)}") from None


def subgroups_of(uri: str) -> Subgroups | None:
    """The subgroup sizes of a device, if its driver tells them: only Vulkan's does.

    A GPU of CUDA or Metal has 32 lanes, and one of HIP loads the code of its own chip only.

    Raises:
        TargetError: there is no such driver or device.
    """
    if driver_of(uri) != "vulkan":
        return None
    _check_driver(uri)
    try:
        driver = rt.get_driver(driver_of(uri))
        devices = driver.query_available_devices()
    except IREE_ERRORS as error:
        raise TargetError(f"device {uri!r} cannot be opened: {first_line(error)}{_requirement(uri)}") from None
    wanted = uri.partition("://")[2]
    ids = [device["device_id"] for index, device in enumerate(devices) if wanted in ("", device["path"], str(index))]
    if not ids:
        known = ", ".join(f"vulkan://{device['path']} ({device['name']})" for device in devices) or "none"
        raise TargetError(f"device {uri!r}: there is no such device; there are {known}{_requirement(uri)}")
    return parse_subgroups(driver.dump_device_info(ids[0]))


def parse_subgroups(info: str) -> Subgroups | None:
    """Read the subgroup sizes out of what IREE's Vulkan driver says of a device."""
    match = re.search(r"^subgroup: size=(\d+) .*\bminSubgroupSize=(\d+) maxSubgroupSize=(\d+)", info, re.MULTILINE)
    if match is None:
        return None
    default, smallest, largest = map(int, match.groups())
    # A driver without control of the size tells a range of nothing.
    return Subgroups(default, smallest or default, largest or default)


def choose_target(bundle: Bundle, name: str | None, uri: str | None) -> tuple[TargetInfo, str]:
    """The compiled target to run, and the device to run it on.

    Args:
        bundle: what to run.
        name: name of a compiled target; if left out, the one whose modules run on the device.
        uri: an IREE device URI; if left out, the target's driver.

    Raises:
        BundleError: no such target, or several that would do and no name.
        TargetError: the modules do not run on the device.
    """
    if uri is not None:
        _check_driver(uri)
    if uri is None or name is not None:
        target = bundle.target(name)
        uri = uri or target.driver
    else:
        target = _only(bundle, uri, (info for info in bundle.manifest.targets.values() if _runs_on(info, uri)))
    check_device(target, uri)
    return target, uri


def check_device(target: TargetInfo, uri: str) -> None:
    """Refuse a device on which modules would not load, or would give wrong numbers.

    Raises:
        TargetError: it has another driver, or no subgroups of the size that the modules are made for.
    """
    if not _runs_on(target, uri):
        raise TargetError(
            f"the modules for {target.target} run on {target.driver}, not on {uri}; "
            f"compile for that with llmir-compile, or leave --device out"
        )
    subgroups = None if target.subgroup_size is None else subgroups_of(uri)
    if subgroups is not None and not subgroups.has(target.subgroup_size or 0):
        fitting = [
            f"{family.name}:{chip.name}"
            for family in FAMILIES
            for chip in family.chips
            if family.driver == target.driver and subgroups.has(chip.subgroup_size or 0)
        ]
        raise TargetError(
            f"the modules for {target.target} are made for subgroups of {target.subgroup_size} lanes and would compute "
            f"nonsense on {uri}, which has {subgroups}; compile for one of {', '.join(fitting)}"
        )


def to_host(device: rt.HalDevice, uri: str, view: rt.HalBufferView) -> npt.NDArray[Any]:
    """A copy of the values of a view.

    Not what `DeviceArray` gives: that may be a mapping, which does not keep the buffer from being used again.
    """
    if driver_of(uri) == "vulkan":
        return _copy_to_host(device, view)
    # Always through a new one: it keeps what it read once, and a buffer written in place makes that stale.
    array: npt.NDArray[Any] = rt.DeviceArray(device, view).to_host().copy()
    return array


def first_line(error: Exception) -> str:
    """What an error of IREE's says, without the frames behind it."""
    with suppress(IndexError):
        return str(error).splitlines()[0]
    return type(error).__name__


def _copy_to_host(device: rt.HalDevice, view: rt.HalBufferView) -> npt.NDArray[Any]:
    """Read through a staging buffer.

    IREE 3.13 imports the array's memory as a Vulkan buffer instead, which is refused wherever it is not aligned to
    pages.
    """
    source = view.get_buffer()
    staging = device.allocator.allocate_buffer(
        memory_type=_STAGING_MEMORY, allowed_usage=_STAGING_USAGE, allocation_size=source.byte_length()
    )
    semaphore = device.create_semaphore(0)
    device.queue_copy(
        source,
        staging,
        wait_semaphores=rt.HalFence.create_at(semaphore, 0),
        signal_semaphores=rt.HalFence.create_at(semaphore, 1),
    )
    rt.HalFence.create_at(semaphore, 1).wait()
    array: npt.NDArray[Any] = (
        staging.map().asarray(view.shape, rt.HalElementType.map_to_dtype(view.element_type)).copy()
    )
    return array


def _check_driver(uri: str) -> None:
    driver = driver_of(uri)
    drivers = sorted(rt.query_available_drivers())
    if driver not in drivers:
        raise TargetError(f"device {uri!r}: this runtime has no driver {driver!r}; it has {', '.join(drivers)}")


def _runs_on(target: TargetInfo, uri: str) -> bool:
    drivers = {target.driver, driver_of(uri)}
    return len(drivers) == 1 or drivers <= _SAME_DRIVERS


def _only(bundle: Bundle, uri: str, candidates: Iterable[TargetInfo]) -> TargetInfo:
    """The one target that a device can run."""
    by_driver = list(candidates)
    subgroups = subgroups_of(uri)
    fitting = [
        target
        for target in by_driver
        if subgroups is None or target.subgroup_size is None or subgroups.has(target.subgroup_size)
    ]
    if len(fitting) == 1 or (not fitting and len(by_driver) == 1):
        return (fitting or by_driver)[0]  # If that does not fit, `check_device` says why.
    if fitting:
        names = ", ".join(target.target for target in fitting)
        raise BundleError(f"{bundle.folder}: {names} run on {uri}; name one with --target")
    known = ", ".join(bundle.manifest.targets) or "none"
    families = ", ".join(family.name for family in FAMILIES if family.driver == driver_of(uri)) or "another target"
    raise TargetError(
        f"{bundle.folder}: nothing that is compiled runs on {uri}; compiled targets: {known} "
        f"(llmir-compile {bundle.folder} --target makes more: {families})"
    )


def _requirement(uri: str) -> str:
    """What a machine needs for a driver, as the end of a message."""
    requirements = [family.requires for family in FAMILIES if family.driver == driver_of(uri)]
    return f"; it needs {requirements[0]}" if requirements else ""
