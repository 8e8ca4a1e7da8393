"""What the pods of an environment ask of their VM: devices, huge pages, CPUs of their own. PURE.

What may live here: reading `resources` of a checked manifest, the rules between those fields, and the comparison with
what the VM has. How the guest gives them is the helper's (`casemate_agent.guest`).

Theory of operation. Words and rules are those of Kubernetes. An extended resource (`nvidia.com/gpu: 2`) is a number of
devices of one kind of the Container Device Interface; `nvidia.com/gpu=all` names one outright. Huge pages are asked for by
size. A pod whose containers all have requests equal to limits, for CPU and memory, is *Guaranteed*; a container of such
a pod that asks for whole CPUs has them for itself, as under the kubelet's static CPU manager policy. One CPU at least
stays with the guest: its own processes and the other containers need somewhere to run.

Only GPUs are counted against the VM when it is applied, for `gpus:` of an environment says how many there are. What else a
guest has depends on its image, so the guest says whether it is there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from casemate_core.errors import Violation, shown
from casemate_core.quantity import BadQuantity, format_bytes, parse_bytes, parse_millicpus

#: ``vendor.example/class``, and the same with ``=name``: the qualified names of the Container Device Interface.
DEVICE_KEY = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?/[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?"
    r"(=[A-Za-z0-9]([A-Za-z0-9_.:-]{0,62}[A-Za-z0-9])?)?\Z",
    re.ASCII,
)
#: Annotation of a pod whose value names devices for all its containers, as container runtimes read it.
CDI_ANNOTATION = "cdi.k8s.io/"
#: Resource of each size of huge pages, and the size in bytes.
HUGE_PAGES: Mapping[str, int] = {"hugepages-2Mi": 2 << 20, "hugepages-1Gi": 1 << 30}
MEDIUM = "HugePages"
#: What of its memory a guest must keep as ordinary pages: kernel, container runtime, helper.
MIN_PLAIN_MIB = 64
MAX_DEVICES = 64
_GPU_CLASSES = re.compile(r"(gpu|vgpu|mig-[0-9a-z.+]+)\Z", re.ASCII)


def is_device(key: str) -> bool:
    """Whether a resource's name asks for a device."""
    return bool(DEVICE_KEY.match(key))


def is_gpu(key: str) -> bool:
    """Whether a device is a GPU or a part of one."""
    return bool(_GPU_CLASSES.match(key.partition("=")[0].partition("/")[2]))


def check_resources(path: str, container: Mapping[str, Any]) -> Iterator[Violation]:
    """Rules between requests and limits of one container, whose values have been checked one by one."""
    limits, requests = _amounts(container, "limits"), _amounts(container, "requests")
    for key in sorted({*limits, *requests}):
        if key not in HUGE_PAGES and not is_device(key):
            continue
        here = f"{path}.resources.limits.{key}"
        if key not in limits:
            yield Violation(here, "", "is missing, and requests ask for it", "write the same amount as a limit")
            continue
        amount = _number(limits[key])
        if key in requests and _number(requests[key]) != amount:
            yield Violation(
                f"{path}.resources.requests.{key}",
                shown(requests[key]),
                "differs from its limit, and is never shared",
                f"write {shown(limits[key])}, or leave it out",
            )
        if key in HUGE_PAGES and amount % HUGE_PAGES[key]:
            size = HUGE_PAGES[key]
            whole = format_bytes(-(-amount // size) * size)
            yield Violation(here, shown(limits[key]), "is not a whole number of pages", f"write {whole}")
        if is_device(key) and amount > MAX_DEVICES:
            yield Violation(here, shown(limits[key]), "is out of range", f"write 0 to {MAX_DEVICES}")
        if "=" in key and amount != 1:
            yield Violation(here, shown(limits[key]), "names a device, which is there once", "write 1")


def check_annotations(path: str, manifest: Mapping[str, Any]) -> Iterator[Violation]:
    """Names of devices in the annotations of a pod."""
    for key, value in _mapping(_mapping(manifest.get("metadata")).get("annotations")).items():
        if isinstance(key, str) and key.startswith(CDI_ANNOTATION) and isinstance(value, str):
            for name in value.split(","):
                if "=" not in name or not is_device(name.strip()):
                    yield Violation(
                        f"{path}.metadata.annotations[{shown(key)}]",
                        shown(name),
                        "is not the qualified name of a device",
                        "write vendor/class=name, for example nvidia.com/gpu=all",
                    )


def check_volumes(path: str, manifest: Mapping[str, Any]) -> Iterator[Violation]:
    """A volume of huge pages needs a size, and a container that may use pages of it."""
    spec = _mapping(manifest.get("spec"))
    sizes = {key for c in _containers(spec) for key in _amounts(c, "limits") if key in HUGE_PAGES}
    volumes = spec.get("volumes")
    for i, volume in enumerate(volumes if isinstance(volumes, Sequence) and not isinstance(volumes, str) else ()):
        medium = _mapping(_mapping(volume).get("emptyDir")).get("medium")
        if not isinstance(medium, str) or not medium.startswith(MEDIUM):
            continue
        here = f"{path}.spec.volumes[{i}].emptyDir.medium"
        if medium == MEDIUM:
            if len(sizes) != 1:
                yield Violation(
                    here,
                    medium,
                    f"names no size, and the pod uses {len(sizes)}",
                    "write HugePages-2Mi or HugePages-1Gi",
                )
        elif f"hugepages-{medium.removeprefix(MEDIUM + '-')}" not in sizes:
            key = f"hugepages-{medium.removeprefix(MEDIUM + '-')}"
            yield Violation(
                here, medium, "needs pages, and no container asks for them", f"give one resources.limits.{key}"
            )


def check_against_vm(
    path: str, pods: Sequence[Mapping[str, Any]], *, gpus: int, cpus: int, memory_mib: int
) -> Iterator[Violation]:
    """What the pods, sound by themselves, ask together and the VM does not have."""
    used_gpus = used_cpus = used_bytes = 0
    for i, manifest in enumerate(pods):
        for here, container, before in _places(f"{path}[{i}]", manifest["spec"]):
            for key, raw in _amounts(container, "limits").items():
                amount = _number(raw)
                if is_device(key) and is_gpu(key) and amount:
                    # a device by name may be had by several: it only has to be there
                    total = (0 if before else used_gpus) + (0 if "=" in key else amount)
                    if total > gpus or not gpus:
                        yield Violation(
                            f"{here}.{key}",
                            str(amount),
                            f"asks for GPU {total or 1} of a VM that has {gpus}",
                            "raise spec.gpus, or ask for fewer",
                        )
                    used_gpus = used_gpus if before else total
                elif key in HUGE_PAGES:
                    total = (0 if before else used_bytes) + amount
                    if total > (memory_mib - MIN_PLAIN_MIB) << 20:
                        yield Violation(
                            f"{here}.{key}",
                            shown(raw),
                            f"brings the huge pages of all pods to {format_bytes(total)}, "
                            f"and the VM of {memory_mib} MiB keeps {MIN_PLAIN_MIB} MiB for itself",
                            "raise spec.memory.size, or ask for fewer",
                        )
                    used_bytes = used_bytes if before else total
            if not before and (own := exclusive_cpus(manifest, container)):
                used_cpus += own
                if used_cpus >= cpus:
                    yield Violation(
                        f"{here}.cpu",
                        shown(container["resources"]["limits"]["cpu"]),
                        f"brings the CPUs that containers have for themselves to {used_cpus}, and a VM of {cpus} "
                        "keeps one for all else",
                        f"write spec.cpu.count: {used_cpus + 1}, or a request below the limit",
                    )


def _places(path: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """(path of its limits, container, whether it runs before the others and leaves them what it had)."""
    for group in ("initContainers", "containers"):
        for j, container in enumerate(spec.get(group) or ()):
            yield f"{path}.spec.{group}[{j}].resources.limits", container, group == "initContainers"


def exclusive_cpus(manifest: Mapping[str, Any], container: Mapping[str, Any]) -> int:
    """CPUs that a container of a sound manifest has for itself: whole ones, in a pod that is Guaranteed."""
    containers = _containers(manifest["spec"])
    if not all(_guaranteed(c) for c in containers):
        return 0
    milli = parse_millicpus(_text(_amounts(container, "limits")["cpu"]))
    return milli // 1000 if milli % 1000 == 0 else 0


def _guaranteed(container: Mapping[str, Any]) -> bool:
    limits, requests = _amounts(container, "limits"), _amounts(container, "requests")
    for key, parse in (("cpu", parse_millicpus), ("memory", parse_bytes)):
        if key not in limits or parse(_text(limits[key])) <= 0:
            return False
        # Kubernetes fills in a request that is not given with the limit.
        if key in requests and parse(_text(requests[key])) != parse(_text(limits[key])):
            return False
    return True


def _containers(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = (spec.get("initContainers"), spec.get("containers"))
    return [c for group in groups if isinstance(group, Sequence) for c in group if isinstance(c, Mapping)]


def _amounts(container: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    return _mapping(_mapping(container.get("resources")).get(which))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number(value: Any) -> int:
    """An amount in bytes or pieces. Only of values that have been checked; 0 for others, which are told by their path."""
    try:
        return parse_bytes(_text(value))
    except BadQuantity:
        return 0
