"""Virtual functions and devices: pools, state, binding, stamps.

For: ``ports.Functions``. What may live here: the order of the steps on one host. Netlink is ``vflink``, sysfs is ``vfio``, what
exists is ``inventory``; the contract is ``casemate_agent.hardware.functions``.

Theory of operation. Everything happens in one thread, one call at a time, so that no two calls meet at a function. A function
is given in this order: its stamp on disk, its state written and read back, then bound to vfio-pci. It comes back in the
other order: nobody has it open, unbound, state cleaned and read back, then the stamp goes. So after a crash at any step a
stamp is there as long as something may be left of its owner, and both ways can be gone again from the start. A stamp lies in
``run_dir``, which a reboot empties, as it empties what the stamp speaks of.

A port is cut once: ``sriov_numvfs`` is written where it is 0, after the port's own driver is there, and never again: writing it
while a VF is in use takes the VF out of a running VM. VFs are kept from drivers of the host (``sriov_drivers_autoprobe``).
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from pyroute2 import NetlinkError

from casemate_agent.drivers import eswitch, vflink
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.eswitch import Device
from casemate_agent.drivers.inventory import Port, take
from casemate_agent.drivers.portreader import PortReader, read_ports
from casemate_agent.drivers.vfio import DRIVER, PCI, HeldByOther, Vfio
from casemate_agent.drivers.vflink import VfMismatch
from casemate_agent.hardware.functions import (
    CLEAN,
    DeviceState,
    FunctionFacts,
    Grant,
    GrantedVf,
    Stamp,
    VfFacts,
    VfState,
    vf_key,
)
from casemate_agent.hardware.rules import DeviceRule, PortRule
from casemate_core.errors import MachineError, NotFound

T = TypeVar("T")
#: VFs appear some tenths of a second after their number was written.
POOL_TIMEOUT_S = 20.0


class PoolFailed(MachineError):
    """A port could not be cut."""

    reason = "PoolFailed"


class HostFunctions:
    """``ports.Functions`` on this machine."""

    def __init__(
        self,
        run_dir: Path,
        ports: tuple[PortRule, ...] = (),
        devices: tuple[DeviceRule, ...] = (),
        root: Path = Path("/"),
        port_reader: PortReader = read_ports,
    ) -> None:
        self._stamps = run_dir / "functions"
        self._port_rules = ports
        self._device_rules = devices
        self._root = root
        self._read_ports = port_reader
        self._vfio = Vfio(root)
        # One thread: the steps of two calls must not meet at a function.
        self._calls = DeadlineExecutor("functions", threads=1)

    async def aclose(self) -> None:
        """Let the thread go."""
        self._calls.close()

    async def observe(self, deadline_s: float) -> FunctionFacts:
        return await self._run("look at functions", self._observe, deadline_s)

    async def make_pools(self, deadline_s: float) -> None:
        await self._run("cut ports", self._make_pools, deadline_s)

    async def give(self, grant: Grant, deadline_s: float) -> tuple[str, ...]:
        return await self._run("give functions", lambda: self._alone(lambda: self._give(grant)), deadline_s)

    async def take_back(self, stamp: Stamp, keys: tuple[str, ...], deadline_s: float) -> None:
        await self._run("take functions back", lambda: self._alone(lambda: self._take_back(stamp, keys)), deadline_s)

    async def clean(self, key: str, deadline_s: float) -> None:
        await self._run("clean a function", lambda: self._alone(lambda: self._clean(key)), deadline_s)

    def _alone(self, call: Callable[[], T]) -> T:
        with self._locked():
            return call()

    async def _run(self, what: str, call: Callable[[], T], deadline_s: float) -> T:
        def translated() -> T:
            try:
                return call()
            except NetlinkError as error:
                raise MachineError(f"{what}: {error}") from error

        return await self._calls.run(what, translated, deadline_s)

    # --- in the thread: looking -------------------------------------------------------------------------------------------

    def _ports(self) -> dict[str, Port]:
        """The configured ports that are there and whose identity is certain, by MAC."""
        ports = self._read_ports() if self._port_rules else ()
        found = take(self._root, ports, self._port_rules, ())
        certain = {facts.mac for facts in found.ports}
        return {port.mac: port for port in ports if port.mac in certain}

    def _observe(self) -> FunctionFacts:
        if not self._port_rules and not self._device_rules:
            return FunctionFacts()
        stamps = self._read_stamps()
        ports = self._ports()
        told = self._states(*ports.values())
        vfs: dict[str, VfFacts] = {}
        problems, uncut = [], []
        for rule in self._port_rules:
            port = ports.get(rule.mac)
            if port is None:
                continue
            wanted = rule.vfs or port.total_vfs
            if port.vfs == 0:
                uncut.append(port.mac)
            if port.vfs != wanted:
                problems.append(
                    f"PoolSize: port {port.mac} has {port.vfs} VFs, {wanted} are configured; it is cut again at a reboot"
                )
            states = told[port.interface]
            for index, address in self._addresses(port).items():
                key = vf_key(port.mac, index)
                state = states.get(index, VfState(mac="?"))
                vfs[key] = VfFacts(port.mac, index, address, self._vfio.driver(address), state, stamps.pop(key, None))
        devices = {
            facts.id: DeviceState(facts.id, facts.address, self._vfio.driver(facts.address), stamps.pop(facts.id, None))
            for facts in take(self._root, (), (), self._device_rules).devices
        }
        return FunctionFacts(vfs, devices, stamps, tuple(problems), tuple(uncut))

    @staticmethod
    def _states(*ports: Port) -> dict[str, dict[int, VfState]]:
        """Interface -> VF index -> what its port keeps of it, wherever that is said in the port's mode."""
        legacy = [port.interface for port in ports if port.switched is None]
        found = vflink.read_states(legacy) if legacy else {}
        for port in ports:
            if port.switched is not None:
                found[port.interface] = eswitch.read_states(port.interface, Device("pci", port.address))
        return found

    def _addresses(self, port: Port) -> dict[int, str]:
        folder = self._root / PCI / "devices" / port.address
        links = ((path.name.removeprefix("virtfn"), os.readlink(path)) for path in folder.glob("virtfn*"))
        return {int(index): os.path.basename(target) for index, target in sorted(links)}

    # --- pools --------------------------------------------------------------------------------------------------------------

    def _make_pools(self) -> None:
        for mac, port in self._ports().items():
            rule = next(rule for rule in self._port_rules if rule.mac == mac)
            if port.vfs == 0:
                self._cut(port, rule.vfs or port.total_vfs)
            vflink.set_up(port.interface)

    def _cut(self, port: Port, count: int) -> None:
        folder = self._root / PCI / "devices" / port.address
        if count > port.total_vfs:
            raise PoolFailed(f"port {port.mac}: {count} VFs are configured, it can have {port.total_vfs}")
        if not port.driver:
            raise PoolFailed(f"port {port.mac} has no driver yet: its VFs would have nobody to keep their state")
        try:
            (folder / "sriov_drivers_autoprobe").write_text("0")
            (folder / "sriov_numvfs").write_text(str(count))
        except OSError as error:
            raise PoolFailed(f"port {port.mac} cannot be cut into {count} VFs: {error.strerror}") from error
        give_up_s = time.monotonic() + POOL_TIMEOUT_S
        while len(self._addresses(port)) < count:
            if time.monotonic() > give_up_s:
                raise PoolFailed(f"port {port.mac}: {len(self._addresses(port))} of {count} VFs appeared")
            time.sleep(0.05)

    # --- giving and taking --------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that change functions: `casemate-agent fsck` may run beside the agent."""
        self._stamps.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._stamps / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _give(self, grant: Grant) -> tuple[str, ...]:
        facts, ports = self._observe(), self._ports()
        for key in grant.keys:  # all are checked before the first is touched
            self._check_free(key, grant.stamp, facts)
        addresses = []
        for granted in grant.vfs:
            vf = facts.vfs[granted.key]
            self._write_stamp(granted.key, grant.stamp)
            self._set_state(ports[granted.pf], granted, vf.state)
            self._vfio.bind(vf.address)
            addresses.append(vf.address)
        for identity in grant.devices:
            address = facts.devices[identity].address
            self._write_stamp(identity, grant.stamp)
            self._vfio.bind(address)
            addresses.append(address)
        return tuple(addresses)

    @staticmethod
    def _check_free(key: str, stamp: Stamp, facts: FunctionFacts) -> None:
        found = facts.vfs.get(key) or facts.devices.get(key)
        if found is None:
            raise NotFound("function", key)
        if found.stamp is not None and not stamp.covers(found.stamp):
            raise HeldByOther(
                f"{key} is {found.stamp.owner}'s, by placement {found.stamp.epoch}.{found.stamp.generation}"
            )

    def _set_state(self, port: Port, granted: GrantedVf, before: VfState) -> None:
        if port.switched is None:
            vflink.write_state(port.interface, granted.index, granted.state, before)
        else:
            eswitch.write_state(port.interface, Device("pci", port.address), granted.index, granted.state, before)
        after = self._states(port)[port.interface].get(granted.index)
        if after is None:
            raise VfMismatch(f"VF {granted.key} is gone from its port")
        if differences := granted.state.differences(after):
            raise VfMismatch(f"VF {granted.key}: {'; '.join(differences)}")

    def _take_back(self, stamp: Stamp, keys: tuple[str, ...]) -> None:
        facts, ports = self._observe(), self._ports()
        for key in keys:
            found = facts.vfs.get(key) or facts.devices.get(key)
            held = facts.stamped().get(key)
            if held is None or not stamp.covers(held):
                continue  # not ours to touch, or done already
            if found is not None:
                self._release(key, facts, ports)
            self._remove_stamp(key)

    def _clean(self, key: str) -> None:
        facts = self._observe()
        vf = facts.vfs.get(key)
        if vf is None:
            raise NotFound("virtual function", key)
        if vf.stamp is not None:
            raise HeldByOther(f"{key} is {vf.stamp.owner}'s")
        if vf.driver not in ("", DRIVER):
            raise HeldByOther(f"{key} is bound to {vf.driver} on the host: somebody may use it; unbind it first")
        self._release(key, facts, self._ports())

    def _release(self, key: str, facts: FunctionFacts, ports: dict[str, Port]) -> None:
        vf, device = facts.vfs.get(key), facts.devices.get(key)
        address = vf.address if vf is not None else device.address if device is not None else ""
        if holders := self._vfio.holders(address):
            raise HeldByOther(f"{key} is held open by {', '.join(holders)}")
        # A VF stays without a driver of the host; a device of the host's own goes back to it.
        self._vfio.release(address, back=vf is None)
        if vf is not None:
            self._set_state(ports[vf.pf], GrantedVf(vf.pf, vf.index, CLEAN), vf.state)

    # --- stamps -------------------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._stamps / f"{key.encode().hex()}.json"

    def _read_stamps(self) -> dict[str, Stamp]:
        found = {}
        for path in self._stamps.glob("*.json"):
            try:
                found[bytes.fromhex(path.stem).decode()] = Stamp(**json.loads(path.read_text()))
            except FileNotFoundError:
                continue
            except (ValueError, TypeError) as error:
                raise MachineError(
                    f"{path} is no stamp of ours ({error}); `casemate-agent fsck` tells what it is on"
                ) from error
        return found

    def _write_stamp(self, key: str, stamp: Stamp) -> None:
        path = self._path(key)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(stamp)))
        fresh.rename(path)

    def _remove_stamp(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)
