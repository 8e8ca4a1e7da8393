"""Where dedicated vCPUs may run, against where they should. PURE.

What may live here: the comparison of a claim's threads with the affinity that the kernel reports for each vCPU's thread. What
counts is the kernel's word and not libvirt's: whoever moves a thread with taskset does not tell libvirt.
"""

from casemate_agent.drivers.ports import DomainFacts, DomainPhase
from casemate_core.claims import Claim
from casemate_core.cpuset import CpuSet


def watched(domain: DomainFacts) -> bool:
    """Whether the domain has vCPUs with a thread of their own, and a process in which they run."""
    return bool(domain.pid) and domain.phase is DomainPhase.RUNNING and any(len(pin) == 1 for pin in domain.vcpu_pins)


def moved(claim: Claim, affinity: tuple[frozenset[int], ...]) -> tuple[str, ...]:
    """Dedicated vCPUs that may run elsewhere than on their thread, by name; none where the kernel was not asked."""
    return tuple(
        f"AffinityChanged: vCPU {vcpu} may run on {CpuSet.from_ids(found) or 'none'}, should be on {thread}"
        for vcpu, (thread, found) in enumerate(zip(claim.vcpus, affinity, strict=False))
        if found and found != {thread}
    )
