"""What expressions may ask of a host and of an environment. PURE.

May live here: the documented facts, and nothing else; an expression sees no claims, so its value for a host holds until the
host's labels, taints or picture change.

    host         name, labels, taints (key, value, effect), sockets, cells, cores, threads, memory_mib, disk_mib, smt (bool),
                 isolated_threads, gpus (number), gpu_models, page_sizes_kib, networks, device_labels ("key=value")
    environment  name, tenant, labels
"""

from collections.abc import Iterable, Mapping

from casemate_core.topology import Topology
from casemate_manager.columns import HostView
from casemate_manager.policy.expressions import MAX_FACT_ELEMENTS


def host_facts(view: HostView) -> dict[str, object]:
    """The facts of a host."""
    t: Topology = view.topology
    return {
        "name": view.name,
        "labels": dict(view.labels),
        "taints": [{"key": x.key, "value": x.value, "effect": x.effect} for x in view.taints[:MAX_FACT_ELEMENTS]],
        "sockets": len({core.socket for core in t.cores}),
        "cells": len(t.cells),
        "cores": len(t.cores),
        "threads": len(t.online),
        "memory_mib": t.memory_mib,
        "disk_mib": t.disk_mib,
        "smt": t.index.smt_width > 1,
        "isolated_threads": t.index.isolated.bit_count(),
        "gpus": len(t.gpus),
        "gpu_models": _some({gpu.model for gpu in t.gpus}),
        "page_sizes_kib": sorted(t.index.page_sizes)[:MAX_FACT_ELEMENTS],
        "networks": _some({network for pf in t.pfs for network in pf.networks}),
        "device_labels": _some({f"{key}={value}" for device in t.devices for key, value in device.labels}),
    }


def environment_facts(name: str, tenant: str, labels: Mapping[str, str]) -> dict[str, object]:
    """The facts of an environment."""
    return {"name": name, "tenant": tenant, "labels": dict(labels)}


def _some(values: Iterable[str]) -> list[str]:
    return sorted(values)[:MAX_FACT_ELEMENTS]
