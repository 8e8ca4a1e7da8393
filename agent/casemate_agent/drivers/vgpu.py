"""vGPUs of this machine, over sysfs: made, found, destroyed.

For: ``gpuports.GpuShares``. What may live here: the two ways in which NVIDIA's vGPU driver offers them, and the file in which
is kept for whom each was made (``shares.json`` in the agent's state folder). It decides nothing.

Theory of operation. Which way there is depends on the driver and the kernel (NVIDIA, "Virtual GPU Software User Guide",
Creating an NVIDIA vGPU on a Linux with KVM Hypervisor):

    mediated devices     ``mdev_supported_types/nvidia-N`` below the GPU, or below each of its virtual functions where it has
                         some: a UUID written to ``create`` makes ``/sys/bus/mdev/devices/UUID``; 1 to its ``remove`` destroys it
                         (Documentation/driver-api/vfio-mediated-device.rst)
    virtual functions    ``nvidia/current_vgpu_type`` of a virtual function: the number of a type makes it that vGPU, 0 destroys
                         it; ``nvidia/creatable_vgpu_types`` lists ``NUMBER : NAME`` of what can be made on it now

A type is found by its name, for its number is another one on each kind of board. The virtual functions are there because the
administrator has enabled them (``sriov-manage -e``); none is made here. The file is written, and synced, before the act: one
that was cut short is found again by its record, and making and destroying may be repeated. Each is read back; what is not as
asked is an error, and never left to be believed. To remove a mediated device that a QEMU has open waits for it in the kernel: the
caller ends the domain first, and the deadline bounds what is left.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from casemate_agent.drivers.attributes import write_attribute
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.files import write_private
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.nvmlshares import bare_name
from casemate_agent.gpu.shares import Share, ShareFacts
from casemate_core.errors import CallerError, CasemateError, MachineError, Unavailable
from casemate_core.plain import from_plain, to_plain

log = logging.getLogger("casemate.agent.gpus")

PCI = "sys/bus/pci/devices"
MDEV = "sys/bus/mdev/devices"
TYPES = "mdev_supported_types"
CURRENT = "nvidia/current_vgpu_type"
CREATABLE = "nvidia/creatable_vgpu_types"
MAX_FILE_BYTES = 1 << 20
_VERSION = 1
_LINE = re.compile(r"\s*(\d{1,9})\s*:\s*(\S.*?)\s*\Z")


class ShareFailed(MachineError):
    """The host's vGPU driver did not make or destroy a vGPU as asked."""

    reason = "ShareFailed"


class HostShares:
    """The vGPUs below ``root``, on the GPUs that ``gpus`` has found. Close it."""

    def __init__(self, gpus: HostGpus, state_dir: Path, root: Path = Path("/")) -> None:
        self._gpus = gpus
        self._root = root
        self._path = state_dir / "shares.json"
        self._calls = DeadlineExecutor("vgpu", threads=1)
        self._known: dict[str, ShareFacts] | None = None

    async def aclose(self) -> None:
        """Let the thread go."""
        self._calls.close()

    async def look(self, deadline_s: float) -> Mapping[str, ShareFacts]:
        """``GpuShares.look``."""
        places = self._places()
        if not places:
            return {}
        return await self._calls.run("look for vGPUs", lambda: dict(self._look(places)), deadline_s)

    async def create(self, share: Share, deadline_s: float) -> ShareFacts:
        """``GpuShares.create``."""
        places = self._places()
        if share.gpu not in places:
            raise Unavailable(f"GPU {share.gpu} is not there")
        return await self._calls.run("make a vGPU", lambda: self._create(share, places), deadline_s)

    async def remove(self, id: str, deadline_s: float) -> None:
        """``GpuShares.remove``."""
        await self._calls.run("destroy a vGPU", lambda: self._remove(id, self._places()), deadline_s)

    def _places(self) -> dict[str, str]:
        """Addresses of the GPUs that may carry any: those that the vendor's library tells."""
        return {uuid: address for uuid, (address, told) in self._gpus.places().items() if told}

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _look(self, places: Mapping[str, str]) -> Iterator[tuple[str, ShareFacts]]:
        known = self._records()
        by_address = {address: uuid for uuid, address in places.items()}
        folder = self._root / MDEV
        for device in sorted(folder.iterdir()) if folder.is_dir() else ():
            carrier = self._carrier(device)
            gpu = by_address.get(carrier, "") or by_address.get(self._physical(carrier), "")
            if gpu:
                kind = _text(device / "mdev_type/name")
                record = known.get(device.name)
                yield device.name, ShareFacts(device.name, gpu, bare_name(kind), record.owner if record else "")
        ours = {facts.address: facts for facts in known.values() if facts.address}
        for uuid, address in places.items():
            functions = tuple(self._functions(address))
            # what is on one is told by those that are free
            names = dict(pair for function in functions for pair in _creatable(function))
            for function in functions:
                number = _number(function / CURRENT)
                if not number:
                    continue
                facts = ours.get(function.name)
                name = names.get(number) or (facts.profile if facts is not None else f"type {number}")
                found = ShareFacts(facts.id if facts else f"{uuid}@{function.name}", uuid, name, address=function.name)
                yield found.id, replace(found, owner=facts.owner if facts else "")

    def _create(self, share: Share, places: Mapping[str, str]) -> ShareFacts:
        known = self._records()
        there = dict(self._look(places)).get(share.id)
        if there is not None:
            if (there.gpu, there.profile) != (share.gpu, share.profile):
                raise ShareFailed(
                    f"vGPU {share.id} is there as {there.profile} of {there.gpu}, and {share.profile} of {share.gpu} is asked"
                )
            return self._keep(replace(there, owner=share.owner))
        address = places[share.gpu]
        card = self._root / PCI / address
        if not card.is_dir():
            raise Unavailable(f"GPU {share.gpu} is not there")
        functions = list(self._functions(address))
        facts = ShareFacts(share.id, share.gpu, share.profile, share.owner)
        if (where := self._mediated((card, *functions), share.profile)) is not None:
            self._keep(facts)
            self._tell(where / "create", share.id)
            self._must_be_there(facts, places)
            return facts
        begun = known.get(share.id)
        held = {other.address for other in known.values() if other.address and other.id != share.id}
        # one that was begun goes on where it was begun
        functions.sort(key=lambda f: (begun is None or f.name != begun.address, f.name))
        for function in functions:
            if function.name in held or _number(function / CURRENT) != 0:
                continue
            number = next((n for n, name in _creatable(function) if name == share.profile), 0)
            if number:
                facts = self._keep(replace(facts, address=function.name))
                self._tell(function / CURRENT, str(number))
                self._must_be_there(facts, places)
                return facts
        raise ShareFailed(
            f"GPU {share.gpu} at {address} has no room for a vGPU {share.profile} now, or no function to carry it: "
            "see mdev_supported_types below it, or nvidia/creatable_vgpu_types below its virtual functions"
        )

    def _tell(self, path: Path, text: str) -> None:
        """All that is ever written to the kernel."""
        write_attribute(path, text, ShareFailed)

    def _must_be_there(self, asked: ShareFacts, places: Mapping[str, str]) -> None:
        found = dict(self._look(places)).get(asked.id)
        if found != asked:
            raise ShareFailed(
                f"vGPU {asked.id} was made as {asked.profile} of {asked.gpu}, and is read back as {found}"
            )

    def _remove(self, id: str, places: Mapping[str, str]) -> None:
        known = self._records()
        device = self._root / MDEV / id
        if device.exists():
            self._tell(device / "remove", "1")
            if device.exists():
                raise ShareFailed(f"vGPU {id} was destroyed, and is still there")
        record = known.get(id)
        if record is not None and record.address:
            function = self._root / PCI / record.address
            # after a reboot another board may be there: then there is no vGPU on it that is ours
            if _number(function / CURRENT):
                self._tell(function / CURRENT, "0")
                if _number(function / CURRENT):
                    raise ShareFailed(f"vGPU {id} on {record.address} was destroyed, and is still there")
        if record is not None:
            del known[id]
            self._write(known)

    def _mediated(self, functions: tuple[Path, ...], profile: str) -> Path | None:
        """The type of mediated device of that name that can be made once more."""
        for function in functions:
            for kind in sorted((function / TYPES).glob("*")):
                if bare_name(_text(kind / "name")) == profile and (_number(kind / "available_instances") or 0) > 0:
                    return kind
        return None

    def _functions(self, address: str) -> Iterator[Path]:
        """Virtual functions of a GPU, in their order."""
        links = (self._root / PCI / address).glob("virtfn*")
        for link in sorted(links, key=lambda path: int(path.name.removeprefix("virtfn") or 0)):
            yield self._root / PCI / os.path.basename(os.readlink(link))

    def _carrier(self, device: Path) -> str:
        """Address of the function below which a mediated device is."""
        return os.path.basename(os.path.dirname(os.path.realpath(device)))

    def _physical(self, address: str) -> str:
        link = self._root / PCI / address / "physfn"
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""

    # --- the file -----------------------------------------------------------------------------------------------------

    def _records(self) -> dict[str, ShareFacts]:
        if self._known is None:
            found: dict[str, ShareFacts] = {}
            try:
                data = json.loads(self._path.read_bytes()[:MAX_FILE_BYTES])
                if data["version"] != _VERSION:
                    raise ValueError(f"version {data['version']!r}, this agent reads {_VERSION}")
                found = {id: from_plain(ShareFacts, plain) for id, plain in data["shares"].items()}
            except FileNotFoundError:
                pass
            except (ValueError, TypeError, LookupError, AttributeError, CallerError, CasemateError) as error:
                log.warning("%s: %s; vGPUs that are there are taken for somebody else's", self._path, error)
            self._known = found
        return self._known

    def _keep(self, facts: ShareFacts) -> ShareFacts:
        known = self._records()
        if known.get(facts.id) != facts:
            known[facts.id] = facts
            self._write(known)
        return facts

    def _write(self, known: Mapping[str, ShareFacts]) -> None:
        try:
            body = {"version": _VERSION, "shares": {id: to_plain(facts) for id, facts in sorted(known.items())}}
            write_private(self._path, json.dumps(body, indent=1).encode())
        except OSError:
            self._known = None  # what is on disk counts
            raise


def carried(root: Path, address: str) -> tuple[str, ...]:
    """What is on a GPU in words, whoever made it: it must not be taken from the host's driver."""
    card = root / PCI / address
    functions = [card, *(Path(os.path.realpath(link)) for link in card.glob("virtfn*"))]
    folder = root / MDEV
    below = {os.path.basename(os.path.realpath(f)) for f in functions}
    found = [
        f"vGPU {device.name}"
        for device in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if os.path.basename(os.path.dirname(os.path.realpath(device))) in below
    ]
    return (*found, *(f"vGPU on {f.name}" for f in functions[1:] if _number(f / CURRENT)))


def _creatable(function: Path) -> list[tuple[int, str]]:
    """(number, name) of the types that can be made on a virtual function now; a heading is no type."""
    found = (_LINE.match(line) for line in _text(function / CREATABLE).splitlines())
    return [(int(line[1]), bare_name(line[2])) for line in found if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
