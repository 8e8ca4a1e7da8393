"""GPUs of a simulated machine: those of its topology, well until its faults say otherwise.

What may live here: the boards as the machine keeps them (`Board`), and ``gpuports.Gpus`` and ``gpuports.GpuCards`` on them. As
strict as real ones: a board that a domain has open is not bound, reset or scrubbed; what a tenant left on it stays until it is
reset (its registers) and scrubbed (its memory).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from casemate_agent.drivers.gpuports import GpuParts
from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import Card, CardFacts, GpuFault, GpuReading, Proof
from casemate_core.errors import MachineError, Unavailable
from casemate_core.gpu import Rung
from casemate_core.topology import Gpu

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


T = TypeVar("T")

DRIVER = "nvidia"
VFIO = "vfio-pci"
SCRUB_S = 0.2


class _Held(MachineError):
    reason = "GpuHeld"


@dataclass(slots=True)
class Board:
    """One board. ``registers`` and ``memory``: uids of the instances whose traces are there."""

    driver: str = DRIVER
    registers: set[str] = field(default_factory=set)
    memory: set[str] = field(default_factory=set)
    #: What a reset was asked to make it forget.
    mark: str = ""
    methods: tuple[str, ...] = ("flr", "bus")
    strangers: tuple[str, ...] = ()
    #: Processes that hold it beside domains, as ``name (pid)``.
    holders: tuple[str, ...] = ()
    #: Its reset returns and does nothing; its scrubber fails.
    deaf: bool = False
    unscrubbable: bool = False
    #: Uncorrected ECC errors that it tells.
    ecc_uncorrected: int = 0
    #: As it is while a guest has it.
    heat_c: int = 61
    #: Fatal PCIe errors that its port has counted.
    pcie_fatal: int = 0


class SimulatedCards:
    """``gpuports.GpuCards`` of a host in memory."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease
        self._host = lease.host

    async def _step(self, method: str, effect: Callable[[], T], deadline_s: float, takes_s: float | None = None) -> T:
        return await self._lease.call("cards", method, effect, deadline_s, takes_s)

    def _gpu(self, uuid: str) -> Gpu:
        found = next((gpu for gpu in self._host.topology.gpus if gpu.uuid == uuid), None)
        if found is None:
            raise Unavailable(f"GPU {uuid} is not there")
        return found

    def _free(self, uuid: str) -> Board:
        """A board that nobody has open."""
        self._gpu(uuid)
        if holders := self._holders(uuid):
            raise _Held(f"GPU {uuid} is held open by {', '.join(holders)}")
        return self._host.board(uuid)

    def _holders(self, uuid: str) -> tuple[str, ...]:
        domains = (d for d in self._host.domains.values() if uuid in d.gpus and d.facts.phase in ACTIVE)
        vgpus = (f"vGPU {facts.id}" for facts in self._host.vgpus.values() if facts.gpu == uuid)
        return (*self._host.board(uuid).holders, *(f"qemu ({d.facts.pid})" for d in domains), *vgpus)

    async def look(self, deadline_s: float) -> Mapping[str, CardFacts]:
        def facts() -> dict[str, CardFacts]:
            gpus, board = self._host.topology.gpus, self._host.board
            return {g.uuid: CardFacts(g.uuid, g.place.address, board(g.uuid).driver, told=True) for g in gpus}

        return await self._step("look_at_cards", facts, deadline_s)

    async def card(self, uuid: str, deadline_s: float) -> Card:
        def card() -> Card:
            self._gpu(uuid)
            board = self._host.board(uuid)
            return Card(self._holders(uuid), board.methods, board.strangers)

        return await self._step("card", card, deadline_s)

    async def link(self, uuid: str, deadline_s: float) -> LinkReading:
        return await self._step("link", lambda: link_of_board(self._gpu(uuid), self._host.board(uuid)), deadline_s)

    async def bind(self, uuid: str, deadline_s: float) -> str:
        def bind() -> str:
            gpu, board = self._gpu(uuid), self._host.board(uuid)
            if board.driver != VFIO:
                self._free(uuid)
                board.driver = VFIO
            return gpu.place.address

        return await self._step("bind_gpu", bind, deadline_s)

    async def reset(self, uuid: str, rung: Rung, deadline_s: float) -> str:
        def mark() -> None:
            self._free(uuid).mark = rung

        def reset() -> str:
            board = self._free(uuid)
            if not board.deaf:
                board.registers.clear()
                board.mark = ""
            return f"{rung} of a simulated board"

        await self._step("mark_gpu", mark, deadline_s)
        return await self._step("reset_gpu", reset, deadline_s)

    async def prove(self, uuid: str, deadline_s: float) -> Proof:
        def prove() -> Proof:
            gpu, board = self._gpu(uuid), self._host.board(uuid)
            return Proof(True, gpu.uuid, uuid, board.mark or "a mark", bool(board.mark))

        return await self._step("prove_gpu", prove, deadline_s)

    async def scrub(self, uuid: str, deadline_s: float) -> str:
        def scrub() -> str:
            board = self._free(uuid)
            if board.unscrubbable:
                raise MachineError("the scrubber ended with 1: it was asked to")
            board.memory.clear()
            return "overwritten, as far as there is anything"

        return await self._step("scrub_gpu", scrub, deadline_s, SCRUB_S)

    async def unbind(self, uuid: str, deadline_s: float) -> None:
        def unbind() -> None:
            self._free(uuid).driver = DRIVER

        await self._step("unbind_gpu", unbind, deadline_s)


def guest_line(uuid: str, board: Board) -> str:
    """What a guest's nvidia-smi says of a board, for the question of ``gpu.guestside``."""
    return f"{uuid}, {board.heat_c}, 310.25, 87, 40, [N/A], 512, 0, {board.ecc_uncorrected}, 0, 0, No, No\n"


def link_of_board(gpu: Gpu, board: Board) -> LinkReading:
    """The link of a board, as its host sees it."""
    return LinkReading(gpu.place.address, board.driver, 32.0, 32.0, 16, 16, 0, 0, board.pcie_fatal)


class SimulatedGpus:
    """``gpuports.Gpus`` of a host in memory; ``SimulatedHost.xids`` holds what its boards have told."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease

    async def read(self, deadline_s: float) -> tuple[GpuParts, ...]:
        host = self._lease.host
        return await self._lease.call("gpus", "read", lambda: tuple(map(self._one, host.topology.gpus)), deadline_s)

    def _one(self, gpu: Gpu) -> GpuParts:
        host = self._lease.host
        board, reading = host.board(gpu.uuid), None
        if board.driver == DRIVER:
            reading = GpuReading(
                gpu.uuid,
                gpu.place.address,
                gpu.model,
                memory_mib=gpu.memory_mib,
                memory_used_mib=0,
                temperature_c=30,
                ecc_uncorrected=board.ecc_uncorrected,
                processes=(),
            )
        return GpuParts(gpu.uuid, reading, link_of_board(gpu, board))

    async def faults(self) -> AsyncIterator[GpuFault]:
        told = len(self._lease.host.xids)
        while True:
            for fault in self._lease.host.xids[told:]:
                told += 1
                yield fault
            await asyncio.sleep(0.5)
