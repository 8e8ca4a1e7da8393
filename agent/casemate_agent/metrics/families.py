"""What an agent measures: its families, and how outcomes are counted. PURE.

The values that are read off the machine when somebody scrapes are gathered in :mod:`casemate_agent.metrics.scrape`. Families that
begin with ``libvirt_`` have the names, labels and meaning that the common libvirt exporters give them.
"""

from typing import Final

from casemate_agent import actions as act
from casemate_agent.gpu import metrics as of_gpus
from casemate_agent.plan.converge import ActionOutcome
from casemate_core.metrics import Family, Meter, counter, gauge, histogram

BUILD: Final = gauge("casemate_build_info", "1, with the version of this process.", "component", "version")
# --- what the agent does ---
ACTIONS: Final = counter("casemate_actions_total", "Actions by kind and how they ended.", "action", "outcome")
ACTION_S: Final = histogram("casemate_action_duration_seconds", "How long actions took that were done.", "action")
ROUNDS: Final = counter("casemate_rounds_total", "Looks at the whole machine.")
REFUSALS: Final = counter("casemate_placements_refused_total", "Placements that this host refused; it stays 0.")
INSTANCES: Final = gauge("casemate_host_instances", "Instances on this host by phase.", "phase")
FOREIGN: Final = gauge("casemate_host_foreign_domains", "Domains on this host that are not ours.")
DRIFT: Final = gauge("casemate_drift", "Differences between ledger and reality now, by kind.", "kind")
CONDITIONS: Final = gauge(
    "casemate_host_condition", "1 for the status that each condition of this host has.", "condition", "status"
)
DISK_FREE: Final = gauge("casemate_host_disk_free_bytes", "Free space where images and disks of instances are.")
# --- what it rests on ---
LEDGER_S: Final = histogram("casemate_ledger_sync_duration_seconds", "One fsync of the ledger's files or folders.")
LEDGER_FAILED: Final = counter("casemate_ledger_sync_failures_total", "fsyncs of the ledger that failed.")
LIBVIRT_S: Final = histogram("casemate_libvirt_call_duration_seconds", "Calls of libvirt that returned.", "call")
LIBVIRT_FAILED: Final = counter(
    "casemate_libvirt_call_failures_total", "Calls of libvirt that failed or were late, by error.", "call", "error"
)
CONNECTED: Final = gauge("casemate_manager_connected", "1 while the stream to the manager is up.")
OUTBOX: Final = gauge("casemate_outbox_events", "Events that the manager has not acknowledged.")
DOMAIN_INFO: Final = gauge(
    "casemate_domain_info", "1, to join domains with the instances that they are.", "domain", "instance_uid", "tenant",
    "environment", "name",
)  # fmt: skip
# --- libvirt, by the common names ---
UP: Final = gauge("libvirt_up", "1 where libvirt answered this scrape.")
DOMAINS: Final = gauge("libvirt_domains", "Number of domains, ours and others.")
STATE: Final = gauge(
    "libvirt_domain_info_state", "Number of the domain's state (virDomainState), with its word.", "domain", "state_desc"
)
VCPUS: Final = gauge("libvirt_domain_info_virtual_cpus", "Virtual CPUs that are online.", "domain")
MAX_MEMORY: Final = gauge(
    "libvirt_domain_info_maximum_memory_bytes", "Memory that the domain may have at most.", "domain"
)
MEMORY: Final = gauge("libvirt_domain_info_memory_usage_bytes", "Memory that the domain has.", "domain")
CPU: Final = counter("libvirt_domain_info_cpu_time_seconds_total", "CPU time that the domain has used.", "domain")
_VCPU: Final = ("domain", "vcpu")
VCPU: Final = {
    "time_ns": counter("libvirt_domain_vcpu_time_seconds_total", "CPU time of one virtual CPU.", *_VCPU),
    "wait_ns": counter("libvirt_domain_vcpu_wait_seconds_total", "Time that a virtual CPU waited for I/O.", *_VCPU),
    "delay_ns": counter("libvirt_domain_vcpu_delay_seconds_total", "Time that a virtual CPU waited to run.", *_VCPU),
}
MEMORY_STATS: Final = {
    "rss": gauge("libvirt_domain_memory_stats_rss_bytes", "Resident memory of the domain's QEMU.", "domain"),
    "unused": gauge("libvirt_domain_memory_stats_unused_bytes", "Memory that the guest does not use.", "domain"),
    "available": gauge("libvirt_domain_memory_stats_available_bytes", "Memory that the guest sees.", "domain"),
    "usable": gauge("libvirt_domain_memory_stats_usable_bytes", "Memory that the guest could use without swapping.", "domain"),
    "swap_in": gauge("libvirt_domain_memory_stats_swap_in_bytes", "What the guest has read from swap space.", "domain"),
    "swap_out": gauge("libvirt_domain_memory_stats_swap_out_bytes", "What the guest has written to swap space.", "domain"),
}  # fmt: skip
_DISK: Final = ("domain", "source_file", "target_device")
BLOCKS: Final = {
    "read_bytes": counter("libvirt_domain_block_stats_read_bytes_total", "Bytes read from a disk.", *_DISK),
    "read_requests": counter("libvirt_domain_block_stats_read_requests_total", "Reads of a disk.", *_DISK),
    "write_bytes": counter("libvirt_domain_block_stats_write_bytes_total", "Bytes written to a disk.", *_DISK),
    "write_requests": counter("libvirt_domain_block_stats_write_requests_total", "Writes of a disk.", *_DISK),
}
_NIC: Final = ("domain", "source_bridge", "target_device")
INTERFACES: Final = {
    f"{way}_{what}": counter(f"libvirt_domain_interface_stats_{way}_{what}_total", f"{words} an interface of the guest.", *_NIC)
    for way, to in (("receive", "received on"), ("transmit", "sent by"))
    for what, words in (
        ("bytes", f"Bytes {to}"), ("packets", f"Packets {to}"), ("errors", f"Errors of packets {to}"),
        ("drops", f"Packets dropped that were {to}"),
    )
}  # fmt: skip

FAMILIES: Final[tuple[Family, ...]] = of_gpus.FAMILIES + tuple(
    family
    for value in list(globals().values())
    for family in ((value,) if isinstance(value, Family) else value.values() if isinstance(value, dict) else ())
    if isinstance(family, Family)
)
#: virDomainState, for the state's number; libvirt's words are those of the common exporters.
STATES: Final = {
    "running": (1, "the domain is running"),
    "paused": (3, "the domain is paused by user"),
    "shutting-down": (4, "the domain is being shut down"),
    "shut-off": (5, "the domain is shut off"),
    "crashed": (6, "the domain is crashed"),
}


def count_outcome(meter: Meter, outcome: ActionOutcome) -> None:
    """Count how an action ended."""
    word = (
        "interrupted" if outcome.interrupted else "done" if outcome.ok else "refused" if outcome.permanent else "failed"
    )
    name = act.name(outcome.action)
    meter.add(ACTIONS, name, word)
    if word == "done":
        meter.observe(ACTION_S, outcome.took_s, name)
