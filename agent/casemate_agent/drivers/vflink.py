"""The state that a port keeps for each of its VFs, by netlink.

What may live here: pyroute2 and nothing else: reading IFLA_VFINFO_LIST, and writing one attribute after the other. It blocks.

Each attribute is written by a message of its own: the kernel stops at the first one that a driver refuses, and tells only
its error, not which it was. An attribute that is so already is not written: drivers refuse what they do not know even where
nothing would change (igb: a lowest rate of 0).
"""

from collections.abc import Collection
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from casemate_agent.drivers.links import named_link
from casemate_agent.hardware.functions import VfState
from casemate_core.errors import MachineError

#: Ask for the VFs too (RTEXT_FILTER_VF, linux/rtnetlink.h).
_WITH_VFS = 1
#: IFLA_VF_LINK_STATE_* (linux/if_link.h).
_LINKS = ("auto", "enable", "disable")
#: What the kernel fills in where the driver does not say (net/core/rtnetlink.c: -1).
_UNSAID = 0xFFFFFFFF


class VfMismatch(MachineError):
    """The port does not hold what it was told; the text says which fields."""

    reason = "VfMismatch"


class VfRefused(MachineError):
    """The port's driver refuses an attribute."""

    reason = "VfRefused"


def read_states(interfaces: Collection[str]) -> dict[str, dict[int, VfState]]:
    """Interface -> VF index -> its state. Raises NetlinkError and OSError; an interface that is gone has no VFs."""
    found: dict[str, dict[int, VfState]] = {name: {} for name in interfaces}
    with IPRoute() as ip:
        for name, states in found.items():
            for link in named_link(ip, name, ext_mask=_WITH_VFS):
                listed = link.get_attr("IFLA_VFINFO_LIST")
                for info in listed.get_attrs("IFLA_VF_INFO") if listed is not None else ():
                    states[info.get_attr("IFLA_VF_MAC")["vf"]] = _state(info)
    return found


def _state(info: Any) -> VfState:
    def value(attribute: str, name: str) -> int:
        found = info.get_attr(attribute)
        return int(found[name]) if found is not None else 0

    def word(attribute: str, name: str) -> bool | None:
        found = info.get_attr(attribute)
        if found is None or found[name] == _UNSAID:
            return None
        return bool(found[name])

    link = value("IFLA_VF_LINK_STATE", "link_state")
    return VfState(
        mac=info.get_attr("IFLA_VF_MAC")["mac"].lower(),
        vlan=value("IFLA_VF_VLAN", "vlan"),
        spoofchk=word("IFLA_VF_SPOOFCHK", "spoofchk"),
        trust=word("IFLA_VF_TRUST", "trust"),
        min_rate_mbps=value("IFLA_VF_RATE", "min_tx_rate"),
        max_rate_mbps=value("IFLA_VF_RATE", "max_tx_rate"),
        link=_LINKS[link] if link < len(_LINKS) else "auto",
    )


def write_state(interface: str, index: int, wanted: VfState, before: VfState) -> None:
    """Make a VF's state ``wanted``. Raises VfRefused naming the attribute; what was written until then stays."""
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=interface)
        if not found:
            raise VfRefused(f"interface {interface} is gone")
        for name, arguments in _writes(wanted, before):
            try:
                ip.link("set", index=found[0], vf={"vf": index, **arguments})
            except NetlinkError as error:
                raise VfRefused(
                    f"VF {index} of {interface}: {name} is refused by the port's driver: {error}"
                ) from error


def _writes(wanted: VfState, before: VfState) -> list[tuple[str, dict[str, Any]]]:
    """The messages, in an order in which nothing is open in between: the spoof check goes first where it is to hold and
    last where it is not, trust the other way round."""
    writes: list[tuple[str, dict[str, Any]]] = []
    if wanted.trust is not None and before.trust and not wanted.trust:
        writes.append(("trust", {"trust": 0}))
    if before.mac != wanted.mac:
        writes.append(("mac", {"mac": wanted.mac}))
    if before.vlan != wanted.vlan:
        writes.append(("vlan", {"vlan": wanted.vlan}))
    # A VLAN that is set switches igb's spoof check on again: it is always written after it.
    if wanted.spoofchk is not None and before.spoofchk is not None:
        writes.append(("spoofchk", {"spoofchk": int(wanted.spoofchk)}))
    if (before.min_rate_mbps, before.max_rate_mbps) != (wanted.min_rate_mbps, wanted.max_rate_mbps):
        rate = {"min_tx_rate": wanted.min_rate_mbps, "max_tx_rate": wanted.max_rate_mbps}
        writes.append(("rate", {"rate": rate}))
    if before.link != wanted.link:
        writes.append(("link", {"link_state": _LINKS.index(wanted.link)}))
    if wanted.trust and not before.trust:
        writes.append(("trust", {"trust": 1}))
    return writes


def write_mac(interface: str, index: int, mac: str) -> None:
    """Give a VF another address, and nothing else. Raises VfRefused."""
    with IPRoute() as ip:
        for number in ip.link_lookup(ifname=interface):
            try:
                ip.link("set", index=number, vf={"vf": index, "mac": mac})
            except NetlinkError as error:
                raise VfRefused(f"VF {index} of {interface}: mac is refused by the port's driver: {error}") from error


def set_up(interface: str) -> None:
    """Bring the port up: its VFs have no link while it is down. Raises NetlinkError."""
    with IPRoute() as ip:
        for index in ip.link_lookup(ifname=interface):
            ip.link("set", index=index, state="up")
