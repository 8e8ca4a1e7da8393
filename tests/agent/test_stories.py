"""Random stories of one host: wishes, faults, kills, reboots, lost ledgers, in any order. Never and in the end.

Never: two processes of one instance, a foreign VM touched, a running VM started without its disk, seed, bridge or guard, a
running VM that is wanted ended by anything but itself. In the end: what is wanted runs, nothing else does, nothing leaks.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from casemate_core.spec.instance import Run
from support.agents import Rig, instance, pod, uid
from support.virtual import VirtualLoop

NUMBERS = st.integers(1, 4)


class HostStories(RuleBasedStateMachine):
    """One simulated host, its agent, and a manager that is a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.rig = Rig(self.loop)
        self.foreign = self.rig.host.add_foreign("neighbour")
        self.foreign_pid = self.rig.host.domains[self.foreign].facts.pid
        #: Running and wanted, with their pids; whoever is in here must not be ended by the agent.
        self.kept: dict[str, int] = {}

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    async def _bury(self) -> None:
        """An agent that was killed at a step is started again."""
        if self.rig.dead:
            self.rig.kill_at = 0
            await self.rig.kill()
            await self.rig.start()

    def _send(self, work: Coroutine[Any, Any, Any]) -> None:
        async def send() -> None:
            await self._bury()
            await work

        self.run(send())
        self._forget_unwanted()

    def _forget_unwanted(self) -> None:
        for name in list(self.kept):
            desired = self.rig.wanted.get(name)
            if desired is None or desired.run is Run.STOPPED:
                del self.kept[name]

    @initialize()
    def begin(self) -> None:
        self.run(self.rig.start())

    @rule(number=NUMBERS, run=st.sampled_from(Run))
    def want(self, number: int, run: Run) -> None:
        old = self.rig.wanted.get(uid(number), instance(number))
        self._send(self.rig.want(replace(old, run=run)))

    @rule(number=NUMBERS)
    def unwant(self, number: int) -> None:
        self._send(self.rig.unwant(uid(number)))

    @precondition(lambda self: self.rig.wanted)
    @rule(data=st.data(), name=st.sampled_from(["one", "two"]))
    def change_pods(self, data: st.DataObject, name: str) -> None:
        old = self.rig.wanted[data.draw(st.sampled_from(sorted(self.rig.wanted)))]
        self._send(self.rig.want(replace(old, generation=old.generation + 1, pods=(pod(name),))))

    @precondition(lambda self: self.rig.wanted)
    @rule(data=st.data())
    def change_what_needs_a_restart(self, data: st.DataObject) -> None:
        old = self.rig.wanted[data.draw(st.sampled_from(sorted(self.rig.wanted)))]
        self._send(
            self.rig.want(replace(old, generation=old.generation + 1, ssh_keys=(*old.ssh_keys, "ssh-ed25519 A")))
        )

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.3, 1.0, 4.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(steps=st.integers(1, 12))
    def kill_at_a_step(self, steps: int) -> None:
        self.rig.kill_at = self.rig.steps + steps

    @rule()
    def kill(self) -> None:
        self.run(self.rig.kill())
        self.rig.kill_at = 0
        self.run(self.rig.start())

    @rule()
    def power_cut(self) -> None:
        self.run(self.rig.kill())
        self.kept.clear()
        self.rig.host.reboot()
        self.rig.disk.power_cut()
        self.rig.kill_at = 0
        self.run(self.rig.start())
        self.foreign_pid = self.rig.host.domains[self.foreign].facts.pid

    @rule()
    def lose_the_ledger(self) -> None:
        self.run(self.rig.kill())
        self.rig.disk.erase()
        self.rig.kill_at = 0
        self.run(self.rig.start())

    @rule(there=st.booleans())
    def manager(self, there: bool) -> None:
        back = there and not self.rig.connected
        self.rig.connected = there
        if back:
            self._send(self.rig.sync())

    @rule(number=NUMBERS, vanish=st.booleans())
    def domain_ends(self, number: int, vanish: bool) -> None:
        self.kept.pop(uid(number), None)
        if vanish:
            self.run(self._call(self.rig.host.vanish_domain, number))
        else:
            self.run(self._call(self.rig.host.crash_domain, number))

    @rule(number=NUMBERS)
    def guest_reboots(self, number: int) -> None:
        if uid(number) in self.rig.host.domains:
            self.run(self._call(self.rig.host.reboot_guest, number))

    async def _call(self, what: Any, number: int) -> None:
        what(uid(number))

    @rule(
        method=st.sampled_from(
            ["define", "start", "create_overlay", "write_seed", "guard", "unguard", "fetch", "undefine", "apply"]
        ),
        times=st.integers(1, 4),
    )
    def calls_fail(self, method: str, times: int) -> None:
        self.rig.host.faults.failing[method] = times

    @rule(port=st.sampled_from(["hypervisor", "images", "networks", "guests"]), seconds=st.sampled_from([1.0, 50.0]))
    def driver_hangs(self, port: str, seconds: float) -> None:
        self.rig.host.faults.hung.add(port)
        self.run(asyncio.sleep(seconds))
        self.rig.host.faults.hung.clear()

    @rule(full=st.booleans())
    def host_disk(self, full: bool) -> None:
        self.rig.host.faults.disk_full = full

    @invariant()
    def never(self) -> None:
        rig = self.rig
        assert rig.broken == []
        assert rig.host.check() == []
        foreign = rig.host.domains[self.foreign].facts
        assert foreign.pid == self.foreign_pid
        active = rig.active()
        for name, pid in self.kept.items():
            assert active.get(name) == pid, f"{name} was wanted, ran, and was touched"
        self.kept = {
            name: pid
            for name, pid in active.items()
            if (desired := rig.wanted.get(name)) is not None
            and desired.run is Run.STARTED
            and rig.agent is not None
            and self._believes(name)
        }

    def _believes(self, name: str) -> bool:
        """The agent has heard that the instance is wanted (what it has not heard, it cannot keep)."""
        record = self.rig.agent.ledger.get(name) if self.rig.agent is not None else None
        return (
            record is not None
            and not record.removed
            and record.desired.run is Run.STARTED
            and not record.stop_since_s
            and not record.adopted
            and self.rig.host.domains[name].facts.phase.value == "running"
        )

    def teardown(self) -> None:
        rig = self.rig
        try:
            rig.host.faults.hung.clear()
            rig.host.faults.failing.clear()
            rig.host.faults.disk_full = False
            rig.kill_at = 0
            rig.connected = True

            async def end() -> None:
                if rig.agent is None:
                    return
                await self._bury()
                await rig.sync()
                await rig.settle(600)
                assert rig.host.check() == []
                await rig.kill()

            self.run(end())
        finally:
            self.loop.close()


HostStories.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestHostStories = HostStories.TestCase
