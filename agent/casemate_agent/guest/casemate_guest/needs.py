"""What containers need of their guest: devices, huge pages, CPUs of their own."""

from __future__ import annotations

import contextlib
import json
import os

from .amounts import HUGE_PAGES, all_containers, amounts, format_cpus, own_cpus, pages_of, parse_amount, parse_cpus
from .children import BASE_ENV, run
from .files import log, read_text, write_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .children import Ended
    from .containers import Container, Pod
    from .frames import Message
    from .pods import Pods

CDI_VERSION = "0.5.0"  # the first in which a node may have another path on the host; podman reads it from 4.1 on
NVIDIA = "nvidia.com/gpu"
# How devices of a kind are found and what a container of one gets. A guest's own, of the same form, are files in
# /etc/casemate/devices.d. ``nodes`` belong to one device, ``shared`` and ``mounts`` (globs of files) to any of them.
# In their text {n} is the device's place in the order of PCI addresses, {minor} the number that its driver gave it,
# {render} and {card} its nodes of the kernel's graphics drivers. A recipe without a vendor is one device, declared.
RECIPES: tuple[Message, ...] = (
    {
        "kind": NVIDIA,
        "vendor": "0x10de",
        "class": "0x03",
        "nodes": ["/dev/nvidia{minor}"],
        "shared": ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"],
        "mounts": [
            "/usr/lib/x86_64-linux-gnu/libcuda.so*",
            "/usr/lib/x86_64-linux-gnu/libnvidia-*.so*",
            "/usr/bin/nvidia-smi",
        ],
    },
    {
        "kind": "amd.com/gpu",
        "vendor": "0x1002",
        "class": "0x03",
        "nodes": ["/dev/dri/{render}", "/dev/dri/{card}"],
        "shared": ["/dev/kfd"],
    },
    {"kind": "intel.com/gpu", "vendor": "0x8086", "class": "0x03", "nodes": ["/dev/dri/{render}", "/dev/dri/{card}"]},
)


class Lacking(Exception):
    """The guest does not have what a pod asks for. ``reason`` is the word for the pod's state."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Needs:
    """Gives pods what their manifests ask of the guest, by changing the manifests into what podman understands.

    Devices go by the Container Device Interface: what is in the guest is written down as specifications (by nvidia-ctk
    where the image has it, else by recipes), and a number of devices becomes as many names, each given once. Huge pages
    are reserved with the kernel, and a volume of them is a hugetlbfs that is mounted here. CPUs of its own are set on a
    container before it starts, and then taken from everybody else by a partition of the kernel's cpusets.
    """

    def __init__(self, pods: Pods) -> None:
        self.pods, self.loop, self.paths = pods, pods.loop, pods.paths
        self._missing: dict[str, str] = {}  # kind -> why a device of it that is there cannot be given

    async def give(self, pod: Pod, manifest: Message) -> bool:
        """Change ``manifest``; whether its containers must not be started before `pin`. Raises Lacking."""
        spec = manifest["spec"]
        await self._pages(pod, spec)
        named = self._annotated(manifest)
        if named or any("/" in key for c in all_containers(spec) for key in amounts(c, "limits")):
            await self.write_specifications()
            self._devices(pod, spec, named)
        self._cpus(pod, spec)
        for container in all_containers(spec):
            for key in HUGE_PAGES:
                amounts(container, "limits").pop(key, None)
                amounts(container, "requests").pop(key, None)
        return any(c.cpus for c in pod.containers.values())

    async def again(self, pod: Pod) -> None:
        """Before a container is started once more, maybe in another boot: what it needs is there. Raises Lacking."""
        spec = pod.spec()
        await self._pages(pod, json.loads(json.dumps(spec)), mounted=True)
        if any(c.devices for c in pod.containers.values()):
            await self.write_specifications()

    async def take_back(self, pod: Pod) -> None:
        """The pod is gone: so are its volumes of huge pages, and the pages."""
        folder = f"{self.paths.run}/hugepages/{pod.name}"
        if os.path.isdir(folder):
            for name in os.listdir(folder):
                for _ in range(5):  # what podman leaves of a container may hold it for a moment yet
                    if (await run(self.loop, ["umount", f"{folder}/{name}"])).code == 0:
                        break
                    await self.loop.sleep(1.0)
                with contextlib.suppress(OSError):
                    os.rmdir(f"{folder}/{name}")
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        for key in HUGE_PAGES:
            self._pool(key, 0)

    # Devices.

    def _annotated(self, manifest: Message) -> list[str]:
        """Names of devices for all containers of a pod, from its annotations; podman does not read those."""
        annotations = manifest["metadata"].get("annotations") or {}
        values = [str(value) for key, value in annotations.items() if key.startswith("cdi.k8s.io/")]
        return [name.strip() for value in values for name in value.split(",") if name.strip()]

    def _devices(self, pod: Pod, spec: Message, named: list[str]) -> None:
        known = self.known_devices()
        others = {d for p in self.pods.pods.values() if p is not pod for c in p.containers.values() for d in c.devices}
        given: set[str] = set()
        for container in all_containers(spec):
            limits, requests = amounts(container, "limits"), amounts(container, "requests")
            if named:
                limits = container.setdefault("resources", {}).setdefault("limits", limits)
            limits.update(dict.fromkeys(named, 1))
            mine: list[str] = []
            for key in [k for k in limits if "/" in k and "=" not in k]:
                count = int(parse_amount(limits.pop(key)))
                requests.pop(key, None)
                free = [d for d in known.get(key, ()) if d not in others and d not in given and d not in mine]
                if len(free) < count:
                    told = (
                        self._missing.get(key) or f"this guest has {len(known.get(key, ()))}, {len(free)} of them free"
                    )
                    raise Lacking("DeviceUnavailable", f"{container['name']}: {count} of {key} asked: {told}")
                mine += free[:count]
            for key in [k for k in limits if "=" in k]:
                kind = key.partition("=")[0]
                if kind in self._missing and kind not in known:
                    raise Lacking("DeviceUnavailable", f"{container['name']}: {key} asked: {self._missing[kind]}")
            limits.update(dict.fromkeys(mine, 1))
            record = pod.containers.get(container["name"])
            if record is not None:  # an init container has ended before the others begin: they may have the same
                record.devices = mine
                given.update(mine)

    def known_devices(self) -> dict[str, list[str]]:
        """Qualified names of the guest's devices by kind, but for "all". YAML is read as far as its lines tell."""
        found: dict[str, list[str]] = {}
        for folder in (self.paths.cdi, self.paths.run_cdi):
            for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                text = read_text(f"{folder}/{file}", 4 << 20)
                if file.endswith(".json"):
                    try:
                        specification = json.loads(text)
                        kind = str(specification["kind"])
                        names = [str(device["name"]) for device in specification["devices"]]
                    except (ValueError, KeyError, TypeError):
                        continue
                elif file.endswith((".yaml", ".yml")):
                    lines = [line.strip().removeprefix("- ").partition(":") for line in text.splitlines()]
                    kind = next((value.strip(" \"'") for key, _, value in lines if key == "kind"), "")
                    names = [value.strip(" \"'") for key, _, value in lines if key == "name"]
                else:
                    continue
                known = found.setdefault(kind, [])
                known += [f"{kind}={name}" for name in names if name != "all" and f"{kind}={name}" not in known]
        return found

    async def write_specifications(self) -> None:
        """Write down what this guest has now, one file for each kind. Somebody else's specification of a kind stands."""
        self._missing = {}
        os.makedirs(self.paths.cdi, exist_ok=True)
        mine = {f for f in os.listdir(self.paths.cdi) if f.startswith("casemate-")}
        devices = self._pci_devices()
        written: set[str] = set()
        tool = next(
            (f"{p}/nvidia-ctk" for p in BASE_ENV["PATH"].split(":") if os.access(f"{p}/nvidia-ctk", os.X_OK)), ""
        )
        if tool and any(vendor == "0x10de" and code.startswith("0x03") for _, vendor, _, code in devices):
            path = f"{self.paths.cdi}/casemate-nvidia-ctk.json"
            ended = await run(
                self.loop, [tool, "cdi", "generate", "--format=json", f"--output={path}"], timeout_s=120.0
            )
            if ended.code == 0:
                written.add("casemate-nvidia-ctk.json")
            else:
                self._missing[NVIDIA] = f"nvidia-ctk: {ended.reason()}"
        for file in mine - written:
            with contextlib.suppress(OSError):
                os.unlink(f"{self.paths.cdi}/{file}")
        taken = {*self.known_devices(), *self._missing}
        found: dict[str, Message] = {}
        for recipe in (*RECIPES, *self._recipes()):
            if recipe["kind"] not in taken:
                self._cook(recipe, devices, found)
        for kind, specification in found.items():
            file = f"casemate-{kind.replace('/', '-')}.json"
            write_text(f"{self.paths.cdi}/.{file}.new", json.dumps(specification))
            os.replace(f"{self.paths.cdi}/.{file}.new", f"{self.paths.cdi}/{file}")

    def _pci_devices(self) -> list[tuple[str, str, str, str]]:
        """(address, vendor, device, class) of each function, by address."""
        folder = f"{self.paths.sys}/bus/pci/devices"
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []

        def word(name: str, which: str) -> str:
            return read_text(f"{folder}/{name}/{which}", 16).strip()

        return [(name, word(name, "vendor"), word(name, "device"), word(name, "class")) for name in names]

    def _recipes(self) -> list[Message]:
        """Those that the guest's image declares."""
        folder, found = self.paths.recipes, []
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            try:
                recipe = json.loads(read_text(f"{folder}/{file}"))
                vendor, _, name = recipe["kind"].partition("/")
                if not vendor or not name or not isinstance(recipe.get("nodes", []), list):
                    raise ValueError("no kind vendor/class, or nodes are no list")
                found.append(recipe)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log(f"{folder}/{file} is no recipe: {error!r}")
        return found

    def _cook(self, recipe: Message, pci: list[tuple[str, str, str, str]], found: dict[str, Message]) -> None:
        """Add the devices of one recipe to the specification of its kind."""
        kind = recipe["kind"]
        if "vendor" in recipe:
            wanted = recipe["vendor"], recipe.get("device", ""), recipe.get("class", "")
            places = [
                a
                for a, vendor, device, code in pci
                if vendor == wanted[0] and device.startswith(wanted[1]) and code.startswith(wanted[2])
            ]
        else:
            places = [""]
        made: list[Message] = []
        for n, address in enumerate(places):
            words = self._words(n, address)
            nodes = [self._node(node, words) for node in recipe.get("nodes", ())]
            absent = [node["hostPath"] for node in nodes if not self._there(node["hostPath"])]
            if absent:
                self._missing[kind] = f"{absent[0]} of {address or kind} is not there: is its driver loaded?"
                continue
            made.append({"name": str(n), "containerEdits": {"deviceNodes": nodes}})
        if not made:
            return
        self._missing.pop(kind, None)
        shared = [self._node(node, {}) for node in recipe.get("shared", ())]
        edits: Message = {"deviceNodes": [node for node in shared if self._there(node["hostPath"])]}
        edits["mounts"] = [
            {"hostPath": path, "containerPath": path, "options": ["ro", "nosuid", "nodev", "bind"]}
            for pattern in recipe.get("mounts", ())
            for path in self._glob(pattern)
        ]
        edits["env"] = [str(pair) for pair in recipe.get("env", ())]
        every = [node for device in made for node in device["containerEdits"]["deviceNodes"]]
        made.append({"name": "all", "containerEdits": {"deviceNodes": every}})
        kept = {key: value for key, value in edits.items() if value}
        found[kind] = {"cdiVersion": CDI_VERSION, "kind": kind, "devices": made, "containerEdits": kept}

    def _words(self, n: int, address: str) -> dict[str, str]:
        told = read_text(f"{self.paths.proc}/driver/nvidia/gpus/{address}/information") if address else ""
        minor = next((line.split()[-1] for line in told.splitlines() if line.startswith("Device Minor")), str(n))
        words = {"{n}": str(n), "{minor}": minor}
        folder = f"{self.paths.sys}/bus/pci/devices/{address}/drm"
        for name in sorted(os.listdir(folder)) if address and os.path.isdir(folder) else ():
            for prefix, word in (("renderD", "{render}"), ("card", "{card}")):
                if name.startswith(prefix):
                    words[word] = name
        return words

    @staticmethod
    def _node(node: Any, words: Mapping[str, str]) -> Message:
        path, source = (
            (node, node) if isinstance(node, str) else (str(node["path"]), str(node.get("from", node["path"])))
        )
        for word, text in words.items():
            path, source = path.replace(word, text), source.replace(word, text)
        return {"path": path, "hostPath": source}

    def _there(self, path: str) -> bool:
        return os.path.exists(f"{self.paths.root}{path}")

    def _glob(self, pattern: str) -> list[str]:
        import fnmatch  # here, since few guests need it

        folder, _, name = pattern.rpartition("/")
        where = f"{self.paths.root}{folder}"
        names = sorted(os.listdir(where)) if os.path.isdir(where) else []
        return [f"{folder}/{found}" for found in names if fnmatch.fnmatchcase(found, name)]

    # Huge pages.

    async def _pages(self, pod: Pod, spec: Message, mounted: bool = False) -> None:
        held = pages_of(spec)
        for key, count in held.items():
            self._pool(key, count, pod)
        for volume in spec.get("volumes") or ():
            empty = volume.get("emptyDir") or {}
            medium = str(empty.get("medium") or "")
            if not medium.startswith("HugePages"):
                continue
            key = f"hugepages-{medium[10:]}" if medium[10:] else next(iter(held))
            folder = f"{self.paths.run}/hugepages/{pod.name}/{volume['name']}"
            is_mount = f" {folder} hugetlbfs " in read_text(self.paths.mounts)
            if is_mount and not mounted:
                await run(self.loop, ["umount", folder])
            if not is_mount or not mounted:
                limit = int(parse_amount(empty.get("sizeLimit") or held[key] * HUGE_PAGES[key][1]))
                os.makedirs(folder, mode=0o755, exist_ok=True)
                options = f"pagesize={HUGE_PAGES[key][2]},size={limit},mode=0777"
                ended = await run(self.loop, ["mount", "-t", "hugetlbfs", "-o", options, "casemate", folder])
                if ended.code != 0:
                    raise Lacking("HugePagesUnavailable", f"volume {volume['name']}: {ended.reason()}")
            del volume["emptyDir"]
            volume["hostPath"] = {"path": folder, "type": "Directory"}

    def _pool(self, key: str, count: int, pod: Pod | None = None) -> None:
        """Have the kernel keep as many pages as all pods hold, and what it kept when the guest booted. Raises Lacking."""
        folder = f"{self.paths.sys}/kernel/mm/hugepages/{HUGE_PAGES[key][0]}"
        path, floor_path = f"{folder}/nr_hugepages", f"{self.paths.run}/{key}.floor"
        others = [pages_of(p.spec()).get(key, 0) for p in self.pods.pods.values() if p is not pod and p.maybe_there]
        now = read_text(path, 32).strip()
        if not count and not os.path.exists(floor_path):
            return
        if not now.isdigit():
            raise Lacking("HugePagesUnavailable", f"{key}: this guest's processor or kernel has no such pages")
        if not os.path.exists(floor_path):
            write_text(floor_path, now)
        wanted = max(int(read_text(floor_path) or 0), count + sum(others))
        for again in (False, True):
            if again:
                write_text(f"{self.paths.proc}/sys/vm/compact_memory", "1")
            if int(now) != wanted:
                write_text(path, str(wanted))
                now = read_text(path, 32).strip() or "0"
            if not now.isdigit() or int(now) >= wanted or not count:
                break
        if count and (not now.isdigit() or int(now) < wanted):
            had = max(0, (int(now) if now.isdigit() else 0) - sum(others))
            raise Lacking("HugePagesUnavailable", f"{key}: {count} pages asked, the guest's memory yields {had}")

    # CPUs.

    def _cpus(self, pod: Pod, spec: Message) -> None:
        online = parse_cpus(read_text(f"{self.paths.sys}/devices/system/cpu/online"))
        taken = {n for p in self.pods.pods.values() if p is not pod for c in p.containers.values() for n in c.cpus}
        for container in spec["containers"]:
            count = own_cpus(spec, container)
            free = sorted(online - taken)
            if count and count >= len(free):
                told = f"{len(online)} are online, {len(online & taken)} belong to others, and one stays with the guest"
                raise Lacking("CpusUnavailable", f"{container['name']}: {count} CPUs for itself asked: {told}")
            mine = free[len(free) - count :] if count else []  # the last ones: interrupts and boot like the first
            taken.update(mine)
            pod.containers[container["name"]].cpus = mine

    async def pin(self, pod: Pod) -> Ended | None:
        """Between the making of containers and their start: podman keeps the set for every later start too. What failed,
        or None."""
        for container in pod.containers.values():
            if container.cpus:
                words = ["update", "--cpuset-cpus", format_cpus(set(container.cpus)), f"{pod.name}-{container.name}"]
                ended = await self.pods.podman.run(words)
                if ended.code != 0:
                    return ended
        return None

    def started(self, pod: Pod, container: Container) -> None:
        """A container runs: bound what it may have of huge pages, and take its CPUs from everybody else."""
        specs = [c for c in pod.spec().get("containers", ()) if c["name"] == container.name]
        limits = amounts(specs[0], "limits") if specs else {}
        pages = {key: int(parse_amount(limits[key])) for key in HUGE_PAGES if key in limits}
        if not container.cpus and not pages:
            return
        try:
            told = read_text(f"{self.paths.proc}/{self.pods.pid_of(container)}/cgroup")
        except LookupError:
            return  # it has ended already
        where = next((line[3:] for line in told.splitlines() if line.startswith("0::/")), "")
        parts = where.strip("/").split("/")
        depth = next((i + 1 for i, part in enumerate(parts) if part.endswith(container.id) and container.id), 0)
        if not depth:
            return
        for key, limit in pages.items():
            # without the controller its volumes are bounded still, by their size
            write_text(f"{self.paths.cgroup}/{'/'.join(parts[:depth])}/hugetlb.{HUGE_PAGES[key][3]}.max", str(limit))
        if container.cpus:
            problem = self._partition(pod, container, parts[:depth])
            if problem:
                text = (
                    f"CPUs {format_cpus(set(container.cpus))} are its own, but others are not kept off them: {problem}"
                )
                self.pods.helper.note(pod.name, container.name, "CpusNotExclusive", text, "Warning")

    def _partition(self, pod: Pod, container: Container, parts: list[str]) -> str:
        """Make the container's cgroup a partition (cgroup v2, "cpuset.cpus.partition"): its CPUs are in nobody else's set.

        Each cgroup above must hand them on first: the pod's those of its containers, the ones above those of all pods.
        """
        everybody = {n for p in self.pods.pods.values() for c in p.containers.values() for n in c.cpus}
        of_pod = {n for c in pod.containers.values() for n in c.cpus}
        path = self.paths.cgroup
        for level, part in enumerate(parts):
            path = f"{path}/{part}"
            left = len(parts) - 1 - level
            cpus = set(container.cpus) if not left else of_pod if left == 1 else everybody
            if not write_text(f"{path}/cpuset.cpus.exclusive", format_cpus(cpus)):
                return f"{part} takes no cpuset.cpus.exclusive (Linux 6.7 and later have it)"
        if not write_text(f"{path}/cpuset.cpus.partition", "root"):
            return f"{parts[-1]} takes no partition"
        state = read_text(f"{path}/cpuset.cpus.partition").strip()
        return "" if state == "root" else state
