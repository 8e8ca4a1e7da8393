"""Devices, huge pages and CPUs of their own for containers, by the helper as a process; podman is played.

``root`` stands for the guest: its sysfs, its device nodes, its recipes are files there. mount and umount are scripts that
keep the table of mounts.
"""

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from casemate_agent.guest.casemate_guest.amounts import format_cpus, own_cpus, parse_amount, parse_cpus
from casemate_core.spec import podresources
from support.guest_bench import RealGuestBench
from support.guest_bench import pod as simple_pod

SLEEP = ("/bin/sh", "-c", "exec sleep 1000")
NVIDIA = "0x10de", "0x2335", "0x030200"


class Machine(RealGuestBench):
    """A guest whose hardware a test writes."""

    def put(self, path: str, text: str = "") -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def card(self, address: str, identity: tuple[str, str, str] = NVIDIA, minor: int | None = None) -> None:
        for name, text in zip(("vendor", "device", "class"), identity, strict=True):
            self.put(f"sys/bus/pci/devices/{address}/{name}", f"{text}\n")
        if minor is not None:
            self.put(
                f"proc/driver/nvidia/gpus/{address}/information", f"Model: \t\t NVIDIA\nDevice Minor: \t {minor}\n"
            )

    def programs(self) -> None:
        mounts = self.put("proc/self/mounts")
        self._program("mount", f'for last; do :; done; echo "casemate $last hugetlbfs $4" >> {mounts}')
        self._program("umount", f'grep -vF "$1" {mounts} > {mounts}.new; cp {mounts}.new {mounts}')

    def played(self, name: str) -> dict[str, Any]:
        """What podman was given."""
        found: dict[str, Any] = json.loads(self.read(f"fake/played-{name}.json"))
        return found

    def cgroup(self, pod_name: str, container: str = "app") -> Path:
        for folder in (self.root / "fake/containers").iterdir():
            facts = json.loads((folder / "facts.json").read_text())
            if facts["Name"] == f"{pod_name}-{container}":
                return self.root / f"sys/fs/cgroup/libpod_parent/{pod_name}/libpod-{facts['Id']}"
        raise LookupError(pod_name)

    async def reboot(self) -> None:
        """The helper begins in another boot of its guest, in which no container runs yet."""
        for folder in (self.root / "fake/containers").iterdir():
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
        assert self.process is not None
        self.process.kill()
        await self.process.wait()
        state = json.loads(self.read("var/lib/casemate/guest.json"))
        self.put("var/lib/casemate/guest.json", json.dumps(state | {"boot": "another"}))
        await self.end_agent()
        await self._start_helper()
        await self.start_agent()


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Machine]:
    made = Machine(tmp_path)
    try:
        await made.boot()
        made.programs()
        await made.start_agent()
        yield made
    finally:
        await made.close()


def pod(name: str, limits: dict[str, Any], *, volumes: Any = (), annotations: Any = None) -> dict[str, Any]:
    made = simple_pod(name, *SLEEP)
    made["spec"]["containers"][0]["resources"] = {"limits": limits}
    made["spec"]["volumes"] = list(volumes)
    made["spec"]["containers"][0]["volumeMounts"] = [{"name": v["name"], "mountPath": "/v"} for v in volumes]
    if annotations:
        made["metadata"]["annotations"] = annotations
    return made


def limits_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["containers"][0]["resources"]["limits"]
    return found


async def refused(guest: Machine, name: str, reason: str) -> str:
    state = await guest.until(lambda: (p := guest.pod(name)) and p.reason == reason and p)
    assert state and state.phase == "Pending"
    notes = await guest.until(lambda: guest.notes(reason))
    assert notes[-1].severity == "Warning"
    return state.message


# --- devices ----------------------------------------------------------------------------------------------------------


async def test_a_number_of_gpus_becomes_as_many_names_each_given_once(guest: Machine) -> None:
    guest.card("0000:02:00.0", minor=1)
    guest.card("0000:01:00.0", minor=0)
    guest.card("0000:03:00.0", ("0x8086", "0x1234", "0x020000"))
    for node in ("nvidia0", "nvidia1", "nvidiactl"):
        guest.put(f"dev/{node}")
    guest.put("usr/lib/x86_64-linux-gnu/libcuda.so.1")
    await guest.apply("1", pod("one", {"nvidia.com/gpu": 1}), pod("two", {"nvidia.com/gpu": "1"}))
    await guest.ready("one")
    await guest.ready("two")
    given = [*limits_of(guest.played("one")), *limits_of(guest.played("two"))]
    assert sorted(given) == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    specification = json.loads(guest.read("etc/cdi/casemate-nvidia.com-gpu.json"))
    assert (specification["kind"], specification["cdiVersion"]) == ("nvidia.com/gpu", "0.5.0")
    nodes = {d["name"]: [n["path"] for n in d["containerEdits"]["deviceNodes"]] for d in specification["devices"]}
    assert nodes == {"0": ["/dev/nvidia0"], "1": ["/dev/nvidia1"], "all": ["/dev/nvidia0", "/dev/nvidia1"]}
    edits = specification["containerEdits"]
    assert [n["path"] for n in edits["deviceNodes"]] == ["/dev/nvidiactl"]
    assert [m["containerPath"] for m in edits["mounts"]] == ["/usr/lib/x86_64-linux-gnu/libcuda.so.1"]

    await guest.apply(
        "2", pod("one", {"nvidia.com/gpu": 1}), pod("two", {"nvidia.com/gpu": "1"}), pod("three", {"nvidia.com/gpu": 1})
    )
    told = await refused(guest, "three", "DeviceUnavailable")
    assert told == "app: 1 of nvidia.com/gpu asked: this guest has 2, 0 of them free"
    await guest.restart_helper()
    assert "1 of nvidia.com/gpu asked" in await refused(guest, "three", "DeviceUnavailable"), "who has what is kept"


async def test_a_device_whose_driver_is_not_there_is_said_by_its_node(guest: Machine) -> None:
    guest.card("0000:01:00.0")
    await guest.apply("1", pod("train", {"nvidia.com/gpu": 1}), pod("named", {"nvidia.com/gpu=all": 1}))
    told = await refused(guest, "train", "DeviceUnavailable")
    assert told == "app: 1 of nvidia.com/gpu asked: /dev/nvidia0 of 0000:01:00.0 is not there: is its driver loaded?"
    assert "nvidia.com/gpu=all asked: /dev/nvidia0" in await refused(guest, "named", "DeviceUnavailable")


async def test_what_podman_cannot_resolve_it_says(guest: Machine) -> None:
    await guest.apply("1", pod("train", {"example.com/npu=all": 1}))
    assert "unresolvable CDI devices example.com/npu=all" in await refused(guest, "train", "PlayFailed")


async def test_a_declared_recipe_and_annotations(guest: Machine) -> None:
    guest.put("dev/null")
    guest.put("etc/made.conf")
    recipe = {
        "kind": "example.com/npu",
        "nodes": [{"path": "/dev/npu{n}", "from": "/dev/null"}],
        "mounts": ["/etc/made.*"],
        "env": ["NPU=made"],
    }
    guest.put("etc/casemate/devices.d/npu.json", json.dumps(recipe))
    guest.put("etc/casemate/devices.d/bad.json", "{")
    await guest.apply("1", pod("infer", {}, annotations={"cdi.k8s.io/x": "example.com/npu=0"}))
    await guest.ready("infer")
    assert limits_of(guest.played("infer")) == {"example.com/npu=0": 1}
    specification = json.loads(guest.read("etc/cdi/casemate-example.com-npu.json"))
    assert specification["devices"][0]["containerEdits"]["deviceNodes"] == [
        {"path": "/dev/npu0", "hostPath": "/dev/null"}
    ]
    assert specification["containerEdits"]["env"] == ["NPU=made"]


async def test_render_nodes_come_from_the_graphics_driver(guest: Machine) -> None:
    guest.card("0000:01:00.0", ("0x1002", "0x740f", "0x038000"))
    for name in ("renderD129", "card1"):
        guest.put(f"sys/bus/pci/devices/0000:01:00.0/drm/{name}/dev")
        guest.put(f"dev/dri/{name}")
    guest.put("dev/kfd")
    await guest.apply("1", pod("infer", {"amd.com/gpu": 1}))
    await guest.ready("infer")
    specification = json.loads(guest.read("etc/cdi/casemate-amd.com-gpu.json"))
    nodes = [n["path"] for n in specification["devices"][0]["containerEdits"]["deviceNodes"]]
    assert nodes == ["/dev/dri/renderD129", "/dev/dri/card1"]
    assert [n["path"] for n in specification["containerEdits"]["deviceNodes"]] == ["/dev/kfd"]


async def test_nvidia_ctk_is_used_where_the_image_has_it_and_its_failure_is_told(guest: Machine) -> None:
    guest.card("0000:01:00.0")
    made = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": "GPU-1"}, {"name": "all"}]}
    answer = guest.put("answer.json", json.dumps(made))
    guest._program("nvidia-ctk", f'test "$1 $2 $3" = "cdi generate --format=json" && cp {answer} "${{4#--output=}}"')
    await guest.apply("1", pod("train", {"nvidia.com/gpu": 1}))
    await guest.ready("train")
    assert limits_of(guest.played("train")) == {"nvidia.com/gpu=GPU-1": 1}
    guest._program("nvidia-ctk", "echo no driver >&2; exit 1")
    await guest.apply("2", pod("other", {"nvidia.com/gpu": 1}))
    assert (await refused(guest, "other", "DeviceUnavailable")).endswith("nvidia-ctk: no driver")


async def test_a_specification_of_the_image_stands(guest: Machine) -> None:
    guest.card("0000:01:00.0")
    guest.put("dev/nvidia0")
    guest.put("etc/cdi/nvidia.yaml", 'cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: "7"\n- name: all\n')
    made = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": "7"}]}
    guest.put("etc/cdi/seen-by-the-played-podman.json", json.dumps(made))
    await guest.apply("1", pod("train", {"nvidia.com/gpu": 1}))
    await guest.ready("train")
    assert limits_of(guest.played("train")) == {"nvidia.com/gpu=7": 1}
    assert not [f for f in os.listdir(guest.root / "etc/cdi") if f.startswith("casemate-")]


# --- huge pages -------------------------------------------------------------------------------------------------------

POOL = "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
VOLUME = {"name": "pages", "emptyDir": {"medium": "HugePages-2Mi", "sizeLimit": "4Mi"}}


async def test_huge_pages_are_reserved_mounted_and_given_back(guest: Machine) -> None:
    guest.put(POOL, "3\n")
    await guest.apply("1", pod("a", {"hugepages-2Mi": "8Mi"}, volumes=[VOLUME]), pod("b", {"hugepages-2Mi": "4Mi"}))
    await guest.ready("a")
    await guest.ready("b")
    assert guest.read(POOL) == "6"
    folder = f"{guest.root}/run/casemate/hugepages/a/pages"
    assert guest.played("a")["spec"]["volumes"] == [
        {"name": "pages", "hostPath": {"path": folder, "type": "Directory"}}
    ]
    assert guest.read("proc/self/mounts") == f"casemate {folder} hugetlbfs pagesize=2M,size=4194304,mode=0777\n"
    assert (guest.cgroup("a") / "hugetlb.2MB.max").read_text() == str(8 << 20)
    assert limits_of(guest.played("a")) == {}, "podman knows nothing of them"

    await guest.reboot()
    await guest.until(lambda: guest.pod("a") and guest.container("a").restarts == 1 and guest.container("a").ready)
    assert guest.read("proc/self/mounts").count("hugetlbfs") == 1, "what is mounted is not mounted again"
    await guest.apply("2", pod("b", {"hugepages-2Mi": "4Mi"}))
    await guest.until(lambda: guest.pod("a") is None)
    assert guest.read("proc/self/mounts") == ""
    assert not (guest.root / "run/casemate/hugepages/a").exists()
    assert guest.read(POOL) == "3", "as many as the guest booted with"


async def test_huge_pages_that_the_guest_cannot_have(guest: Machine) -> None:
    await guest.apply("1", pod("a", {"hugepages-1Gi": "1Gi"}))
    told = await refused(guest, "a", "HugePagesUnavailable")
    assert told == "hugepages-1Gi: this guest's processor or kernel has no such pages"
    # a pool that takes what is written and has nothing of it afterwards
    guest.put(POOL, "0")
    (guest.root / "run/casemate/hugepages-2Mi.floor").write_text("0")
    full = guest.root / POOL
    full.unlink()
    full.symlink_to("/dev/null")
    await guest.apply("2", pod("b", {"hugepages-2Mi": "8Mi"}))
    assert "no such pages" in await refused(guest, "b", "HugePagesUnavailable")


async def test_a_volume_that_cannot_be_mounted_is_said(guest: Machine) -> None:
    guest.put(POOL, "0")
    guest._program("mount", "echo unknown filesystem type >&2; exit 32")
    await guest.apply("1", pod("a", {"hugepages-2Mi": "8Mi"}, volumes=[VOLUME]))
    assert await refused(guest, "a", "HugePagesUnavailable") == "volume pages: unknown filesystem type"


# --- CPUs -------------------------------------------------------------------------------------------------------------


def own(name: str, cpu: Any) -> dict[str, Any]:
    return pod(name, {"cpu": cpu, "memory": "64Mi"})


async def test_cpus_are_set_before_the_start_and_taken_from_all_others(guest: Machine) -> None:
    guest.put("sys/devices/system/cpu/online", "0-3\n")
    await guest.apply("1", own("a", 2), own("b", "500m"))
    await guest.ready("a")
    await guest.ready("b")
    calls = [line.split(" ", 1)[1] for line in guest.read("fake/calls").splitlines()]
    order = [calls.index(line) for line in ("update --cpuset-cpus 2,3 a-app", "pod start a")]
    assert order == sorted(order), "the set is there before the first start"
    cgroup = guest.cgroup("a")
    assert (cgroup / "cpuset.cpus").read_text() == "2,3"
    assert (cgroup / "cpuset.cpus.partition").read_text() == "root"
    assert [(c / "cpuset.cpus.exclusive").read_text() for c in (cgroup, *list(cgroup.parents)[:2])] == ["2,3"] * 3
    assert not (guest.cgroup("b") / "cpuset.cpus.exclusive").exists()

    await guest.apply("2", own("a", 2), own("b", "500m"), own("c", 1))
    await guest.ready("c")
    assert (guest.cgroup("c") / "cpuset.cpus").read_text() == "1"
    assert (cgroup.parent.parent / "cpuset.cpus.exclusive").read_text() == "1,2,3"

    await guest.apply("3", own("a", 2), own("c", 1), own("d", 1))
    told = await refused(guest, "d", "CpusUnavailable")
    assert told == "app: 1 CPUs for itself asked: 4 are online, 3 belong to others, and one stays with the guest"
    await guest.kill("a")
    await guest.until(lambda: guest.container("a").restarts == 1 and guest.container("a").ready)
    assert (guest.cgroup("a") / "cpuset.cpus.partition").read_text() == "root", "again after each start"
    assert guest.notes("CpusNotExclusive") == []


async def test_a_kernel_without_partitions_is_told_of(guest: Machine) -> None:
    guest.put("sys/devices/system/cpu/online", "0-1\n")
    guest.put("sys/fs/cgroup/libpod_parent/a/cpuset.cpus.exclusive/in-the-way")
    await guest.apply("1", own("a", 1))
    await guest.ready("a")
    (note,) = await guest.until(lambda: guest.notes("CpusNotExclusive"))
    assert (note.pod, note.severity) == ("a", "Warning")
    assert note.message.startswith("app: CPUs 1 are its own, but others are not kept off them")


@pytest.mark.parametrize(
    "limits",
    [{"cpu": 2, "memory": "1Gi"}, {"cpu": "2000m", "memory": "1Gi"}, {"cpu": 2}, {"cpu": "1.5", "memory": "1"}],
)
@pytest.mark.parametrize("requests", [{}, {"cpu": "2"}, {"cpu": 1}, {"memory": "1024Mi"}])
def test_helper_and_manager_agree_on_who_has_cpus_for_itself(limits: dict[str, Any], requests: dict[str, Any]) -> None:
    manifest = pod("a", limits)
    container = manifest["spec"]["containers"][0]
    container["resources"]["requests"] = requests
    assert own_cpus(manifest["spec"], container) == podresources.exclusive_cpus(manifest, container)


@pytest.mark.parametrize("text", ["1", "250m", "2.5", "64Mi", "1Gi", "3k", "5G", "0"])
def test_helper_and_manager_read_quantities_alike(text: str) -> None:
    if text.endswith("m"):
        assert parse_amount(text) == int(text[:-1]) / 1000
    elif "." in text:
        assert parse_amount(text) == float(text)
    else:
        assert parse_amount(text) == podresources._number(text)


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("0", {0}), ("", set()), ("x-2", set())])
def test_lists_of_cpus(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus
    assert parse_cpus(format_cpus(cpus)) == cpus
