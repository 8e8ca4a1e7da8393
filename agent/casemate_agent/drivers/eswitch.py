"""NIC ports whose eswitch works in mode ``switchdev``: modes, representors, and the state of VFs there, by devlink.

What may live here: pyroute2 and nothing else. It blocks. What a port keeps of a VF in mode ``legacy`` is :mod:`.vflink`'s.

Theory of operation. In mode ``switchdev`` the NIC is a switch: each VF has a *representor*, an interface of the host that is the
switch's port for it, and what a VF may do is said there or on its devlink port, no longer by the PF's list of VFs:

    mac      function hw_addr of the devlink port, where the driver has that; else still the PF's list
    link     the representor, up or down
    vlan     PVID of the representor, where its administrator has it on a bridge that filters VLANs; else none can be given
    rates    the devlink rate object of the port (bytes a second), where the driver makes one
    trust, spoof check   there are none: what may pass is the switch's to say, by rules of its administrator

So what a port can do depends on its mode and on how its administrator uses it; it is read (`capabilities`), told in the
inventory, and a placement that needs more is refused. devlink's numbers are those of linux/devlink.h; pyroute2 0.9 knows its
attributes up to 147, the rest is added here.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, nla
from pyroute2.netlink.devlink import AsyncDevlinkSocket, DevlinkSocket, devlinkcmd

from casemate_agent.drivers import vflink
from casemate_agent.drivers.links import named_link
from casemate_agent.drivers.vflink import VfMismatch, VfRefused
from casemate_agent.hardware.functions import VfState

#: enum devlink_command.
_PORT_GET, _PORT_SET, _ESWITCH_GET, _RATE_GET, _RATE_SET = 5, 6, 29, 74, 75
_PCI_VF = 4  # enum devlink_port_flavour
_LEAF = 0  # enum devlink_rate_type
_MODES = ("legacy", "switchdev")  # enum devlink_eswitch_mode
#: devlink tells rates in bytes a second, we in Mbit/s.
_BYTES_A_MBIT = 125_000
_BRVLAN = 2  # RTEXT_FILTER_BRVLAN, linux/rtnetlink.h
_PVID, _UNTAGGED = 2, 4  # linux/if_bridge.h
_UP = 1  # IFF_UP
#: The VLAN in which a bridge has a port for which nobody said one.
_DEFAULT_PVID = 1

#: Drivers that have an eswitch with modes; others are not asked.
DRIVERS = frozenset({"bnxt_en", "ice", "mlx5_core", "netdevsim", "nfp", "octeontx2_pf", "sfc"})


class _Message(devlinkcmd):  # type: ignore[misc]
    """devlink's message, with the attributes that are missing in pyroute2's."""

    nla_map = (
        *(
            (number, name, "function" if name == "DEVLINK_ATTR_PORT_FUNCTION" else kind)
            for number, (name, kind) in enumerate(devlinkcmd.nla_map)
        ),
        (165, "DEVLINK_ATTR_RATE_TYPE", "uint16"),
        (166, "DEVLINK_ATTR_RATE_TX_SHARE", "uint64"),
        (167, "DEVLINK_ATTR_RATE_TX_MAX", "uint64"),
    )

    class function(nla):  # type: ignore[misc]
        nla_flags = NLA_F_NESTED
        prefix = "DEVLINK_PORT_FUNCTION_ATTR_"
        nla_map = (
            (0, "DEVLINK_PORT_FUNCTION_ATTR_UNSPEC", "none"),
            (1, "DEVLINK_PORT_FUNCTION_ATTR_HW_ADDR", "l2addr"),
        )


class _AsyncSocket(AsyncDevlinkSocket):  # type: ignore[misc]
    async def bind(self, groups: int = 0, **options: Any) -> None:
        # Its parent's own would have answers read as pyroute2's message.
        await super(AsyncDevlinkSocket, self).bind("devlink", _Message, groups, None, **options)


class _Devlink(DevlinkSocket):  # type: ignore[misc]
    """A socket that speaks `_Message`."""

    async_class = _AsyncSocket

    def ask(self, device: "Device", command: int, *attributes: tuple[str, Any], dump: bool = False) -> list[Any]:
        """Answers of a command; of a dump, all of them, whosever. Raises NetlinkError."""
        message = _Message()
        message["cmd"] = command
        message["version"] = 1
        named = [("DEVLINK_ATTR_BUS_NAME", device.bus), ("DEVLINK_ATTR_DEV_NAME", device.name)]
        message["attrs"] = [] if dump else [*named, *attributes]
        change = command in (_PORT_SET, _RATE_SET)
        flags = NLM_F_REQUEST | (NLM_F_DUMP if dump else NLM_F_ACK if change else 0)
        return list(self.nlm_request(message, msg_type=self.prid, msg_flags=flags))


@dataclass(frozen=True, slots=True)
class Device:
    """A NIC as devlink names it: ``pci/0000:05:00.0``."""

    bus: str
    name: str


@dataclass(frozen=True, slots=True)
class VfPort:
    """The switch's port of a VF. ``function_mac``: the driver keeps the VF's address with the port. ``rate``: highest and lowest
    in Mbit/s; None where the driver makes no rate object for it. ``filtered``: its representor is on a bridge that filters
    VLANs."""

    index: int
    port: int
    representor: str
    mac: str = ""
    function_mac: bool = False
    rate: tuple[int, int] | None = None
    filtered: bool = False
    vlan: int = 0
    up: bool = False

    def state(self, listed: VfState) -> VfState:
        """What of the contract can be seen here; ``listed`` is the PF's own list."""
        highest, lowest = self.rate or (0, 0)
        return VfState(
            mac=self.mac if self.function_mac else listed.mac,
            vlan=self.vlan,
            spoofchk=None,
            trust=None,
            min_rate_mbps=lowest,
            max_rate_mbps=highest,
            link="auto" if self.up else "disable",
        )


def switched(device: Device) -> tuple[str, ...] | None:
    """What VFs can be given where the device is in mode switchdev; None where it is in another. Raises NetlinkError, OSError."""
    return capabilities(vf_ports(device)) if mode(device) == "switchdev" else None


def mode(device: Device) -> str:
    """``legacy`` or ``switchdev``; empty where the device has no eswitch."""
    try:
        with _opened() as link:
            answers = link.ask(device, _ESWITCH_GET)
    except NetlinkError:
        return ""  # the device has none, or the kernel no devlink
    for answer in answers:
        number = answer.get_attr("DEVLINK_ATTR_ESWITCH_MODE")
        if number is not None and number < len(_MODES):
            return _MODES[number]
    return ""


def _opened() -> Any:
    link = _Devlink()
    link.bind()
    return link


def vf_ports(device: Device) -> dict[int, VfPort]:
    """By index of the VF: its port. Raises NetlinkError, OSError."""
    found: dict[int, VfPort] = {}
    with _opened() as link:
        for answer in link.ask(device, _PORT_GET, dump=True):
            if not _of(answer, device) or answer.get_attr("DEVLINK_ATTR_PORT_FLAVOUR") != _PCI_VF:
                continue
            index = int(answer.get_attr("DEVLINK_ATTR_PORT_PCI_VF_NUMBER"))
            function = answer.get_attr("DEVLINK_ATTR_PORT_FUNCTION")
            mac = function.get_attr("DEVLINK_PORT_FUNCTION_ATTR_HW_ADDR") if function is not None else None
            found[index] = VfPort(
                index,
                int(answer.get_attr("DEVLINK_ATTR_PORT_INDEX")),
                answer.get_attr("DEVLINK_ATTR_PORT_NETDEV_NAME") or "",
                (mac or "").lower(),
                mac is not None,
            )
        rates = dict(_rates(link, device))
    with IPRoute() as ip:
        return {index: replace(_on_its_bridge(ip, port), rate=rates.get(port.port)) for index, port in found.items()}


def _rates(link: _Devlink, device: Device) -> Iterator[tuple[int, tuple[int, int]]]:
    with suppress(NetlinkError):  # a kernel, or a device, without rate objects
        for answer in link.ask(device, _RATE_GET, dump=True):
            if _of(answer, device) and answer.get_attr("DEVLINK_ATTR_RATE_TYPE") == _LEAF:
                highest, lowest = (
                    int(answer.get_attr(f"DEVLINK_ATTR_RATE_{name}") or 0) // _BYTES_A_MBIT
                    for name in ("TX_MAX", "TX_SHARE")
                )
                yield int(answer.get_attr("DEVLINK_ATTR_PORT_INDEX")), (highest, lowest)


def _of(answer: Any, device: Device) -> bool:
    name = answer.get_attr("DEVLINK_ATTR_BUS_NAME"), answer.get_attr("DEVLINK_ATTR_DEV_NAME")
    return name == (device.bus, device.name)


def _on_its_bridge(ip: IPRoute, port: VfPort) -> VfPort:
    """The port with what its representor says: up or down, and its VLAN on a bridge that filters."""
    for link in named_link(ip, port.representor) if port.representor else ():
        up, master = bool(link["flags"] & _UP), link.get_attr("IFLA_MASTER")
        if master and _filters(ip, master):
            listed = next((each for each in ip.get_vlans(index=link["index"])), None)
            return replace(port, up=up, filtered=True, vlan=_pvid(listed))
        return replace(port, up=up)
    return port


def _filters(ip: IPRoute, master: int) -> bool:
    for bridge in ip.get_links(master):
        info = bridge.get_attr("IFLA_LINKINFO")
        if info is not None and info.get_attr("IFLA_INFO_KIND") == "bridge":
            data = info.get_attr("IFLA_INFO_DATA")
            return data is not None and bool(data.get_attr("IFLA_BR_VLAN_FILTERING"))
    return False


def _pvid(listed: Any) -> int:
    spec = listed.get_attr("IFLA_AF_SPEC") if listed is not None else None
    for info in spec.get_attrs("IFLA_BRIDGE_VLAN_INFO") if spec is not None else ():
        if info["flags"] & _PVID and info["vid"] != _DEFAULT_PVID:
            return int(info["vid"])
    return 0


def capabilities(ports: Mapping[int, VfPort]) -> tuple[str, ...]:
    """What every VF of these can be given. PURE."""
    found = {"min-rate", "rate"} if ports and all(port.rate is not None for port in ports.values()) else set[str]()
    if ports and all(port.filtered for port in ports.values()):
        found.add("vlan")
    return tuple(sorted(found))


def read_states(interface: str, device: Device) -> dict[int, VfState]:
    """VF index -> its state, of a port in mode switchdev. Raises NetlinkError and OSError."""
    listed = vflink.read_states([interface])[interface]
    return {index: port.state(listed.get(index, VfState())) for index, port in vf_ports(device).items()}


def write_state(interface: str, device: Device, index: int, wanted: VfState, before: VfState) -> None:
    """Make a VF's state ``wanted``. Raises VfRefused naming what cannot be given; what was written until then stays."""
    port = vf_ports(device).get(index)
    if port is None or not port.representor:
        raise VfMismatch(f"VF {index} of {device.bus}/{device.name} has no representor")
    if wanted.mac != before.mac:
        _write_mac(interface, device, port, wanted.mac)
    if wanted.vlan != before.vlan:
        _write_vlan(port, wanted.vlan)
    rates = wanted.max_rate_mbps, wanted.min_rate_mbps
    if rates != (before.max_rate_mbps, before.min_rate_mbps):
        _write_rates(device, port, rates)
    if wanted.link != before.link:
        with IPRoute() as ip:
            for number in ip.link_lookup(ifname=port.representor):
                ip.link("set", index=number, state="down" if wanted.link == "disable" else "up")


def _write_mac(interface: str, device: Device, port: VfPort, mac: str) -> None:
    if not port.function_mac:
        vflink.write_mac(interface, port.index, mac)
        return
    with _opened() as link:
        function = {"attrs": [("DEVLINK_PORT_FUNCTION_ATTR_HW_ADDR", mac)]}
        try:
            link.ask(
                device, _PORT_SET, ("DEVLINK_ATTR_PORT_INDEX", port.port), ("DEVLINK_ATTR_PORT_FUNCTION", function)
            )
        except NetlinkError as error:
            raise VfRefused(f"VF {port.index} ({port.representor}): mac is refused by its driver: {error}") from error


def _write_rates(device: Device, port: VfPort, rates: tuple[int, int]) -> None:
    if port.rate is None:
        raise VfRefused(f"VF {port.index} ({port.representor}): its driver keeps no rate for it")
    with _opened() as link:
        # The lowest goes first where it falls, the highest where it rises: neither is ever above the other.
        order = [("TX_MAX", rates[0]), ("TX_SHARE", rates[1])]
        for name, mbps in order if rates[0] >= port.rate[0] else reversed(order):
            try:
                link.ask(
                    device,
                    _RATE_SET,
                    ("DEVLINK_ATTR_PORT_INDEX", port.port),
                    (f"DEVLINK_ATTR_RATE_{name}", mbps * _BYTES_A_MBIT),
                )
            except NetlinkError as error:
                raise VfRefused(f"VF {port.index} ({port.representor}): rate is refused: {error}") from error


def _write_vlan(port: VfPort, vlan: int) -> None:
    if not port.filtered:
        raise VfRefused(f"VF {port.index}: its representor {port.representor} is on no bridge that filters VLANs")
    with IPRoute() as ip:
        for number in ip.link_lookup(ifname=port.representor):
            if port.vlan:
                ip.vlan_filter("del", index=number, vlan_info={"vid": port.vlan})
            vid = vlan or _DEFAULT_PVID
            ip.vlan_filter("add", index=number, vlan_info={"vid": vid, "flags": _PVID | _UNTAGGED})
            if vlan:
                with suppress(NetlinkError):  # it is not in it
                    ip.vlan_filter("del", index=number, vlan_info={"vid": _DEFAULT_PVID})
