"""What a manifest asks for: quantities, huge pages, CPUs."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .frames import Message

# Resource -> folder of the pool in sysfs, bytes of a page, the page size as mount(8) and the cgroup's files have it.
HUGE_PAGES = {
    "hugepages-2Mi": ("hugepages-2048kB", 2 << 20, "2M", "2MB"),
    "hugepages-1Gi": ("hugepages-1048576kB", 1 << 30, "1G", "1GB"),
}


def amounts(container: Message, which: str) -> Message:
    """Limits or requests of a container, to be read and changed."""
    found = (container.get("resources") or {}).get(which)
    return found if isinstance(found, dict) else {}


def parse_amount(value: Any) -> float:
    """A quantity of Kubernetes as a number; of what was checked by the manager already."""
    units = {
        "m": 1e-3,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
        "Ki": 2.0**10,
        "Mi": 2.0**20,
        "Gi": 2.0**30,
        "Ti": 2.0**40,
    }
    text = str(value)
    number = text.rstrip("mkMGTi" + "K")
    return float(number) * units.get(text[len(number) :], 1.0)


def all_containers(spec: Message) -> list[Message]:
    """Init containers and containers of a pod."""
    return [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]


def pages_of(spec: Message) -> dict[str, int]:
    """Pages of each size that a pod holds: those of its containers, or of an init container that has more."""
    held = {}
    for key, (_, size, *_) in HUGE_PAGES.items():
        once = [int(parse_amount(amounts(c, "limits").get(key, 0))) // size for c in spec.get("containers") or ()]
        before = [int(parse_amount(amounts(c, "limits").get(key, 0))) // size for c in spec.get("initContainers") or ()]
        if total := max([sum(once), *before]):
            held[key] = total
    return held


def own_cpus(spec: Message, container: Message) -> int:
    """CPUs that a container has for itself, as under the kubelet's static policy: whole ones of a Guaranteed pod."""
    for other in all_containers(spec):
        limits, requests = amounts(other, "limits"), amounts(other, "requests")
        for key in ("cpu", "memory"):
            limit = parse_amount(limits.get(key, 0))
            if limit <= 0 or parse_amount(requests.get(key, limits[key])) != limit:
                return 0
    wanted = parse_amount(amounts(container, "limits")["cpu"])
    return int(wanted) if wanted == int(wanted) else 0


def parse_cpus(text: str) -> set[int]:
    """A list of CPUs as the kernel writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            found.update(range(int(first), int(last or first) + 1))
    return found


def format_cpus(cpus: set[int]) -> str:
    """The same, without ranges: every reader of such lists takes it."""
    return ",".join(map(str, sorted(cpus)))
