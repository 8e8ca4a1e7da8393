"""GPUs as NVIDIA's library tells of them.

For: :class:`casemate_agent.gpu.readings`. What may live here: calls of pynvml, and the translation of what it answers.

Theory of operation. The library is loaded at the first question, and anew after it said that it is not ready: a driver may
come and go under a running agent. Each value is asked for on its own, so that one which a board does not tell, or an older
library does not have, is unknown and nothing else is. Every call runs in a thread of its own with a deadline: NVML waits for
the kernel's driver, which waits for the board, and a board that is dying answers nobody. While a call hangs, further
questions are refused; the agent goes on.

Only GPUs that the host's own driver holds are seen here. One that is on vfio-pci is not told, which says nothing of it.
"""

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pynvml

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.nvmlshares import shares
from casemate_agent.gpu.readings import GpuFault, GpuReading
from casemate_core.errors import DeadlineExceeded, MachineError, Unavailable

T = TypeVar("T")

MIB = 1 << 20
MAX_PROCESSES = 64
XID_WAIT_MS = 1000
_UNTOLD = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NotFound,
)
"""Answers that mean "this board, or this library, does not tell"."""
_AGAIN = (pynvml.NVMLError_Uninitialized, pynvml.NVMLError_DriverNotLoaded)


class NvmlFailed(MachineError):
    """The library answered with an error that is about more than one value."""

    reason = "NvmlFailed"


class NvmlGpus:
    """The GPUs of this host. Use it from one event loop, and close it."""

    def __init__(self) -> None:
        self._calls = DeadlineExecutor("nvml", threads=1, max_stuck=1)
        self._waits = DeadlineExecutor("nvml-events", threads=1, max_stuck=1)
        self._ready = False
        #: Counts how often the library was closed; event sets of a former turn are gone.
        self._turn = 0
        self._sets: list[Any] = []

    async def aclose(self) -> None:
        """Let the threads go; one that hangs ends with its call."""
        self._calls.close()
        self._waits.close()

    async def read(self, deadline_s: float) -> tuple[GpuReading, ...]:
        """Every GPU that the host's driver holds, by UUID.

        Raises Unavailable where there is no driver, or a call hangs already; DeadlineExceeded; NvmlFailed.
        """
        return await self._calls.run("read GPUs", self._read, deadline_s)

    async def let_go(self, deadline_s: float) -> None:
        """Close the library, so that nothing of this process holds a device; the next question loads it anew. Who waits for
        XIDs is told that it is over."""
        self._turn += 1
        # behind the wait that is under way, in the one thread that waits
        await self._waits.run("end waiting", self._end_waits, deadline_s)
        await self._calls.run("close NVML", self._close, deadline_s)

    async def driver(self, deadline_s: float) -> str:
        """Version of the driver. Raises as ``read`` does."""
        return await self._calls.run("ask the driver's version", self._version, deadline_s)

    async def faults(self) -> AsyncIterator[GpuFault]:
        """XIDs as they happen, for as long as the driver is there; raises as ``read`` does."""
        await self._calls.run("prepare for XIDs", self._prepare, 10.0)
        turn = self._turn
        events, names = await self._waits.run("register for XIDs", self._register, 10.0)

        def wait() -> GpuFault | None:
            return self._wait(events, names)

        def late(_: GpuFault | None) -> None:
            self._free(events)

        inside = False
        try:
            while True:
                if turn != self._turn:
                    raise Unavailable("NVML: the library was closed; ask again")
                try:
                    fault = await self._waits.run("wait for XIDs", wait, XID_WAIT_MS / 1000 + 10, discard=late)
                except (DeadlineExceeded, asyncio.CancelledError):
                    # A thread is inside a call with the set, and frees it afterwards: not under it, and not by a call that
                    # would have to wait for it and fail, for then a cancellation would be lost.
                    inside = True
                    raise
                if fault is not None:
                    yield fault
        finally:
            if not inside:
                await self._waits.run("end waiting", lambda: self._free(events), 10.0)

    # --- in threads ---

    def _free(self, events: Any) -> None:
        if events in self._sets:
            self._sets.remove(events)
            pynvml.nvmlEventSetFree(events)

    def _end_waits(self) -> None:
        for events in list(self._sets):
            self._free(events)

    def _close(self) -> None:
        if self._ready:
            self._ready = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                raise NvmlFailed(f"NVML does not close: {error}") from error

    def _prepare(self) -> None:
        if self._ready:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise Unavailable("NVML: no libnvidia-ml.so.1; the NVIDIA driver is not installed here") from None
        except pynvml.NVMLError_DriverNotLoaded:
            raise Unavailable("NVML: the NVIDIA driver is installed and not loaded") from None
        except pynvml.NVMLError as error:
            raise NvmlFailed(f"NVML does not start: {error}") from error
        self._ready = True

    def _asked(self, what: str, ask: Callable[[], T]) -> T:
        """Ask; where the library lost its driver meanwhile, once more from the start."""
        for last in (False, True):
            self._prepare()
            try:
                return ask()
            except _AGAIN as error:
                self._ready = False
                if last:
                    raise Unavailable(f"NVML: {what}: {error}") from error
            except pynvml.NVMLError as error:
                raise NvmlFailed(f"NVML: {what}: {error}") from error
        raise AssertionError("unreachable")

    def _version(self) -> str:
        return self._asked("driver version", lambda: _text(pynvml.nvmlSystemGetDriverVersion()))

    def _read(self) -> tuple[GpuReading, ...]:
        def ask() -> tuple[GpuReading, ...]:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            return tuple(sorted((_reading(handle) for handle in handles), key=lambda r: r.uuid))

        return self._asked("read GPUs", ask)

    def _register(self) -> tuple[Any, dict[int, str]]:
        def ask() -> tuple[Any, dict[int, str]]:
            events = pynvml.nvmlEventSetCreate()
            names: dict[int, str] = {}
            try:
                for i in range(pynvml.nvmlDeviceGetCount()):
                    handle = pynvml.nvmlDeviceGetHandleByIndex(i)
                    try:
                        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
                    except _UNTOLD:
                        continue  # this board tells no XIDs
                    names[_key(handle)] = _text(pynvml.nvmlDeviceGetUUID(handle))
            except BaseException:
                pynvml.nvmlEventSetFree(events)
                raise
            self._sets.append(events)
            return events, names

        return self._asked("register for XIDs", ask)

    def _wait(self, events: Any, names: dict[int, str]) -> GpuFault | None:
        try:
            data = pynvml.nvmlEventSetWait_v2(events, XID_WAIT_MS)
        except pynvml.NVMLError_Timeout:
            return None
        except pynvml.NVMLError as error:
            raise NvmlFailed(f"NVML: wait for XIDs: {error}") from error
        if data.eventType != pynvml.nvmlEventTypeXidCriticalError:
            return None
        uuid = names.get(_key(data.device))
        return None if uuid is None else GpuFault(uuid, int(data.eventData))


def _told(ask: Callable[..., T], *arguments: Any) -> T | None:
    """What a board tells; None where it does not."""
    try:
        return ask(*arguments)
    except _UNTOLD:
        return None


def _reading(handle: Any) -> GpuReading:
    uuid, pci = _text(pynvml.nvmlDeviceGetUUID(handle)), pynvml.nvmlDeviceGetPciInfo(handle)
    address = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"
    model = _text(pynvml.nvmlDeviceGetName(handle))
    try:
        return _whole(handle, uuid, address, model)
    except pynvml.NVMLError_GpuIsLost:
        return GpuReading(uuid, address, model, lost=True)


def _whole(handle: Any, uuid: str, address: str, model: str) -> GpuReading:
    memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    busy = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    rows = _told(pynvml.nvmlDeviceGetRemappedRows, handle)
    serial = _told(pynvml.nvmlDeviceGetSerial, handle)
    mig = _told(pynvml.nvmlDeviceGetMigMode, handle)
    slots, profiles, alike = shares(
        _told, handle, memory.total // MIB if memory else 0, None if mig is None else bool(mig[0])
    )
    return GpuReading(
        uuid=uuid,
        address=address,
        model=model,
        serial=None if serial is None else _text(serial),
        memory_mib=None if memory is None else memory.total // MIB,
        memory_used_mib=None if memory is None else memory.used // MIB,
        temperature_c=_temperature(handle),
        power_mw=_told(pynvml.nvmlDeviceGetPowerUsage, handle),
        gpu_busy_percent=None if busy is None else busy.gpu,
        memory_busy_percent=None if busy is None else busy.memory,
        ecc_corrected=_ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ecc_uncorrected=_ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        rows_remapped_corrected=None if rows is None else rows[0],
        rows_remapped_uncorrected=None if rows is None else rows[1],
        rows_pending=None if rows is None else bool(rows[2]),
        rows_failed=None if rows is None else bool(rows[3]),
        link_generation=_told(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        link_generation_max=_told(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        link_width=_told(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        link_width_max=_told(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        pcie_replays=_told(pynvml.nvmlDeviceGetPcieReplayCounter, handle),
        # the number of its own: the binding's default is one object for all threads
        module_id=_told(pynvml.nvmlDeviceGetModuleId, handle, ctypes.c_uint()),
        mig=None if mig is None else bool(mig[0]),
        share_slots=slots,
        share_profiles=profiles,
        share_alike=alike,
        processes=_processes(handle),
    )


def _temperature(handle: Any) -> int | None:
    """The newer call first: the older one leaves with the next generation of the library."""
    value: int | None = _told(pynvml.nvmlDeviceGetTemperatureV, handle, pynvml.NVML_TEMPERATURE_GPU)
    return value if value is not None else _told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)


def _ecc(handle: Any, kind: int) -> int | None:
    return _told(pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, pynvml.NVML_VOLATILE_ECC)


def _processes(handle: Any) -> tuple[int, ...] | None:
    found: set[int] = set()
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        running = _told(ask, handle)
        if running is None:
            return None
        found.update(int(process.pid) for process in running)
    return tuple(sorted(found))[:MAX_PROCESSES]


def _key(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
