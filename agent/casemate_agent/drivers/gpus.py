"""The GPUs of this machine: what the library tells, what sysfs shows, and what was seen before.

For: ``drivers.sysfs`` (the topology) and ``gpuports.Gpus``. What may live here: asking NVML and sysfs, and the file in which
GPUs are remembered (``gpus.json`` in the agent's state folder); which of them count is decided in
:mod:`casemate_agent.gpu.inventory`.

Theory of operation. The file is replaced as a whole, and only when a GPU is new, has moved, or was seen in a new boot. One that
cannot be read is said and begun anew: the library tells again all that the host's driver holds, and what a guest holds is
held back until it comes home, which is the safe error.
"""

import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.files import write_private
from casemate_agent.drivers.gpuports import GpuParts
from casemate_agent.drivers.inventory import identity_of, matches
from casemate_agent.drivers.nvml import NvmlGpus
from casemate_agent.gpu.inventory import GpuSight, KnownGpu, sight
from casemate_agent.gpu.link import FILES, LinkReading, link_of
from casemate_agent.gpu.readings import GpuFault, GpuReading
from casemate_agent.hardware.rules import GpuRule
from casemate_core.errors import CallerError, CasemateError, MachineError, Unavailable
from casemate_core.plain import from_plain, to_plain
from casemate_core.topology_loaders import GpuFacts

log = logging.getLogger("casemate.agent.gpus")

PCI = "sys/bus/pci/devices"
NVIDIA = "0x10de"
MAX_FILE_BYTES = 1 << 20
_VERSION = 1


class HostGpus:
    """The GPUs below ``root``. Use it from one event loop, and close it."""

    def __init__(
        self,
        state_dir: Path,
        root: Path = Path("/"),
        library: NvmlGpus | None = None,
        rules: Sequence[GpuRule] = (),
    ) -> None:
        self._rules = tuple(rules)
        self._declared: frozenset[str] = frozenset()
        self._path = state_dir / "gpus.json"
        self._root = root
        self._library = library or NvmlGpus()
        self._calls = DeadlineExecutor("gpus", threads=1)
        self._known: Mapping[str, KnownGpu] | None = None
        self._damage: tuple[str, ...] = ()
        self._sight = GpuSight()

    async def aclose(self) -> None:
        """Let the threads go."""
        self._calls.close()
        await self._library.aclose()

    async def look(self, deadline_s: float) -> GpuSight:
        """What GPUs there are now. A library that is not there is no error: then nothing is told. Raises OSError."""
        declared, missing = await self._calls.run("look for declared GPUs", self._of_rules, deadline_s)
        self._declared = frozenset(facts.uuid for facts in declared)
        drivers = await self._calls.run("look for GPUs", self._drivers, deadline_s)
        known = await self._calls.run("read gpus.json", self._remembered, deadline_s)
        if not drivers and not known:
            # no card of the vendor: its library is not even loaded
            self._sight = GpuSight(declared, problems=(*self._damage, *missing))
            return self._sight
        readings: tuple[GpuReading, ...] | None = None
        silent: tuple[str, ...] = ()
        try:
            readings = await self._library.read(deadline_s)
        except Unavailable as error:
            silent = (f"GpusNotTold: {error}",) if drivers else ()
        except MachineError as error:
            silent = (f"GpusNotTold: {error}",)
        boot_id = (self._root / "proc/sys/kernel/random/boot_id").read_text().strip()
        seen = sight(readings, known, boot_id, drivers)
        if seen.known != known:
            await self._calls.run("write gpus.json", lambda: self._remember(seen.known), deadline_s)
        there = {facts.address for facts in seen.gpus}
        more = tuple(facts for facts in declared if facts.address not in there)
        told = await self._calls.run("label GPUs", lambda: tuple(map(self._labelled, seen.gpus)), deadline_s)
        problems = (*self._damage, *silent, *seen.problems, *missing)
        self._sight = GpuSight((*told, *more), seen.known, problems)
        return self._sight

    def places(self) -> dict[str, tuple[str, bool]]:
        """Of the GPUs that ``look`` found last: where each is, and whether the library tells of it."""
        return {facts.uuid: (facts.address, facts.uuid not in self._declared) for facts in self._sight.gpus}

    async def let_go(self, deadline_s: float) -> None:
        """Have nothing of this process hold a GPU: before one is taken from the host's driver."""
        await self._library.let_go(deadline_s)

    async def read(self, deadline_s: float) -> tuple[GpuParts, ...]:
        """``Gpus.read``: of the GPUs that ``look`` found last."""
        gpus = self._sight.gpus
        if not gpus:
            return ()
        told: dict[str, GpuReading] = {}
        try:
            if any(gpu.uuid not in self._declared for gpu in gpus):
                told = {reading.uuid: reading for reading in await self._library.read(deadline_s)}
        except MachineError as error:
            log.info("of GPUs only the links are seen: %s", error)
        links = {link.address: link for link in await self.links(tuple(gpu.address for gpu in gpus), deadline_s)}
        return tuple(GpuParts(gpu.uuid, told.get(gpu.uuid), links[gpu.address]) for gpu in gpus)

    async def faults(self) -> AsyncIterator[GpuFault]:
        """``Gpus.faults``. A host without a card of the vendor has none."""
        if all(gpu.uuid in self._declared for gpu in self._sight.gpus):
            raise Unavailable("no GPU of this host is told by its library")
        async for fault in self._library.faults():
            yield fault

    async def links(self, addresses: tuple[str, ...], deadline_s: float) -> tuple[LinkReading, ...]:
        """The PCIe links of functions, whoever holds them."""
        return await self._calls.run("read links", lambda: tuple(map(self._link, addresses)), deadline_s)

    # --- in the thread ---

    def _drivers(self) -> dict[str, str]:
        """Display controllers of the vendor (PCI class 03), by address."""
        found = {}
        for place in sorted((self._root / PCI).glob("*")):
            try:
                if (place / "vendor").read_text().strip() != NVIDIA or not (place / "class").read_text().startswith(
                    "0x03"
                ):
                    continue
            except OSError:
                continue  # it went while we looked
            driver = place / "driver"
            found[place.name] = os.path.basename(os.readlink(driver)) if driver.is_symlink() else ""
        return found

    def _of_rules(self) -> tuple[tuple[GpuFacts, ...], tuple[str, ...]]:
        """GPUs that the administrator declares, which no library tells: each is its serial number, or its slot."""
        found: dict[str, list[GpuFacts]] = {}
        for place in sorted((self._root / PCI).glob("*")) if self._rules else ():
            rules = (r for r in self._rules if r.model)
            rule = next((r for r in rules if matches(place, r.vendor, r.device, r.pci_class)), None)
            if rule is not None and not (place / "physfn").exists():
                uuid = f"GPU-{identity_of(place)}"
                facts = GpuFacts(place.name, uuid, rule.model, rule.memory_mib, labels=rule.labels)
                found.setdefault(uuid, []).append(facts)
        problems = tuple(
            f"IdentityUncertain: {' and '.join(f.address for f in same)} both say that they are {uuid}; none is given away"
            for uuid, same in found.items()
            if len(same) > 1
        )
        return tuple(same[0] for same in found.values() if len(same) == 1), problems

    def _labelled(self, facts: GpuFacts) -> GpuFacts:
        """With the labels of the first rule for GPUs that a library tells that is about this one."""
        place = self._root / PCI / facts.address
        for r in self._rules:
            if not r.model and (facts.uuid == r.uuid if r.uuid else matches(place, r.vendor, r.device, r.pci_class)):
                return replace(facts, labels=r.labels)
        return facts

    def _link(self, address: str) -> LinkReading:
        place = self._root / PCI / address
        files = {}
        for name in FILES:
            try:
                path = place / name
                files[name] = os.readlink(path) if path.is_symlink() else path.read_text(errors="replace")
            except OSError:
                continue
        return link_of(address, files)

    def _remembered(self) -> Mapping[str, KnownGpu]:
        if self._known is None:
            self._known = {}
            try:
                data = json.loads(self._path.read_bytes()[:MAX_FILE_BYTES])
                if data["version"] != _VERSION:
                    raise ValueError(f"version {data['version']!r}, this agent reads {_VERSION}")
                self._known = {uuid: from_plain(KnownGpu, plain) for uuid, plain in data["gpus"].items()}
            except FileNotFoundError:
                pass
            except (ValueError, TypeError, LookupError, AttributeError, CallerError, CasemateError) as error:
                self._damage = (f"GpusForgotten: {self._path}: {error}; GPUs that guests hold are held back",)
                log.warning("%s", self._damage[0])
        return self._known

    def _remember(self, known: Mapping[str, KnownGpu]) -> None:
        body = {"version": _VERSION, "gpus": {uuid: to_plain(gpu) for uuid, gpu in sorted(known.items())}}
        write_private(self._path, json.dumps(body, indent=1).encode())
        self._known, self._damage = known, ()
