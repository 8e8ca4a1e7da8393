"""Migration between simulated hosts of one process.

What may live here: the simulated half of :mod:`casemate_agent.drivers.passageports`.

Theory of operation. A transfer has the steps of a real one, with time between them in which either agent may die: the memory
is sent while the guest runs; then the source is halted and the domain is at the target, half there; then it is whole there,
frozen; then the source is off. What a dead agent has begun stays as it is: a halted domain here, a frozen one there.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from casemate_agent.domain.names import domain_name
from casemate_agent.drivers.passageports import Passage, PassageFailed
from casemate_agent.drivers.ports import DomainFiles, DomainPhase
from casemate_agent.drivers.simulated_domain import ACTIVE, SimulatedDomain, defined_facts
from casemate_core.errors import NotFound
from casemate_core.spec.instance import DesiredInstance

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated import SimulatedHost
    from casemate_agent.drivers.simulated_ports import Lease

PREFIX = "simulated:"


class SimulatedPassages:
    """``passageports.Passages`` of a simulated host."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease
        self._host = lease.host
        self.where = PREFIX + self._host.name
        self.cpu = "simulated"

    def opened(self) -> Mapping[str, Passage]:
        return {
            uid: Passage(desired.order.uid, self.where)
            for uid, desired in self._lease.waiting.items()
            if desired.order is not None
        }

    async def open(self, desired: DesiredInstance, xml: str, deadline_s: float) -> None:
        def effect() -> None:
            self._lease.waiting[desired.uid] = desired

        await self._lease.call("passages", "open", effect, deadline_s)

    async def close(self, uid: str) -> None:
        self._lease.waiting.pop(uid, None)

    async def send(self, desired: DesiredInstance, deadline_s: float) -> None:
        lease, host, uid = self._lease, self._host, desired.uid
        pace = host.pace
        try:
            await lease.call("passages", "dial", lambda: self._target(desired), deadline_s)
            await lease.call("passages", "send", lambda: self._halt(desired), deadline_s, pace.move_s)
            await lease.call("passages", "finish", lambda: self._finish(desired), deadline_s)
            await lease.call("passages", "confirm", lambda: self._leave(desired), deadline_s)
        except (asyncio.CancelledError, Exception):
            if lease.alive:
                self._break_off(uid, desired)
            raise

    def _target(self, desired: DesiredInstance) -> "SimulatedHost":
        """The host that waits for it."""
        order = desired.order
        address = order.move.address if order is not None and order.move is not None else ""
        target = self._host.neighbours.get(address.removeprefix(PREFIX)) if address.startswith(PREFIX) else None
        lease = target.lease if target is not None else None
        if target is None or lease is None or order is None:
            raise PassageFailed(f"{address or 'nobody'} does not answer")
        expected = lease.waiting.get(desired.uid)
        if expected is None or expected.order is None or expected.order.uid != order.uid:
            raise PassageFailed(f"{target.name} does not wait for {desired.uid}")
        return target

    def _domain(self, uid: str) -> SimulatedDomain:
        domain = self._host.domains.get(uid)
        if domain is None or domain.facts.phase not in ACTIVE:
            raise NotFound("running domain", uid)
        return domain

    def _halt(self, desired: DesiredInstance) -> None:
        domain, target = self._domain(desired.uid), self._target(desired)
        if desired.uid in target.domains:
            raise PassageFailed(f"{target.name} has a domain of it already")
        assert target.lease is not None
        there = target.lease.waiting[desired.uid]
        files = DomainFiles(f"/simulated/{there.uid}.qcow2", "qcow2", "", "", f"/simulated/{there.uid}.seed")
        name = domain_name(there.environment, there.name, there.ordinal, there.uid)
        facts = replace(defined_facts(there, files, name), phase=DomainPhase.PAUSED, pid=target.new_pid())
        domain.facts = replace(domain.facts, phase=DomainPhase.PAUSED, halted=True)
        target.domains[there.uid] = SimulatedDomain(facts, there, files)
        target.tell(there.uid, "started, for a migration")

    def _finish(self, desired: DesiredInstance) -> None:
        self._domain(desired.uid)
        there = self._target(desired).domains.get(desired.uid)
        if there is None or there.facts.phase is not DomainPhase.PAUSED:
            raise PassageFailed("it is not at the target any more")
        there.facts = replace(there.facts, frozen=True)

    def _leave(self, desired: DesiredInstance) -> None:
        domain, target = self._domain(desired.uid), self._target(desired)
        there = target.domains.get(desired.uid)
        if there is None or there.facts.phase is not DomainPhase.PAUSED:
            raise PassageFailed("it is not at the target any more")
        there.guest, domain.guest = domain.guest, None
        if there.guest is not None:
            there.guest.moved(target.push)
        domain.facts = replace(domain.facts, phase=DomainPhase.SHUT_OFF, pid=0, halted=False, left=True)
        self._host.tell(desired.uid, "migrated away")

    def _break_off(self, uid: str, desired: DesiredInstance) -> None:
        """What a hypervisor does with a migration that breaks off: the source goes on, what is half there is gone."""
        domain = self._host.domains.get(uid)
        if domain is None or not domain.facts.halted:
            return
        domain.facts = replace(domain.facts, phase=DomainPhase.RUNNING, halted=False)
        try:
            target = self._target(desired)
        except PassageFailed:
            return
        there = target.domains.get(uid)
        if there is not None and there.facts.phase is DomainPhase.PAUSED and not there.facts.frozen:
            del target.domains[uid]
