"""Slices of a GPU as NVIDIA's library tells of them: types of vGPU, and MIG profiles.

For: :mod:`casemate_agent.drivers.nvml`. What may live here: calls of pynvml about slices, and their translation.

Theory of operation. A VM is given a slice as a vGPU: a function of its own (a mediated device, or a virtual function of the
GPU) that the host's vGPU driver makes and carries. Two kinds of type exist (NVIDIA, "Virtual GPU Software User Guide", vGPU
types): *time-sliced* ones, of which a GPU carries so many of equal size; and *MIG-backed* ones, each of which takes a GPU
instance that the administrator has made, and is there only while MIG is on. A MIG instance by itself has no PCI function: it
serves processes and containers of the host, and no VM. Where the library tells no vGPU type, MIG profiles are in the
inventory as *bare*, so that who asks for one is told why, and nobody is placed on one.
"""

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from casemate_core.topology.model import ShareProfile

T = TypeVar("T")

MIB = 1 << 20
NOT_MIG_BACKED = 0xFFFFFFFF
"""INVALID_GPU_INSTANCE_PROFILE_ID of nvml.h: what a time-sliced type answers."""
MOST_TYPES = 128
MOST_INSTANCES = 16
MAKERS = ("NVIDIA ", "GRID ")
"""Stand before the name of a type, by the age of its driver; sysfs writes them too."""

Slices = tuple[int, tuple[ShareProfile, ...], bool]
"""Memory slots of the board, its profiles, and whether all slices at one time are of one profile."""
Told = Callable[..., Any]
"""Asks the library; None for what a board, or an older library, does not tell."""


def bare_name(name: str) -> str:
    """A type's name without its maker: ``A100-4C`` of ``NVIDIA A100-4C``."""
    for maker in MAKERS:
        name = name.removeprefix(maker)
    return name


def shares(told: Told, handle: Any, memory_mib: int, mig: bool | None) -> Slices:
    """How a board may be cut for VMs as it is now. ``mig``: whether MIG is on; None: it cannot be."""
    types = _types(told, handle)
    if not types:
        slots, profiles = _profiles(told, handle, memory_mib) if mig is not None else (0, ())
        return slots, profiles, False
    if mig:
        return _backed(told, handle, memory_mib, types)
    found: dict[str, ShareProfile] = {}
    for number, name, size_mib in types:
        if _instance_profile(told, number) != NOT_MIG_BACKED:
            continue
        most = told(_vgpu, pynvml.nvmlVgpuTypeGetMaxInstances, handle, number) or 0
        if most:
            found.setdefault(name, ShareProfile(name, max(1, min(999, 1000 // most)), min(size_mib, memory_mib)))
    return 0, tuple(sorted(found.values(), key=lambda p: (p.milli, p.name))), bool(found)


def _types(told: Told, handle: Any) -> list[tuple[int, str, int]]:
    """(number, name, memory in MiB) of each type of vGPU that the board supports, whatever is on it now."""
    found = []
    for number in (told(_vgpu, pynvml.nvmlDeviceGetSupportedVgpus, handle) or ())[:MOST_TYPES]:
        name = told(_vgpu, pynvml.nvmlVgpuTypeGetName, number)
        size = told(_vgpu, pynvml.nvmlVgpuTypeGetFramebufferSize, number)
        if name is None or size is None:
            continue
        text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        found.append((int(number), bare_name(text), int(size) // MIB))
    return found


def _vgpu(ask: Callable[..., T], *arguments: Any) -> T:
    """Ask about vGPUs. Whatever a library without them answers, it is about them alone: the rest of the board is told."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError_GpuIsLost:
        raise
    except pynvml.NVMLError:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED) from None


def _instance_profile(told: Told, number: int) -> int:
    """The MIG profile that a type takes; a library that does not know of them has time-sliced types only."""
    found = told(_vgpu, pynvml.nvmlVgpuTypeGetGpuInstanceProfileId, number)
    return NOT_MIG_BACKED if found is None else int(found)


def _backed(told: Told, handle: Any, memory_mib: int, types: list[tuple[int, str, int]]) -> Slices:
    """MIG-backed types, each where GPU instances of its profile were made."""
    found: dict[str, ShareProfile] = {}
    slots = 0
    for number, name, size_mib in types:
        profile = _instance_profile(told, number)
        if profile == NOT_MIG_BACKED:
            continue
        places = sorted(told(_vgpu, _instances, handle, profile) or ())
        if not places:
            continue
        slots = max(slots, *(start + size for start, size in places))
        found.setdefault(
            name,
            ShareProfile(
                name=name,
                milli=_milli(size_mib, memory_mib),
                memory_mib=min(size_mib, memory_mib),
                slots=places[0][1],
                starts=tuple(start for start, _ in places),
            ),
        )
    return slots, tuple(sorted(found.values(), key=lambda p: (p.milli, p.name))), False


def _instances(handle: Any, profile: int) -> list[tuple[int, int]]:
    """(first slot, slots) of each GPU instance of a profile that was made."""
    count = ctypes.c_uint(MOST_INSTANCES)
    handles = (pynvml.c_nvmlGpuInstance_t * MOST_INSTANCES)()
    pynvml.nvmlDeviceGetGpuInstances(handle, profile, handles, ctypes.byref(count))
    infos = [pynvml.nvmlGpuInstanceGetInfo(handles[i]) for i in range(min(count.value, MOST_INSTANCES))]
    return [(int(info.placement.start), int(info.placement.size)) for info in infos]


def _milli(size_mib: int, memory_mib: int) -> int:
    # by memory: it is what of a board runs out first, and compute slices are of 7 where memory's are of 8
    return max(1, min(999, round(1000 * size_mib / memory_mib))) if memory_mib else 999


def _profiles(told: Told, handle: Any, memory_mib: int) -> tuple[int, tuple[ShareProfile, ...]]:
    """Memory slots of the board, and its MIG profiles with where each may lie; bare, all of them."""
    found: dict[str, ShareProfile] = {}
    whole_slices = 0
    infos = []
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        info = told(_profile, handle, number)
        if info is not None:
            infos.append(info)
            whole_slices = max(whole_slices, info.sliceCount)
    slots = 0
    for info in infos:
        places = told(_places, handle, info.id) or ()
        slots = max(slots, *(start + size for start, size in places), 0)
        if info.sliceCount >= whole_slices or not places:
            continue  # the whole board as one slice is asked for as a GPU
        name = f"{info.sliceCount}g.{-(-int(info.memorySizeMB) // 1024)}gb"
        found.setdefault(
            name,
            ShareProfile(
                name=name,
                milli=_milli(int(info.memorySizeMB), memory_mib),
                memory_mib=int(info.memorySizeMB),
                slots=places[0][1],
                starts=tuple(start for start, _ in places),
                bare=True,
            ),
        )
    return slots, tuple(sorted(found.values(), key=lambda p: (p.milli, p.name)))


def _profile(handle: Any, number: int) -> Any:
    """A board answers InvalidArgument for a profile that it does not know."""
    try:
        return pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, number, version=1)
    except pynvml.NVMLError_InvalidArgument:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED) from None


def _places(handle: Any, profile: int) -> tuple[tuple[int, int], ...]:
    count = ctypes.c_uint(0)
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile, None, ctypes.byref(count))
    if not count.value:
        return ()
    places = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile, places, ctypes.byref(count))
    return tuple((int(p.start), int(p.size)) for p in places[: count.value])
