"""The rules of our two nftables tables, as nft's JSON. PURE.

For: the network driver. What may live here: networks and guards to a transaction for ``nft -j -f -``, and ``nft -j list``
back to guards. Nothing is run here.

Theory of operation. An agent has one table of family ``bridge`` (what a guest may send) and one of family ``inet``
(routing and NAT). The rules are few and never change; what changes are the elements of the sets that they ask, so that a
guest comes and goes by one element, atomically, and what is in force can be read back.

    bridge: taps of ours (by the first letters of their name) may send IPv4 and ARP whose interface, MAC and address are
    together in ``allowed``, and nothing else: no IPv6, no VLAN tags, no other protocol. A tap of ours that has no element
    sends nothing: the rule fails closed.

    inet: what comes from a bridge of ours may go out, and is masqueraded; only answers come back in. Between two of our
    networks nothing passes. What the host itself sends to a guest is not forwarded and passes.

Source of the JSON: libnftables-json(5).
"""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from casemate_agent.domain.names import table_name, tap_prefix
from casemate_core.spec.instance import HostNetwork, Nic

Command = dict[str, Any]

#: Before the kernel's own bridge filtering (linux/netfilter_bridge.h: NF_BR_PRI_FILTER_BRIDGED is -200).
BRIDGE_PRIORITY = -300
FORWARD_PRIORITY = 0
#: linux/netfilter_ipv4.h: NF_IP_PRI_NAT_SRC.
NAT_PRIORITY = 100
GUARD_SET = "allowed"


def document(commands: Iterable[Command]) -> dict[str, Any]:
    """One transaction: all of it or nothing."""
    return {"nftables": list(commands)}


def base_rules(scope: str) -> list[Command]:
    """Both tables with their sets and rules. Sets keep their elements; rules are replaced as a whole."""
    return [*_bridge_rules(scope), *_inet_rules(scope)]


def _bridge_rules(scope: str) -> list[Command]:
    table = {"family": "bridge", "table": table_name(scope)}
    chain = {"chain": "from_guests"}
    iif, mac = {"meta": {"key": "iifname"}}, _payload("ether", "saddr")
    return [
        {"add": {"table": {"family": "bridge", "name": table_name(scope)}}},
        {"add": {"set": {**table, "name": GUARD_SET, "type": ["ifname", "ether_addr", "ipv4_addr"]}}},
        {
            "add": {
                "chain": {
                    **table,
                    "name": "from_guests",
                    "type": "filter",
                    "hook": "prerouting",
                    "prio": BRIDGE_PRIORITY,
                    "policy": "accept",
                }
            }
        },
        {"flush": {"chain": {**table, "name": "from_guests"}}},
        _rule(table | chain, _match("!=", iif, f"{tap_prefix(scope)}*"), {"return": None}),
        _rule(
            table | chain, _match("==", _concat(iif, mac, _payload("ip", "saddr")), f"@{GUARD_SET}"), {"accept": None}
        ),
        # Both the frame's sender and the sender that ARP tells others about must be the guest itself.
        _rule(
            table | chain,
            _match("==", _concat(iif, mac, _payload("arp", "saddr ip")), f"@{GUARD_SET}"),
            _match("==", _concat(iif, _payload("arp", "saddr ether"), _payload("arp", "saddr ip")), f"@{GUARD_SET}"),
            {"accept": None},
        ),
        _rule(table | chain, {"counter": None}, {"drop": None}),
    ]


def _inet_rules(scope: str) -> list[Command]:
    table = {"family": "inet", "table": table_name(scope)}
    forward, nat = table | {"chain": "forward"}, table | {"chain": "postrouting"}
    iif, oif = {"meta": {"key": "iifname"}}, {"meta": {"key": "oifname"}}
    established = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}
    return [
        {"add": {"table": {"family": "inet", "name": table_name(scope)}}},
        {"add": {"set": {**table, "name": "bridges", "type": "ifname"}}},
        {"add": {"set": {**table, "name": "same", "type": ["ifname", "ifname"]}}},
        {"add": {"set": {**table, "name": "subnets", "type": "ipv4_addr", "flags": ["interval"]}}},
        {
            "add": {
                "chain": {
                    **table,
                    "name": "forward",
                    "type": "filter",
                    "hook": "forward",
                    "prio": FORWARD_PRIORITY,
                    "policy": "accept",
                }
            }
        },
        {
            "add": {
                "chain": {
                    **table,
                    "name": "postrouting",
                    "type": "nat",
                    "hook": "postrouting",
                    "prio": NAT_PRIORITY,
                    "policy": "accept",
                }
            }
        },
        {"flush": {"chain": {**table, "name": "forward"}}},
        {"flush": {"chain": {**table, "name": "postrouting"}}},
        # Frames between two guests of one bridge come by here where br_netfilter is loaded.
        _rule(forward, _match("==", _concat(iif, oif), "@same"), {"accept": None}),
        _rule(forward, _match("==", oif, "@bridges"), established, {"accept": None}),
        _rule(forward, _match("==", oif, "@bridges"), {"counter": None}, {"drop": None}),
        _rule(
            nat,
            _match("==", _payload("ip", "saddr"), "@subnets"),
            _match("!=", oif, "@bridges"),
            {"masquerade": None},
        ),
    ]


def add_network(scope: str, network: HostNetwork, bridge: str) -> list[Command]:
    """The elements of one network."""
    return [_elements("add", scope, *entry) for entry in _network_elements(network.subnet, bridge)]


def remove_network(scope: str, subnet: str, bridge: str) -> list[Command]:
    """Take them away. nft refuses to delete what is not there, so each is added first, in the same transaction."""
    entries = _network_elements(subnet, bridge)
    return [_elements(verb, scope, *entry) for entry in entries for verb in ("add", "delete")]


def _network_elements(subnet: str, bridge: str) -> list[tuple[str, str, list[Any]]]:
    entries: list[tuple[str, str, list[Any]]] = [
        ("inet", "bridges", [bridge]),
        ("inet", "same", [{"concat": [bridge, bridge]}]),
    ]
    if subnet:
        net = ipaddress.IPv4Network(subnet)
        prefix = {"prefix": {"addr": str(net.network_address), "len": net.prefixlen}}
        entries.append(("inet", "subnets", [prefix]))
    return entries


def guard_elements(taps: Mapping[str, Nic]) -> list[Any]:
    """(tap, MAC, address) of each NIC."""
    return [{"concat": [tap, nic.mac, nic.address]} for tap, nic in sorted(taps.items())]


def replace_guards(scope: str, old: Mapping[str, tuple[str, str]], new: Mapping[str, Nic]) -> list[Command]:
    """Take the elements ``old`` (tap to MAC and address) out and put ``new`` in, in one step."""
    commands = []
    if old:
        gone = [{"concat": [tap, mac, address]} for tap, (mac, address) in sorted(old.items())]
        commands.append(_elements("delete", scope, "bridge", GUARD_SET, gone))
    if new:
        commands.append(_elements("add", scope, "bridge", GUARD_SET, guard_elements(new)))
    return commands


def delete_tables(scope: str) -> list[Command]:
    """Both tables, whether they are there or not."""
    named = [{"family": family, "name": table_name(scope)} for family in ("bridge", "inet")]
    return [{verb: {"table": table}} for table in named for verb in ("add", "delete")]


def read_guards(listing: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """tap to (MAC, address), of ``nft -j list set``."""
    found = {}
    for item in listing.get("nftables", []):
        for element in item.get("set", {}).get("elem", []):
            concat = element.get("concat") if isinstance(element, dict) else None
            if isinstance(concat, list) and len(concat) == 3:
                tap, mac, address = map(str, concat)
                found[tap] = (mac, address)
    return found


def _elements(verb: str, scope: str, family: str, name: str, elements: list[Any]) -> Command:
    return {verb: {"element": {"family": family, "table": table_name(scope), "name": name, "elem": elements}}}


def _rule(place: Mapping[str, str], *expression: Any) -> Command:
    return {"add": {"rule": {**place, "expr": list(expression)}}}


def _match(op: str, left: Any, right: Any) -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def _concat(*parts: Any) -> dict[str, Any]:
    return {"concat": list(parts)}


def _payload(protocol: str, field: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": field}}
