"""The drivers of this machine, put together.

What may live here: the choice and the life of the real drivers. It imports libvirt, pyroute2 and the like, so it is itself
imported only where a real host is driven.
"""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from casemate_agent.config import Config
from casemate_agent.drivers.console import PtyConsoles
from casemate_agent.drivers.fetch import SourceRules
from casemate_agent.drivers.gpucards import HostCards
from casemate_agent.drivers.gpus import HostGpus
from casemate_agent.drivers.guest import GuestChannels
from casemate_agent.drivers.http import http_download
from casemate_agent.drivers.image import ImageStore
from casemate_agent.drivers.libvirt import LibvirtHypervisor, LibvirtSettings
from casemate_agent.drivers.network import HostNetworks
from casemate_agent.drivers.nvfm import NvFabric
from casemate_agent.drivers.partitions import CgroupPartitions
from casemate_agent.drivers.passageports import Certify
from casemate_agent.drivers.passages import HostPassages, cpu_name
from casemate_agent.drivers.ports import Drivers
from casemate_agent.drivers.seriallog import SerialLogFiles
from casemate_agent.drivers.sriov import HostFunctions
from casemate_agent.drivers.survey import HostSurveyor
from casemate_agent.drivers.sysfs import HostMachine
from casemate_agent.drivers.tuning import HostTuning
from casemate_agent.drivers.vgpu import HostShares
from casemate_agent.drivers.volumes import VolumeFiles
from casemate_agent.metrics.families import LIBVIRT_FAILED, LIBVIRT_S
from casemate_agent.relay.pipe import Relay, uid_of
from casemate_agent.uplink.crossing import TlsCrossings
from casemate_core.metrics import Meter

#: Of a libvirtd as distributions configure it.
DEFAULT_SOCKET = "/run/libvirt/libvirt-sock"
#: Where the answer about KVM is kept, in the state folder.
PROBE_CACHE = "virtualisation.json"


@asynccontextmanager
async def real_drivers(config: Config, meter: Meter, certify: Certify) -> AsyncIterator[Drivers]:
    """The drivers of this machine; their threads and connections end with the context, VMs go on. ``certify`` asks the
    manager for certificates of migrations."""
    state_dir = Path(config.state_dir).absolute()
    run_dir = Path(config.run_dir).absolute()
    run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)

    def observe(call: str, took_s: float, error: str) -> None:
        if error:
            meter.add(LIBVIRT_FAILED, call, error)
        else:
            meter.observe(LIBVIRT_S, took_s, call)

    async with AsyncExitStack() as stack:
        gpus = HostGpus(state_dir, rules=config.gpus)
        stack.push_async_callback(gpus.aclose)
        fabric = NvFabric(config.fabric_manager) if config.fabric_manager else None
        if fabric is not None:
            stack.push_async_callback(fabric.aclose)
        machine = HostMachine(
            state_dir, ports=config.ports, devices=config.devices, gpus=gpus, isolate=config.isolate, fabric=fabric
        )
        stack.push_async_callback(machine.aclose)
        cards = HostCards(gpus, scrubber=config.gpu.scrubber)
        stack.push_async_callback(cards.aclose)
        shares = HostShares(gpus, state_dir)
        stack.push_async_callback(shares.aclose)
        download = Relay(Path(config.relay), uid_of(config.relay_user)).download if config.relay else http_download
        images = ImageStore(state_dir, SourceRules(folders=tuple(config.image_folders)), download=download)
        stack.push_async_callback(images.aclose)
        volumes = VolumeFiles(state_dir)
        stack.callback(volumes.close)
        networks = HostNetworks(config.scope)
        stack.push_async_callback(networks.aclose)
        hypervisor = await stack.enter_async_context(
            LibvirtHypervisor(
                LibvirtSettings(
                    uri=config.libvirt_uri,
                    run_dir=str(run_dir),
                    instances_dir=str(state_dir / "instances"),
                    probe_cache=str(state_dir / PROBE_CACHE),
                    scope=config.scope,
                ),
                observe,
            )
        )
        functions = HostFunctions(run_dir, config.ports, config.devices)
        stack.push_async_callback(functions.aclose)
        tuning = HostTuning()
        stack.push_async_callback(tuning.aclose)
        partitions = CgroupPartitions()
        stack.push_async_callback(partitions.aclose)
        guests = GuestChannels()
        stack.push_async_callback(guests.close)
        survey = HostSurveyor(state_dir, config.libvirt_uri, config.scope, state_dir / PROBE_CACHE)
        stack.push_async_callback(survey.aclose)
        consoles = PtyConsoles(hypervisor.console_path)
        stack.push_async_callback(consoles.aclose)
        serials = SerialLogFiles(state_dir / "instances", time.time)
        stack.callback(serials.close)
        passages = None
        if config.passage and not config.relay:
            crossings = TlsCrossings(config.passage, certify)
            cpu = cpu_name(Path("/proc/cpuinfo").read_text())
            passages = HostPassages(crossings, hypervisor, socket_of(config.libvirt_uri), Path(config.moves_dir), cpu)
            stack.push_async_callback(passages.aclose)
        yield Drivers(
            machine=machine,
            survey=survey,
            hypervisor=hypervisor,
            images=images,
            networks=networks,
            guests=guests,
            consoles=consoles,
            serials=serials,
            gpus=gpus,
            cards=cards,
            shares=shares,
            fabric=fabric,
            functions=functions,
            tuning=tuning,
            partitions=partitions,
            volumes=volumes,
            passages=passages,
        )


def socket_of(uri: str) -> str:
    """The socket of the libvirtd that a URI names (https://libvirt.org/uri.html, "URI parameters")."""
    found = parse_qs(urlsplit(uri).query).get("socket", ())
    return found[0] if found else DEFAULT_SOCKET
