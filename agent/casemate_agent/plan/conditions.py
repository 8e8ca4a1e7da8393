"""What is well or not with a host, in its own words. PURE.

What may live here: the conditions of a host, derived from one observation. They say what is so and since when, never what
is done about it (:mod:`casemate_agent.plan.reconcile`). Each is True where all is well, False with a reason and a sentence
where it is not, Unknown where it could not be found out.

Messages change only when something happened: a report that differs is a message to the manager, and one that differs by
a clock or by the last megabyte of a disk would be one a round.
"""

from casemate_agent.ledger.records import HostRecord, Observation
from casemate_core.spec.views import Condition

GIB_MIB = 1024


def host_conditions(
    host: HostRecord,
    damage: tuple[str, ...],
    observed: Observation,
    low_disk_fraction: float,
    closed: tuple[str, ...] = (),
) -> tuple[Condition, ...]:
    """All conditions of a host, in the order in which they are shown. ``damage`` is what was wrong with the ledger, ``closed``
    the GPUs for which it takes nothing new."""
    return (
        _ready(observed, closed),
        *_gpus(closed),
        _virtualisation(observed),
        _hypervisor(observed),
        _network(observed),
        _images(observed),
        _disk_space(observed, low_disk_fraction),
        _hardware(observed),
        _ledger(host, damage),
    )


def _ready(observed: Observation, closed: tuple[str, ...]) -> Condition:
    """Whether something new can be started here: the scheduler places nothing where this is False."""
    if closed:
        return Condition("Ready", "False", "GpuNotWell", "; ".join(closed)[:1000])
    if observed.domains is None:
        return _no_answer("Ready", observed, "hypervisor")
    return Condition("Ready", "True", "CanStartInstances")


def _gpus(closed: tuple[str, ...]) -> tuple[Condition, ...]:
    """Boards for whose sake the host is to be cordoned."""
    return (Condition("Gpus", "False", "GpuNotWell", "; ".join(closed)[:1000]),) if closed else ()


def _virtualisation(observed: Observation) -> Condition:
    match observed.virtualisation:
        case "kvm":
            return Condition("Virtualisation", "True", "Kvm", "guests run on KVM")
        case "simulated":
            return Condition("Virtualisation", "True", "Simulated", "guests are simulated, nothing runs in them")
        case "tcg":
            why = observed.virtualisation_reason or "the reason is not known"
            message = f"KVM runs no guests here, so they are EMULATED (TCG), many times slower: {why}"
            return Condition("Virtualisation", "False", "Emulated", message)
    return Condition("Virtualisation", "Unknown", "NotProbed", "whether KVM runs guests here was not found out yet")


def _hypervisor(observed: Observation) -> Condition:
    if observed.domains is not None:
        return Condition("Hypervisor", "True", "Reachable")
    return _no_answer("Hypervisor", observed, "hypervisor")


def _network(observed: Observation) -> Condition:
    if observed.networks is None:
        return _no_answer("Network", observed, "networks")
    if observed.network_problem is None:
        return Condition("Network", "Unknown", "NotChecked", "whether the kernel takes our rules was not found out yet")
    if observed.network_problem:
        return Condition("Network", "False", "RulesRefused", observed.network_problem)
    return Condition("Network", "True", "RulesTaken")


def _images(observed: Observation) -> Condition:
    if observed.files is None:
        return _no_answer("Images", observed, "images")
    return Condition("Images", "True", "Readable")


def _disk_space(observed: Observation, low_disk_fraction: float) -> Condition:
    files = observed.files
    if files is None or not files.total_mib:
        return Condition("DiskSpace", "Unknown", "NoAnswer", "how much of the disk is free is not known")
    percent = 100 * files.free_mib // files.total_mib
    if files.free_mib >= low_disk_fraction * files.total_mib:
        return Condition("DiskSpace", "True", "Enough")
    message = (
        f"about {percent} % of {files.total_mib / GIB_MIB:.0f} GiB are free, less than {low_disk_fraction:.0%}; "
        "images that no instance uses are removed"
    )
    return Condition("DiskSpace", "False", "Low" if files.free_mib else "Full", message)


def _hardware(observed: Observation) -> Condition:
    """Ports and devices that the administrator named and that are held back, each with its reason."""
    if observed.functions is None and "functions" in observed.silent:
        return _no_answer("Hardware", observed, "functions")
    problems = observed.machine.problems + (observed.functions.problems if observed.functions is not None else ())
    if not problems:
        return Condition("Hardware", "True", "AsConfigured")
    return Condition("Hardware", "False", problems[0].partition(":")[0], "; ".join(problems)[:1000])


def _ledger(host: HostRecord, damage: tuple[str, ...]) -> Condition:
    if host.complete:
        return Condition("LedgerComplete", "True", "Whole")
    return Condition("LedgerComplete", "False", "WaitingForSnapshot", "; ".join(damage))


def _no_answer(kind: str, observed: Observation, port: str) -> Condition:
    """A part of the host that does not answer: since when, and what it said last."""
    why = observed.silent.get(port, "no answer")
    return Condition(kind, "False", "NoAnswer", why, observed.silent_since_s.get(port, 0.0))
