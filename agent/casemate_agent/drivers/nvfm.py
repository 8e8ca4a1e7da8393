"""NVIDIA's Fabric Manager, through its own library (libnvfm).

For: ``fabricports.Fabric``. What may live here: the calls of the library, its structures, and the translation of what it answers.

Theory of operation. The library speaks with the Fabric Manager of this host over a socket (NVIDIA, "Fabric Manager User Guide",
Fabric Manager SDK: ``nv_fm_agent.h`` and ``nv_fm_types.h``). Each structure begins with a version, which is its size and a number
in the top byte; a library that expects another one refuses the call, which is said. A connection is made at the first question,
and anew after the manager said that the old one is none: it may be restarted under a running agent. All calls run in one thread
with a deadline, for the library waits for its manager; while one hangs, further ones are refused, and the agent goes on.

The socket is one of the file system (``FM_CMD_UNIX_SOCKET_PATH`` in the manager's configuration): the agent is root, and root
has no network, its own loopback included.

The library does not tell versions. The manager's own is what ``nv-fabricmanager --version`` prints, the driver's is in sysfs. A
manager that is not in its shared mode (``FABRIC_MODE=1``), or still trains the links, has no partitions to switch and says so.
"""

import asyncio
import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.fabricports import FabricBusy, FabricFailed, FabricVersionMismatch
from casemate_agent.hardware.fabric import FabricFacts, PartitionState
from casemate_core.errors import MachineError, NotFound, Unavailable

LIBRARY = "libnvfm.so.1"
MANAGER = "nv-fabricmanager"
MODULE_VERSION = "sys/module/nvidia/version"
CONNECT_MS = 2000
VERSION_S = 5.0

MAX_GPUS, MAX_PARTITIONS = 16, 64
SUCCESS, BADPARAM, UNINITIALIZED, TIMEOUT, VERSION_MISMATCH, IN_USE, NOT_CONFIGURED, NOT_VALID, NVLINK = (
    0, -1, -4, -5, -6, -7, -8, -9, -10,
)  # fmt: skip
_WORDS = {
    BADPARAM: "an argument is invalid",
    -2: "a general error",
    -3: "not supported",
    UNINITIALIZED: "the library is not initialised",
    TIMEOUT: "the manager did not answer in time",
    VERSION_MISMATCH: "library and manager, or this agent, speak different versions",
    IN_USE: "in use",
    NOT_CONFIGURED: "the manager is not in shared mode (FABRIC_MODE=1), or not ready yet",
    NOT_VALID: "the connection is not valid any more",
    NVLINK: "an NVLink failed",
}
_VERSION = re.compile(r"\b(\d{3,4}(?:\.\d{1,4}){1,2})\b")


class _Connect(ctypes.Structure):
    """fmConnectParams_v1."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("address", ctypes.c_char * 256),
        ("timeout_ms", ctypes.c_uint),
        ("is_unix", ctypes.c_uint),
    )


class _Gpu(ctypes.Structure):
    """fmFabricPartitionGpuInfo_t; ``physical_id`` is the module id."""

    _fields_ = (
        ("physical_id", ctypes.c_uint),
        ("uuid", ctypes.c_char * 80),
        ("bus_id", ctypes.c_char * 32),
        ("links", ctypes.c_uint),
        ("links_max", ctypes.c_uint),
        ("line_rate_mbps", ctypes.c_uint),
    )


class _Partition(ctypes.Structure):
    """fmFabricPartitionInfo_t."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("is_active", ctypes.c_uint),
        ("gpu_count", ctypes.c_uint),
        ("gpus", _Gpu * MAX_GPUS),
    )


class _List(ctypes.Structure):
    """fmFabricPartitionList_v2."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("count", ctypes.c_uint),
        ("count_max", ctypes.c_uint),
        ("partitions", _Partition * MAX_PARTITIONS),
    )


def _versioned(kind: type[ctypes.Structure], number: int) -> Any:
    """An empty structure with its version: MAKE_FM_PARAM_VERSION."""
    made: Any = kind()
    made.version = ctypes.sizeof(kind) | number << 24
    return made


class NvFabric:
    """The Fabric Manager behind a socket of the file system. Use it from one event loop, and close it."""

    def __init__(self, socket: str, root: Path = Path("/"), manager: str = MANAGER) -> None:
        self._socket = socket
        self._root = root
        self._manager = manager
        self._calls = DeadlineExecutor("nvfm", threads=1, max_stuck=1)
        self._library: ctypes.CDLL | None = None
        self._handle: ctypes.c_void_p | None = None
        self._version = ""

    async def aclose(self) -> None:
        """Let the thread go; the manager forgets a connection by itself when this process ends."""
        self._calls.close()

    async def observe(self, deadline_s: float) -> FabricFacts:
        """``Fabric.observe``."""
        async with asyncio.timeout(deadline_s + VERSION_S):
            version = self._version or await self._ask_version()
            partitions, driver = await self._calls.run("list fabric partitions", self._look, deadline_s)
        self._version = version
        return FabricFacts(version, driver, partitions)

    async def activate(self, partition: int, deadline_s: float) -> None:
        """``Fabric.activate``."""
        await self._calls.run("activate a fabric partition", lambda: self._switch(partition, active=True), deadline_s)

    async def deactivate(self, partition: int, deadline_s: float) -> None:
        """``Fabric.deactivate``."""
        await self._calls.run("end a fabric partition", lambda: self._switch(partition, active=False), deadline_s)

    async def _ask_version(self) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                self._manager,
                "--version",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            raise Unavailable(f"{self._manager} --version: {error.strerror}; install the Fabric Manager") from error
        try:
            assert process.stdout is not None
            async with asyncio.timeout(VERSION_S):
                said = (await process.stdout.read(4096)).decode(errors="replace")
                await process.wait()
        except TimeoutError:
            raise Unavailable(f"{self._manager} --version has not ended within {VERSION_S:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        found = _VERSION.search(said)
        if found is None:
            raise Unavailable(f"{self._manager} --version says no version: {said[:80]!r}")
        return found[1]

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _look(self) -> tuple[tuple[PartitionState, ...], str]:
        listed = self._asked("fmGetSupportedFabricPartitions", lambda: _versioned(_List, 1))
        if listed.count > MAX_PARTITIONS:
            raise FabricFailed(f"fabric manager: {listed.count} partitions, at most {MAX_PARTITIONS} are known")
        found = []
        for i in range(listed.count):
            told = listed.partitions[i]
            if told.gpu_count > MAX_GPUS:
                raise FabricFailed(f"fabric manager: partition {told.id} has {told.gpu_count} GPUs, at most {MAX_GPUS}")
            modules = tuple(sorted(told.gpus[k].physical_id for k in range(told.gpu_count)))
            found.append(PartitionState(told.id, modules, bool(told.is_active)))
        try:
            driver = (self._root / MODULE_VERSION).read_text().strip()
        except OSError:
            raise Unavailable("the NVIDIA driver is not loaded: no version of it in sysfs") from None
        return tuple(sorted(found, key=lambda p: p.id)), driver

    def _switch(self, partition: int, *, active: bool) -> None:
        states, driver = self._look()
        if self._version and self._version != driver:
            raise FabricVersionMismatch(f"fabric manager {self._version}, driver {driver}")
        state = next((p for p in states if p.id == partition), None)
        if state is None:
            raise NotFound("fabric partition", str(partition))
        if state.active is active:
            return
        name = "fmActivateFabricPartition" if active else "fmDeactivateFabricPartition"
        others = [p.id for p in states if p.active and p.id != partition and set(p.modules) & set(state.modules)]
        if active and others:
            raise FabricBusy(f"partition {partition}: {others[0]} is active and has GPUs of it")
        self._asked(name, lambda: ctypes.c_uint(partition), by_value=True)
        after = next((p for p in self._look()[0] if p.id == partition), None)
        if after is None or after.active is not active:
            raise FabricFailed(f"{name} was done, and partition {partition} is read back as {after}")

    def _asked(self, name: str, argument: Callable[[], Any], *, by_value: bool = False) -> Any:
        """Call with a connection; where the manager has forgotten that, once more with a new one."""
        for last in (False, True):
            handle = self._connected()
            given = argument()
            code = self._function(name)(handle, given if by_value else ctypes.byref(given))
            if code == SUCCESS:
                return given
            if code in (NOT_VALID, UNINITIALIZED):
                self._handle = None
                if not last:
                    continue
            raise _failed(name, code)
        raise AssertionError("unreachable")

    def _connected(self) -> ctypes.c_void_p:
        if self._handle is not None:
            return self._handle
        code = self._function("fmLibInit")()
        if code not in (SUCCESS, IN_USE):  # in use: it is initialised already
            raise _failed("fmLibInit", code)
        params = _versioned(_Connect, 1)
        params.address = self._socket.encode()[:255]
        params.is_unix = 1
        params.timeout_ms = CONNECT_MS
        handle = ctypes.c_void_p()
        code = self._function("fmConnect")(ctypes.byref(params), ctypes.byref(handle))
        if code != SUCCESS:
            raise _failed(f"fmConnect to {self._socket}", code)
        self._handle = handle
        return handle

    def _function(self, name: str) -> Any:
        if self._library is None:
            try:
                self._library = ctypes.CDLL(LIBRARY)
            except OSError:
                raise Unavailable(f"no {LIBRARY}: install the Fabric Manager's library (libnvfm)") from None
        try:
            return getattr(self._library, name)
        except AttributeError:
            raise Unavailable(f"{LIBRARY} has no {name}: it is of another version than this agent knows") from None


def _failed(what: str, code: int) -> MachineError:
    """What an answer means."""
    said = f"{what}: {_WORDS.get(code, 'an error that is not known')} ({code})"
    match code:
        case c if c == VERSION_MISMATCH:
            return FabricVersionMismatch(said)
        case c if c == IN_USE:
            return FabricBusy(said)
        case c if c in (TIMEOUT, NOT_VALID, UNINITIALIZED, NOT_CONFIGURED) or what.startswith("fmConnect"):
            return Unavailable(said)
    return FabricFailed(said)
