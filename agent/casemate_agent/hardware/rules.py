"""What the administrator of a host says of its hardware: rules for ports and devices. PURE.

What may live here: the rules' types, and their reading from the settings' tables ``[[ports]]``, ``[[devices]]`` and
``[[gpus]]``. A rule names what a thing is (permanent MAC address, vendor, product, class), never where it is plugged in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from casemate_core.errors import CallerError
from casemate_core.quantity import parse_mib

MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?\Z", re.ASCII)
_HEX4 = re.compile(r"[0-9a-f]{4}\Z", re.ASCII)
_CLASS = re.compile(r"[0-9a-f]{2,6}\Z", re.ASCII)
#: The VF count of the SR-IOV capability is a 16-bit number (PCI Express base specification, TotalVFs).
MAX_VFS = 65_535


@dataclass(frozen=True, slots=True)
class PortRule:
    """A port that may be cut: ``vfs`` virtual functions (0: as many as there can be), reaching ``networks``."""

    mac: str
    networks: tuple[str, ...]
    vfs: int = 0


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """Functions that may be given away whole. Numbers in hex without ``0x``; an empty one matches all."""

    labels: tuple[tuple[str, str], ...]
    vendor: str = ""
    device: str = ""
    pci_class: str = ""


@dataclass(frozen=True, slots=True)
class GpuRule:
    """Functions that are GPUs, and what they are called. With a ``model``: though no library tells them. Without one: those
    that a library tells. Numbers in hex without ``0x``; an empty one matches all."""

    model: str = ""
    vendor: str = ""
    device: str = ""
    pci_class: str = ""
    memory_mib: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    #: That GPU alone, of those that a library tells.
    uuid: str = ""


def port_rules(tables: Any) -> tuple[PortRule, ...]:
    """The rules of ``[[ports]]``. Raises ValueError that names the field, the value and the remedy."""
    rules = []
    for path, table in _tables("ports", tables, {"mac", "networks", "vfs"}):
        mac = str(table.get("mac", "")).lower()
        if not MAC.match(mac):
            raise ValueError(f"{path}.mac: {mac!r} is not a MAC address; write the port's permanent one (ethtool -P)")
        networks = table.get("networks", [])
        if not isinstance(networks, list) or not networks or not all(_NAME.match(str(n)) for n in networks):
            raise ValueError(f"{path}.networks: {networks!r} is not a list of names of physical networks")
        vfs = table.get("vfs", 0)
        if isinstance(vfs, bool) or not isinstance(vfs, int) or not 0 <= vfs <= MAX_VFS:
            raise ValueError(f"{path}.vfs: {vfs!r} is not a number from 0 (all of them) to {MAX_VFS}")
        rules.append(PortRule(mac, tuple(sorted(map(str, networks))), vfs))
    if len({rule.mac for rule in rules}) < len(rules):
        raise ValueError("ports: two rules name the same port; write one for each")
    return tuple(rules)


def device_rules(tables: Any) -> tuple[DeviceRule, ...]:
    """The rules of ``[[devices]]``; the first that matches a function counts. Raises ValueError, as above."""
    rules = []
    for path, table in _tables("devices", tables, {"vendor", "device", "class", "labels"}):
        numbers = _numbers(path, table)
        pairs = _labels(path, table.get("labels", {}), '{ type = "fec" }')
        rules.append(DeviceRule(pairs, numbers["vendor"], numbers["device"], numbers["class"]))
    return tuple(rules)


def gpu_rules(tables: Any) -> tuple[GpuRule, ...]:
    """The rules of ``[[gpus]]``; the first that matches a function counts. Raises ValueError, as above."""
    rules = []
    for path, table in _tables("gpus", tables, {"vendor", "device", "class", "model", "memory", "labels", "uuid"}):
        uuid, labels = str(table.get("uuid", "")), tuple[tuple[str, str], ...]()
        if len(uuid) > 128 or not uuid.isprintable() or (uuid and "model" in table):
            raise ValueError(f"{path}.uuid: {uuid!r}: write the UUID that nvidia-smi -L shows, and no model beside it")
        numbers = _numbers(path, table) if not uuid else {"vendor": "", "device": "", "class": ""}
        if "labels" in table:
            labels = _labels(path, table["labels"], '{ pool = "training" }')
        model = table.get("model", "")
        if not isinstance(model, str) or len(model) > 128 or not model.isprintable() or not (model or labels):
            raise ValueError(
                f'{path}.model: {model!r} is not the name of a model; write model = "Radeon Pro W7900", or labels for GPUs '
                "that their library tells"
            )
        if not model and "memory" in table:
            raise ValueError(f"{path}.memory: is for GPUs that no library tells; name their model, or leave it out")
        try:
            memory_mib = parse_mib(str(table["memory"])) if "memory" in table else 0
        except CallerError as error:
            raise ValueError(f"{path}.memory: {error}") from error
        rules.append(GpuRule(model, numbers["vendor"], numbers["device"], numbers["class"], memory_mib, labels, uuid))
    return tuple(rules)


def _labels(path: str, labels: Any, example: str) -> tuple[tuple[str, str], ...]:
    """Labels, ascending by key. Raises ValueError."""
    if not isinstance(labels, dict) or not labels or not all(isinstance(v, str) for v in labels.values()):
        raise ValueError(f"{path}.labels: {labels!r} is not a table of labels; write labels = {example}")
    return tuple(sorted((str(key), value) for key, value in labels.items()))


def _numbers(path: str, table: Mapping[str, Any]) -> dict[str, str]:
    """What a function must be. Raises ValueError."""
    numbers = {name: str(table.get(name, "")).lower().removeprefix("0x") for name in ("vendor", "device", "class")}
    for name, value in numbers.items():
        if value and not (_CLASS if name == "class" else _HEX4).match(value):
            raise ValueError(f"{path}.{name}: {value!r} is not a number as lspci -nn shows it")
    if not numbers["vendor"] and not numbers["class"]:
        raise ValueError(f"{path}: matches every function of the host; write vendor and device, or class")
    return numbers


def _tables(name: str, tables: Any, known: set[str]) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{name}: expected tables; begin each with [[{name}]]")
    for i, table in enumerate(tables):
        for key in table:
            if key not in known:
                raise ValueError(f"{name}[{i}].{key}: there is no such setting; there are {', '.join(sorted(known))}")
    return [(f"{name}[{i}]", table) for i, table in enumerate(tables)]
