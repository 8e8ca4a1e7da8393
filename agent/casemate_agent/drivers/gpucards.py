"""What is done to this machine's GPUs between tenants: bound, reset, proved, scrubbed, given back.

For: ``gpuports.GpuCards``. What may live here: where a GPU is now, who has it open, and the acts; none of them asks whether it
may. Resets are :mod:`casemate_agent.drivers.pcireset`, binding is :mod:`casemate_agent.drivers.vfio`.

Theory of operation. A GPU is found anew for each act by its UUID, from what `HostGpus` saw last. Before a card is taken from the
host's own driver the agent lets go of the vendor's library: it has the devices open, and an unbinding would wait for it. The
scrubber is a program of the administrator, run on the host's own driver with the GPU's UUID and address in its environment; what
it says last is the evidence, and its end with 0 is all that it proves.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from casemate_agent.drivers import pcireset
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.vfio import DRIVER, HeldByOther, Vfio
from casemate_agent.drivers.vgpu import carried
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.readings import Card, CardFacts, Proof
from casemate_core.errors import DeadlineExceeded, MachineError, Unavailable
from casemate_core.gpu import Rung

NVIDIA_NODES = "proc/driver/nvidia/gpus"
MOST_OUTPUT = 4096


class ScrubFailed(MachineError):
    """The scrubber said that it failed, or did not run."""

    reason = "ScrubFailed"


class HostCards:
    """The cards below ``root``. ``scrubber``: program and arguments; empty where none is configured."""

    def __init__(
        self, gpus: HostGpus, root: Path = Path("/"), proc: Path = Path("/proc"), scrubber: tuple[str, ...] = ()
    ) -> None:
        self._gpus = gpus
        self._root = root
        self._vfio = Vfio(root, proc)
        self._scrubber = scrubber
        self._calls = DeadlineExecutor("gpu-cards", threads=4)
        #: Of the reset made last: what the device said that it is, and what was set.
        self._marks: dict[str, tuple[str, pcireset.Mark | None]] = {}

    async def aclose(self) -> None:
        """Let the threads go."""
        self._calls.close()

    async def look(self, deadline_s: float) -> Mapping[str, CardFacts]:
        """``GpuCards.look``."""
        places = self._gpus.places()

        def facts() -> dict[str, CardFacts]:
            return {
                uuid: CardFacts(uuid, address, self._vfio.driver(address), told)
                for uuid, (address, told) in places.items()
                if (self._root / "sys/bus/pci/devices" / address).exists()
            }

        return await self._calls.run("look at GPUs", facts, deadline_s)

    async def card(self, uuid: str, deadline_s: float) -> Card:
        """``GpuCards.card``."""
        address = self._address(uuid)

        def card() -> Card:
            folder = self._vfio.function(address)
            return Card(self._holders(address), pcireset.methods(folder), self._strangers(address))

        return await self._calls.run("look at a GPU", card, deadline_s)

    async def link(self, uuid: str, deadline_s: float) -> LinkReading:
        """``GpuCards.link``."""
        return (await self._gpus.links((self._address(uuid),), deadline_s))[0]

    async def bind(self, uuid: str, deadline_s: float) -> str:
        """``GpuCards.bind``."""
        address = self._address(uuid)
        if self._vfio.driver(address) not in ("", DRIVER):
            await self._gpus.let_go(deadline_s)

        def bind() -> None:
            if self._vfio.driver(address) != DRIVER:
                self._refuse_held(uuid, address)
            self._vfio.bind(address)

        await self._calls.run("bind a GPU", bind, deadline_s)
        return address

    async def reset(self, uuid: str, rung: Rung, deadline_s: float) -> str:
        """``GpuCards.reset``."""
        address = self._address(uuid)

        def reset() -> str:
            self._refuse_held(uuid, address)
            if rung is Rung.BUS_RESET and (others := self._strangers(address)):
                raise pcireset.ResetFailed(f"{', '.join(others)} would be reset too")
            folder = self._vfio.function(address)
            self._marks[uuid] = pcireset.identity(folder), pcireset.mark(folder)
            return pcireset.reset(folder, rung)

        return await self._calls.run("reset a GPU", reset, deadline_s)

    async def prove(self, uuid: str, deadline_s: float) -> Proof:
        """``GpuCards.prove``."""
        address = self._address(uuid)
        if uuid not in self._marks:
            raise Unavailable(f"GPU {uuid} was not reset by this agent since it began")
        before, mark = self._marks[uuid]
        return await self._calls.run(
            "prove a reset", lambda: pcireset.prove(self._vfio.function(address), before, mark), deadline_s
        )

    async def scrub(self, uuid: str, deadline_s: float) -> str:
        """``GpuCards.scrub``."""
        if not self._scrubber:
            raise ScrubFailed("no scrubber is configured: name one as gpu.scrub in the agent's settings")
        address = self._address(uuid)
        await self.unbind(uuid, min(deadline_s, 60.0))
        environment = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")}
        environment |= {"CASEMATE_GPU_UUID": uuid, "CASEMATE_GPU_ADDRESS": address}
        try:
            process = await asyncio.create_subprocess_exec(
                *self._scrubber,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise ScrubFailed(f"{self._scrubber[0]}: {error.strerror}") from error
        try:
            async with asyncio.timeout(deadline_s):
                said = await _last_of(process)
                code = await process.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"the scrubber has not ended within {deadline_s:.0f} s, and was killed") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it left behind
            await process.wait()
        if code:
            raise ScrubFailed(f"{self._scrubber[0]} ended with {code}: {said}")
        return f"{self._scrubber[0]} ended with 0: {said}"

    async def unbind(self, uuid: str, deadline_s: float) -> None:
        """``GpuCards.unbind``."""
        address = self._address(uuid)

        def unbind() -> None:
            if self._vfio.driver(address) in ("", DRIVER):
                self._refuse_held(uuid, address)
            self._vfio.release(address, back=True)

        await self._calls.run("give a GPU back", unbind, deadline_s)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _address(self, uuid: str) -> str:
        found = self._gpus.places().get(uuid)
        if found is None:
            raise Unavailable(f"GPU {uuid} is not there")
        return found[0]

    def _refuse_held(self, uuid: str, address: str) -> None:
        if holders := self._holders(address):
            raise HeldByOther(f"GPU {uuid} is held open by {', '.join(holders[:4])}")

    def _holders(self, address: str) -> tuple[str, ...]:
        """Who has it open: by vfio, or by the nodes of the host's own driver."""
        if self._vfio.driver(address) in ("", DRIVER):
            return self._vfio.holders(address)
        folder = self._root / "sys/bus/pci/devices" / address
        files = {f"/dev/dri/{node.name}" for node in folder.glob("drm/*") if node.name.startswith(("card", "render"))}
        try:
            told = (self._root / NVIDIA_NODES / address / "information").read_text(errors="replace")
        except OSError:
            told = ""
        for line in told.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "Device Minor" and value.strip().isdecimal():
                files.add(f"/dev/nvidia{int(value)}")
        ours = f"({os.getpid()})"
        holders = (holder for holder in self._vfio.open_by(files) if not holder.endswith(ours))
        return (*holders, *carried(self._root, address))

    def _strangers(self, address: str) -> tuple[str, ...]:
        """Other functions on its bus; those of the same card that nobody's driver has come back with it."""
        bus, slot = address.rpartition(":")[0], address.rpartition(".")[0]
        found = []
        for other in sorted((self._root / "sys/bus/pci/devices").glob(f"{bus}:*")):
            if other.name == address:
                continue
            driver = self._vfio.driver(other.name)
            if other.name.rpartition(".")[0] != slot or driver not in ("", DRIVER):
                found.append(f"{other.name} ({driver or 'no driver'})")
        return tuple(found)


async def _last_of(process: asyncio.subprocess.Process) -> str:
    """The last line that a program wrote; what came before is let go of as it comes."""
    kept = b""
    assert process.stdout is not None
    while chunk := await process.stdout.read(MOST_OUTPUT):
        kept = (kept + chunk)[-MOST_OUTPUT:]
    lines = [line.strip() for line in kept.decode(errors="replace").splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in lines[-1])[:300] if lines else "nothing"
