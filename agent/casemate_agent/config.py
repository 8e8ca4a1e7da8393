"""What an agent is told when it starts: a TOML file, and flags that go before it.

What may live here: names, defaults and checks of settings. Nothing reads settings anywhere else.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from casemate_agent.drivers.passageports import ports_of
from casemate_agent.gpu.records import DEFAULT_POLICY, GpuPolicy
from casemate_agent.gpu.settings import gpu_policy
from casemate_agent.hardware.rules import DeviceRule, GpuRule, PortRule, device_rules, gpu_rules, port_rules
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.errors import CallerError, MachineError

#: What may be done about drift.
DRIFT = ("repair", "hold")
REALTIME = ("off", "report", "apply")
MAX_SOCKET_PATH = 107
"""sun_path of sockaddr_un without its last zero."""


class BadConfig(CallerError):
    """A setting has no meaning."""

    reason = "BadConfig"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of an agent's process.

    ``name`` is the host's; simulated hosts are numbered after it. A host that has joined knows its name and its manager.
    ``manager`` is ``host:port`` on loopback, dialled in plain text, with ``insecure_loopback`` alone. With neither, the agent
    keeps what is on its disk running, and is told nothing new.
    """

    name: str = ""
    manager: str = ""
    #: Plain text, without an identity, to a manager on loopback: for development.
    insecure_loopback: bool = False
    #: Socket of the relay, which has the network in this process's place (casemate-agent relay); empty: this process has it.
    relay: str = ""
    #: The user that the relay must be.
    relay_user: str = "casemate-relay"
    state_dir: str = "/var/lib/casemate"
    run_dir: str = "/run/casemate"
    libvirt_uri: str = "qemu:///system"
    #: Address of this host that others reach for a migration: ADDRESS, or ADDRESS:FIRST-LAST with the ports that may be
    #: listened on. Empty: it takes part in none.
    passage: str = ""
    #: Folder of sockets of migrations, as this process sees /var/lib/libvirt/qemu/casemate of libvirtd.
    moves_dir: str = "/var/lib/libvirt/qemu/casemate"
    #: Tells several agents of one machine apart (names of bridges and taps): 1 to 12 small letters and digits.
    scope: str = "main"
    #: Folders that ``file://`` sources of images may lie in; http and https need none.
    image_folders: tuple[str, ...] = ("/var/lib/casemate/library",)
    #: Where Prometheus finds metrics, HOST:PORT on loopback; empty: nowhere. Port 0 takes a free one.
    metrics_listen: str = ""
    log_format: str = "console"
    log_level: str = "info"
    stop_grace_s: float = 60.0
    #: What is done about threads of VMs that somebody moved: ``repair`` binds them again, ``hold`` only tells.
    affinity_drift: str = "repair"
    #: The same for pools of huge pages that are smaller than what was promised of them.
    page_drift: str = "hold"
    #: The real-time profile: ``off``, ``report`` it, or ``apply`` what can be set at run time (docs/realtime.md).
    realtime: str = "report"
    #: Threads that a cpuset partition isolates while a dedicated VM has them, in the kernel's list syntax (docs/realtime.md).
    isolate: CpuSet = EMPTY
    concurrency: int = 16
    #: One line that describes the hosts to simulate (casemate_core.topology_loaders.line); empty: this machine.
    simulated: str = ""
    hosts: int = 1
    #: NIC ports that may be cut into virtual functions, and functions that may be given away whole.
    ports: tuple[PortRule, ...] = ()
    devices: tuple[DeviceRule, ...] = ()
    #: Functions that are GPUs though no library tells them, and what is asked of GPUs between tenants.
    gpus: tuple[GpuRule, ...] = ()
    gpu: GpuPolicy = DEFAULT_POLICY
    #: Socket of the Fabric Manager of a board with NVSwitches, a path; empty: there is none to be asked.
    fabric_manager: str = ""
    #: How long a simulated guest boots.
    boot_s: float = 0.5


def _threads(given: Any) -> CpuSet:
    """A list of threads. Raises ValueError."""
    try:
        return CpuSet.parse(given)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'isolate: {given!r} is no list of threads ({error}); write isolate = "4-7,12"') from error


_TABLES: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("ports", port_rules),
    ("devices", device_rules),
    ("gpus", gpu_rules),
    ("gpu", gpu_policy),
    ("isolate", _threads),
)


def load(path: str, flags: Mapping[str, Any], *, needs_name: bool = True) -> Config:
    """Settings from a file (none where ``path`` is empty; it may be missing where "-" stands before it, as in systemd's
    EnvironmentFile) and from flags, which win. Raises BadConfig.

    ``needs_name``: whether the host must be named; a verb that only looks at the machine needs no name.
    """
    given: dict[str, Any] = {}
    optional, path = path.startswith("-"), path.removeprefix("-")
    if path and not (optional and not Path(path).exists()):
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadConfig(f"{path}: {error}") from error
    given |= {name: value for name, value in flags.items() if value is not None}
    if isinstance(given.get("image_folders"), list):
        given["image_folders"] = tuple(given["image_folders"])
    for name, read in _TABLES:
        if name in given:
            try:
                given[name] = read(given[name])
            except ValueError as error:
                raise BadConfig(str(error)) from error
    kinds = {field.name: type(field.default) for field in fields(Config)}
    for name, value in given.items():
        if name not in kinds:
            raise BadConfig(f"{name}: there is no such setting; there are {', '.join(sorted(kinds))}")
        right = isinstance(value, kinds[name]) or (kinds[name] is float and isinstance(value, int))
        if not right or (isinstance(value, bool) and kinds[name] is not bool):
            raise BadConfig(f"{name}: expected {kinds[name].__name__}, got {value!r}")
    config = replace(Config(), **given)
    if config.manager and not config.insecure_loopback:
        raise BadConfig(
            "manager: a host that has joined (casemate-agent join) knows its manager; another is dialled in plain text, on"
            " loopback, with insecure_loopback (--insecure-loopback)"
        )
    socket = config.fabric_manager
    if socket and (not socket.startswith("/") or len(socket) > MAX_SOCKET_PATH):
        raise BadConfig(
            f"fabric_manager: {socket!r} is no path of a socket; write that of FM_CMD_UNIX_SOCKET_PATH in the Fabric Manager's"
            " configuration (this process has no network, so an address is of no use)"
        )
    if needs_name and not config.name:
        raise BadConfig("name: say which host this is (--name)")
    if not all(isinstance(folder, str) and folder.startswith("/") for folder in config.image_folders):
        raise BadConfig("image_folders: a list of absolute paths")
    if config.log_format not in ("console", "json"):
        raise BadConfig(f"log_format: {config.log_format!r} is neither console nor json")
    if config.hosts < 1 or (config.hosts > 1 and not config.simulated):
        raise BadConfig("hosts: more than one host, and at least one, only with --simulated")
    if config.relay and (not config.relay.startswith("/") or config.hosts > 1):
        raise BadConfig(f"relay: the absolute path of a socket, of one host alone; got {config.relay!r}")
    for name, words in (("affinity_drift", DRIFT), ("page_drift", DRIFT), ("realtime", REALTIME)):
        if getattr(config, name) not in words:
            raise BadConfig(f"{name}: {getattr(config, name)!r} is none of {', '.join(words)}")
    if config.passage:
        try:
            ports_of(config.passage)
        except MachineError as error:
            raise BadConfig(str(error)) from None
    if config.passage and config.relay:
        raise BadConfig("passage: a split agent (relay) takes part in no migrations yet; leave one of the two out")
    if config.stop_grace_s < 0 or config.concurrency < 1:
        raise BadConfig("stop_grace_s and concurrency: positive numbers")
    return config
