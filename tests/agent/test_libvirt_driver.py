"""The libvirt driver on a private libvirtd with real QEMU (nothing boots in it: its life is what counts here)."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import libvirt
import psutil
import pytest

from casemate_agent import sandbox as sandboxes
from casemate_agent.drivers.ports import DomainEvent, DomainFacts, DomainPhase
from casemate_agent.ledger.records import from_metadata
from casemate_core.claims import Claim, PlainMemory
from casemate_core.cpuset import CpuSet
from casemate_core.errors import CasemateError, DeadlineExceeded, NotFound, Unavailable
from casemate_core.spec.instance import Placement
from support import virt_hang
from support.instances import NETWORK, nic
from support.real_host import RealHost, drivers_on

pytestmark = pytest.mark.libvirt


@pytest.fixture
def uid() -> str:
    return str(uuid.uuid4())


async def facts_of(host: RealHost, uid: str) -> DomainFacts:
    return next(facts for facts in await host.hypervisor.domains(20) if facts.uuid == uid)


async def until(events: AsyncIterator[DomainEvent], words: str, within_s: float = 60) -> DomainEvent:
    """The next event whose reason holds ``words``."""
    async with asyncio.timeout(within_s):
        async for event in events:
            if words in event.reason:
                return event
    raise AssertionError("the events ended")


async def test_the_life_of_a_domain(real_host: RealHost, uid: str) -> None:
    host = real_host
    events = host.hypervisor.events()
    desired = host.small(uid, user_data="#cloud-config\n{}\n", nics=(nic(),), pods=({"kind": "Pod"},))
    await host.networks.ensure_network(NETWORK, 20)
    await host.networks.guard(uid, desired.nics, 20)
    with pytest.raises(NotFound):
        await host.hypervisor.start(uid, 20)
    await host.prepared(desired)
    await host.prepared(desired)
    assert (await facts_of(host, uid)).phase is DomainPhase.SHUT_OFF
    await host.hypervisor.start(uid, 60)
    await host.hypervisor.start(uid, 20)
    assert (await until(events, "started")).uuid == uid

    facts = await facts_of(host, uid)
    assert facts.phase is DomainPhase.RUNNING and facts.owned
    assert b"qemu" in Path(f"/proc/{facts.pid}/cmdline").read_bytes()
    assert from_metadata(facts.record) == desired
    assert Path(facts.channel_path).is_socket()
    assert (facts.vcpus, facts.memory_mib) == (1, 64)
    (tap,) = facts.taps
    bridge = host.networks.bridge(NETWORK.name)
    seen = await host.networks.observe(20)
    assert (host.networks.tap(uid, 0), seen.taps, seen.plugged) == (tap, (tap,), {tap: bridge})
    await asyncio.to_thread(subprocess.run, ["ip", "link", "set", tap, "nomaster"], check=True)
    assert (await host.networks.observe(20)).plugged == {tap: ""}
    for _ in range(2):
        await host.networks.plug(tap, NETWORK.name, 20)
        assert (await host.networks.observe(20)).plugged == {tap: bridge}

    await host.hypervisor.destroy(uid, 20)
    await host.hypervisor.destroy(uid, 20)
    assert (await until(events, "stopped")).reason == "stopped: destroyed"
    facts = await facts_of(host, uid)
    assert (facts.phase, facts.pid) == (DomainPhase.SHUT_OFF, 0)
    await host.hypervisor.undefine(uid, 20)
    await host.hypervisor.undefine(uid, 20)
    await host.end(uid)
    assert await host.hypervisor.domains(20) == ()
    assert (await host.networks.observe(20)).taps == ()
    seen = await host.images.observe(20)
    assert not seen.overlays and not seen.seeds and not seen.strays


async def test_vcpus_and_emulator_run_where_the_claim_says(real_host: RealHost, uid: str) -> None:
    online = CpuSet.parse(Path("/sys/devices/system/cpu/online").read_text())
    pinned, other = online.first, max(online)
    claim = Claim(
        owner=uid,
        vcpus=(pinned, other),
        vcpus_online=2,
        vcpus_max=2,
        emulator=CpuSet.of(other),
        memory=(PlainMemory(0, 64, 0, 64),),
    )
    desired = real_host.small(uid, cpus=2, cpu_policy="dedicated", placement=Placement(claim, 1, 1))
    await real_host.prepared(desired)
    await real_host.hypervisor.start(uid, 60)
    facts = await facts_of(real_host, uid)
    assert facts.vcpu_pins == (frozenset([pinned]), frozenset([other]))
    allowed = {}
    for task in Path(f"/proc/{facts.pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        allowed[status["Name"]] = CpuSet.parse(status["Cpus_allowed_list"])
    vcpus = sorted(name for name in allowed if name.startswith("CPU "))
    assert [allowed[name] for name in vcpus] == [CpuSet.of(pinned), CpuSet.of(other)]
    assert allowed["qemu-system-x86"] == CpuSet.of(other)
    nodes = Path(f"/proc/{facts.pid}/status").read_text().split("Mems_allowed_list:\t")[1].split()[0]
    assert nodes == "0"


async def test_a_domain_keeps_the_machine_type_that_it_was_made_with(real_host: RealHost, uid: str) -> None:
    desired = await real_host.prepared(real_host.small(uid))
    connection = libvirt.open(real_host.sandbox.uri)
    try:
        domain = connection.lookupByUUIDString(uid)
        older = domain.XMLDesc().replace("pc-q35-7.2", "pc-q35-6.2").replace("pc-q35-10.0", "pc-q35-9.2")
        assert older != domain.XMLDesc()
        connection.defineXML(older)
        await real_host.hypervisor.define(replace(desired, generation=6), real_host.images.files(desired), 20)
        kept = connection.lookupByUUIDString(uid).XMLDesc()
    finally:
        connection.close()
    assert "pc-q35-6.2" in kept or "pc-q35-9.2" in kept
    assert (await facts_of(real_host, uid)).generation == 6


async def test_libvirt_adds_no_device_that_nobody_asked_for(real_host: RealHost, uid: str) -> None:
    await real_host.prepared(real_host.small(uid))
    connection = libvirt.open(real_host.sandbox.uri)
    try:
        devices = fromstring(connection.lookupByUUIDString(uid).XMLDesc()).find("devices")
    finally:
        connection.close()
    assert devices is not None
    kinds = {device.tag for device in devices}
    assert not kinds & {"graphics", "video", "sound", "hub", "redirdev", "parallel", "hostdev", "tpm", "smartcard"}
    assert {disk.get("device") for disk in devices.iterfind("disk")} == {"disk"}
    assert [c.get("model") for c in devices.iterfind("controller[@type='usb']")] == ["none"]
    assert {audio.get("type") for audio in devices.iterfind("audio")} <= {"none"}
    # of the chipset itself, and no part of it that could be left out
    assert {device.get("bus") for device in devices.iterfind("input")} <= {"ps2"}
    buses = {c.get("type") for c in devices.iterfind("controller")}
    assert buses <= {"usb", "pci", "sata", "virtio-serial"}


async def test_a_foreign_domain_is_told_and_told_apart(real_host: RealHost) -> None:
    foreign = str(uuid.uuid4())
    connection = libvirt.open(real_host.sandbox.uri)
    try:
        connection.defineXML(
            f"<domain type='qemu'><name>someone-elses</name><uuid>{foreign}</uuid><memory unit='MiB'>96</memory>"
            "<vcpu>3</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
        )
        facts = await facts_of(real_host, foreign)
    finally:
        connection.close()
    assert (facts.owned, facts.name, facts.vcpus, facts.memory_mib) == (False, "someone-elses", 3, 96)


async def test_a_lost_record_is_never_half_a_record(real_host: RealHost, uid: str) -> None:
    plain = await real_host.prepared(real_host.small(uid))
    kept = real_host.folder / f"state/instances/{uid}/record.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.unlink()
    assert from_metadata((await facts_of(real_host, uid)).record) == plain, "the metadata alone holds all of it"
    await real_host.prepared(replace(plain, pods=({"kind": "Pod"},)))
    kept.write_text("{}")
    assert (await facts_of(real_host, uid)).record == "", "without its pods it must not be taken for the whole"


async def test_qemu_that_is_killed_is_an_event_and_can_be_started_again(real_host: RealHost, uid: str) -> None:
    events = real_host.hypervisor.events()
    await real_host.prepared(real_host.small(uid))
    await real_host.hypervisor.start(uid, 60)
    first = (await facts_of(real_host, uid)).pid
    os.kill(first, signal.SIGKILL)
    assert (await until(events, "stopped")).uuid == uid
    assert (await facts_of(real_host, uid)).phase is DomainPhase.SHUT_OFF
    await real_host.hypervisor.start(uid, 60)
    again = (await facts_of(real_host, uid)).pid
    assert again not in (0, first)


async def test_a_stopped_libvirtd_costs_a_deadline_and_never_the_loop(real_host: RealHost, uid: str) -> None:
    hypervisor, longest = real_host.hypervisor, 0.0
    await hypervisor.domains(20)

    async def watch_loop() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.02)
            longest = max(longest, time.monotonic() - before)

    watcher = asyncio.create_task(watch_loop())
    os.kill(real_host.sandbox.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises((DeadlineExceeded, Unavailable)):
                await hypervisor.domains(0.5)
            assert time.monotonic() - began < 30
    finally:
        os.kill(real_host.sandbox.pid, signal.SIGCONT)
    async with asyncio.timeout(60):
        while True:
            try:
                assert await hypervisor.domains(5) == ()
                break
            except CasemateError:
                await asyncio.sleep(0.1)
    watcher.cancel()
    assert longest < 20, "a call that blocked the loop would have held it for as long as libvirtd is stopped"


def test_a_libvirtd_that_hangs_while_many_ask_does_not_end_the_agent(
    sandbox: sandboxes.Sandbox, tmp_path: Path
) -> None:
    program = Path(virt_hang.__file__)
    argv = [sys.executable, str(program), str(tmp_path), sandbox.uri, sandbox.scope, str(sandbox.pid)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.usefixtures("sandbox")  # for libvirt's thread, which stays
async def test_guests_outlive_libvirtd_and_are_found_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, uid: str
) -> None:
    """libvirtd is killed and started again: one event says so, and QEMU is the same process."""
    folder = tmp_path_factory.mktemp("k")
    own = await asyncio.to_thread(sandboxes.up, folder / "lv")
    try:
        async with drivers_on(own, tmp_path) as host:
            events = host.hypervisor.events()
            await host.prepared(host.small(uid))
            await host.hypervisor.start(uid, 60)
            pid = (await facts_of(host, uid)).pid
            libvirtd = psutil.Process(own.pid)
            os.kill(own.pid, signal.SIGKILL)
            # Its sockets close before it is gone, and until then it would be taken for one that runs.
            await asyncio.to_thread(psutil.wait_procs, [libvirtd], 60)
            async with asyncio.timeout(60):
                while True:
                    try:
                        await host.hypervisor.domains(5)
                    except Unavailable:
                        break
                    await asyncio.sleep(0.05)
            began = time.monotonic()
            with pytest.raises(Unavailable, match="libvirt is away"):
                await host.hypervisor.start(uid, 20)
            assert time.monotonic() - began < 15, "while it is away nobody waits for it"
            again = await asyncio.to_thread(sandboxes.up, folder / "lv")
            assert (again.pid, again.namespace) != (own.pid, own.namespace) and again.namespace == own.namespace
            await until(events, "is back", 60)
            facts = await facts_of(host, uid)
            assert (facts.pid, facts.phase) == (pid, DomainPhase.RUNNING)
    finally:
        await asyncio.to_thread(sandboxes.down, folder / "lv")


async def test_tcg_or_kvm_is_found_out_once_and_remembered(real_host: RealHost) -> None:
    kind = await real_host.hypervisor.virtualisation(30)
    assert kind in ("kvm", "tcg")
    remembered = real_host.folder / "state/virtualisation.json"
    assert f'"kind": "{kind}"' in remembered.read_text()
    if kind == "tcg":
        assert real_host.hypervisor.virtualisation_reason
