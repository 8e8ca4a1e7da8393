"""Virtual functions and devices of a simulated machine.

What may live here: their state as the machine keeps it (`Cards`), and the door of one agent's process to it. What exists
follows from the machine's topology, so that taking a port out of it takes its VFs away. As strict as the real ones: what
somebody else has, or a running domain holds open, is refused; a reboot empties all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_agent.hardware.functions import (
    CLEAN,
    DeviceState,
    FunctionFacts,
    Grant,
    Stamp,
    VfFacts,
    VfState,
    vf_key,
)
from casemate_core.errors import MachineError, NotFound
from casemate_core.topology import Topology

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease

_DRIVER = "vfio-pci"


class _Held(MachineError):
    reason = "HeldByOther"


class _Mismatch(MachineError):
    reason = "VfMismatch"


@dataclass(slots=True)
class Cards:
    """What ports keep of their VFs, what is bound, and the stamps."""

    states: dict[str, VfState] = field(default_factory=dict)
    bound: set[str] = field(default_factory=set)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    #: Keys whose port silently keeps another VLAN than it is told.
    deaf: set[str] = field(default_factory=set)

    def reboot(self) -> None:
        """Everything of it is volatile."""
        self.states.clear()
        self.bound.clear()
        self.stamps.clear()

    def facts(self, topology: Topology) -> FunctionFacts:
        """As a look at the machine shows it."""
        stamps = dict(self.stamps)

        def driver(key: str) -> str:
            return _DRIVER if key in self.bound else ""

        vfs = {}
        for pf in topology.pfs:
            for vf in pf.vfs:
                key = vf_key(pf.mac, vf.index)
                state = self.states.get(key, CLEAN)
                vfs[key] = VfFacts(pf.mac, vf.index, vf.address, driver(key), state, stamps.pop(key, None))
        devices = {
            d.id: DeviceState(d.id, d.place.address, driver(d.id), stamps.pop(d.id, None)) for d in topology.devices
        }
        return FunctionFacts(vfs, devices, stamps)


class SimulatedFunctions:
    """``ports.Functions`` on the cards of a simulated host."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease
        self._host = lease.host

    @property
    def _facts(self) -> FunctionFacts:
        return self._host.cards.facts(self._host.topology)

    async def _step(self, method: str, effect: Callable[[], object], deadline_s: float) -> None:
        await self._lease.call("functions", method, effect, deadline_s)

    async def observe(self, deadline_s: float) -> FunctionFacts:
        return await self._lease.call("functions", "observe_functions", lambda: self._facts, deadline_s)

    async def make_pools(self, deadline_s: float) -> None:
        await self._step("make_pools", lambda: None, deadline_s)

    async def give(self, grant: Grant, deadline_s: float) -> tuple[str, ...]:
        facts, cards = self._facts, self._host.cards
        for key in grant.keys:
            found = facts.vfs.get(key) or facts.devices.get(key)
            if found is None:
                raise NotFound("function", key)
            if found.stamp is not None and not grant.stamp.covers(found.stamp):
                raise _Held(f"{key} is {found.stamp.owner}'s")
        wanted = {vf.key: vf.state for vf in grant.vfs}
        # One step each, as on a machine: a process that is killed leaves some of them done.
        for key in grant.keys:
            await self._step("stamp", partial(cards.stamps.__setitem__, key, grant.stamp), deadline_s)
            if key in wanted:
                await self._step("set_state", partial(self._set, key, wanted[key]), deadline_s)
            await self._step("bind", partial(cards.bound.add, key), deadline_s)
        addresses = {key: vf.address for key, vf in facts.vfs.items()}
        addresses |= {key: device.address for key, device in facts.devices.items()}
        return tuple(addresses[key] for key in grant.keys)

    def _set(self, key: str, state: VfState) -> None:
        cards = self._host.cards
        if key in cards.deaf and state.vlan:
            raise _Mismatch(f"VF {key}: vlan is 0, should be {state.vlan}")
        cards.states[key] = state

    async def take_back(self, stamp: Stamp, keys: tuple[str, ...], deadline_s: float) -> None:
        cards = self._host.cards
        for key in keys:
            held = cards.stamps.get(key)
            if held is None or not stamp.covers(held):
                continue
            await self._release(key, deadline_s)
            await self._step("unstamp", partial(cards.stamps.pop, key, None), deadline_s)

    async def clean(self, key: str, deadline_s: float) -> None:
        if key not in self._facts.vfs:
            raise NotFound("virtual function", key)
        if (stamp := self._host.cards.stamps.get(key)) is not None:
            raise _Held(f"{key} is {stamp.owner}'s")
        await self._release(key, deadline_s)

    async def _release(self, key: str, deadline_s: float) -> None:
        for domain in self._host.domains.values():
            if domain.facts.phase in ACTIVE and key in domain.functions:
                raise _Held(f"{key} is held open by {domain.facts.name} ({domain.facts.pid})")
        cards = self._host.cards
        await self._step("unbind", partial(cards.bound.discard, key), deadline_s)
        await self._step("clean_state", partial(cards.states.pop, key, None), deadline_s)
