"""Texts that a guest's network is made of: addresses at boot, names of peers."""

from __future__ import annotations

import json
import os

from .files import read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def network_commands(text: str, later: list[str] | None = None) -> tuple[list[str], list[str], list[str]]:
    """The seed's network-config as lines for ``ip -batch``, name servers and search domains.

    Understands version 2 (netplan's form) written as JSON, which is what Casemate writes: interfaces found by
    ``match.macaddress`` (or by the name of the entry), ``set-name``, ``addresses``, ``routes``, ``gateway4``, ``mtu``,
    ``nameservers``. Raises ValueError for anything else. Addresses of interfaces that are not there are added to ``later``
    where it is given: the driver of a virtual function comes late.
    """
    config = json.loads(text)
    config = config.get("network", config)
    if config.get("version") != 2:
        raise ValueError("only version 2 is understood")
    links = {}
    for link in os.listdir("/sys/class/net"):
        links[read_text(f"/sys/class/net/{link}/address").strip().lower()] = link
    lines, servers, search = ["link set lo up"], [], []
    for entry, spec in config.get("ethernets", {}).items():
        mac = str(spec.get("match", {}).get("macaddress", "")).lower()
        name = links.get(mac) if mac else entry
        if name is None:
            if later is None:
                raise ValueError(f"no interface has the address {mac}")
            later.append(mac)
            continue
        if spec.get("dhcp4") or spec.get("dhcp6"):
            raise ValueError("addresses come from the manager, not by DHCP")
        wanted = str(spec.get("set-name", name))
        if wanted != name:
            lines += [f"link set {name} down", f"link set {name} name {wanted}"]
        if "mtu" in spec:
            lines.append(f"link set {wanted} mtu {int(spec['mtu'])}")
        lines.append(f"link set {wanted} up")
        lines += [f"addr replace {address} dev {wanted}" for address in spec.get("addresses", ())]
        routes = list(spec.get("routes", ()))
        if "gateway4" in spec:
            routes.append({"to": "default", "via": spec["gateway4"]})
        for route in routes:
            to = "default" if route["to"] in ("default", "0.0.0.0/0") else route["to"]
            lines.append(f"route replace {to} via {route['via']} dev {wanted} onlink")
        servers += spec.get("nameservers", {}).get("addresses", [])
        search += spec.get("nameservers", {}).get("search", [])
    if any(c in "\n\r" for line in (*lines, *servers, *search) for c in line):
        raise ValueError("a value holds a line break")
    return lines, servers, search


def hosts_file(text: str, hosts: Mapping[str, str]) -> str:
    """``/etc/hosts`` with our block of names (name -> address) replaced."""
    begin, end = "# casemate: begin\n", "# casemate: end\n"
    if begin in text and end in text:
        text = text[: text.index(begin)] + text[text.index(end) + len(end) :]
    lines = "".join(f"{address}\t{name}\n" for name, address in sorted(hosts.items()))
    return text + (begin + lines + end if lines else "")


def instance_env(meta: Mapping[str, Any], peers: Mapping[str, str]) -> str:
    """``/run/casemate/instance.env``: who this instance is and who its peers are, as lines that a shell can read."""
    words = {
        "CASEMATE_INSTANCE": meta.get("local-hostname", ""),
        "CASEMATE_ENVIRONMENT": meta.get("casemate-environment", ""),
        "CASEMATE_ORDINAL": meta.get("casemate-ordinal", ""),
        "CASEMATE_PEERS": " ".join(f"{name}={address}" for name, address in sorted(peers.items())),
    }
    # names, numbers and addresses: none of them holds what a shell would obey, and what does is left out
    good = {
        key: str(word)
        for key, word in words.items()
        if all(c.isascii() and (c.isalnum() or c in " .:=_-") for c in str(word))
    }
    return "".join(f'{key}="{word}"\n' for key, word in good.items())
