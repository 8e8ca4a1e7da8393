"""What pods ask of their VM: words of Kubernetes, refusals by field path, and the sum against what the VM has."""

from typing import Any

import pytest

from casemate_core.spec.environment import Cpu, Environment, EnvironmentSpec, GpuSpec, Memory, check_environment
from casemate_core.spec.meta import Meta
from casemate_core.spec.pod import check_pod
from casemate_core.spec.podresources import exclusive_cpus, is_device, is_gpu
from casemate_wire.codec import environment as codec


def container(limits: Any = None, requests: Any = None, **fields: Any) -> dict[str, Any]:
    resources = {name: value for name, value in (("limits", limits), ("requests", requests)) if value is not None}
    return {"name": "app", "image": "localhost/app:1", "resources": resources} | fields


def pod(*containers: dict[str, Any], volumes: Any = None, annotations: Any = None) -> dict[str, Any]:
    named = [c | {"name": f"c{i}"} for i, c in enumerate(containers)]
    spec = {"containers": named} | ({"volumes": volumes} if volumes else {})
    metadata = {"name": "p"} | ({"annotations": annotations} if annotations else {})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def refusals(manifest: dict[str, Any]) -> list[str]:
    return [str(v) for v in check_pod("pod", manifest)]


LIMITS = "pod.spec.containers[0].resources.limits"


@pytest.mark.parametrize("key", ["nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "amd.com/gpu", "example.com/fpga=card0:1"])
def test_names_of_devices_are_those_of_cdi(key: str) -> None:
    assert is_device(key)
    assert refusals(pod(container({key: 1}))) == []


@pytest.mark.parametrize(
    "key", ["gpu", "nvidia.com/", "/gpu", "nvidia.com/gpu=", "podman.io/device=/dev/kmsg", "a b/c"]
)
def test_what_is_no_name_of_a_device_is_no_field(key: str) -> None:
    assert not is_device(key)
    (told,) = refusals(pod(container({key: 1})))
    assert "is not a supported Pod field" in told


def test_gpus_are_told_from_other_devices() -> None:
    assert [is_gpu(k) for k in ("nvidia.com/gpu", "nvidia.com/mig-3g.40gb", "nvidia.com/gpu=all")] == [True] * 3
    assert not is_gpu("intel.com/fec")


@pytest.mark.parametrize(
    ("limits", "requests", "told"),
    [
        ({"nvidia.com/gpu": -1}, None, f"{LIMITS}.nvidia.com/gpu: '-1' is not a whole number"),
        ({"nvidia.com/gpu": 1.5}, None, f"{LIMITS}.nvidia.com/gpu: '1.5' is not a whole number"),
        ({"nvidia.com/gpu": 65}, None, f"{LIMITS}.nvidia.com/gpu: '65' is out of range"),
        ({"nvidia.com/gpu=all": 2}, None, f"{LIMITS}.nvidia.com/gpu=all: '2' names a device, which is there once"),
        (None, {"nvidia.com/gpu": 1}, f"{LIMITS}.nvidia.com/gpu: is missing, and requests ask for it"),
        (
            {"nvidia.com/gpu": 2},
            {"nvidia.com/gpu": 1},
            "pod.spec.containers[0].resources.requests.nvidia.com/gpu: '1' differs from its limit",
        ),
        ({"hugepages-2Mi": "3Mi"}, None, f"{LIMITS}.hugepages-2Mi: '3Mi' is not a whole number of pages; write 4Mi"),
        ({"hugepages-4Mi": "4Mi"}, None, f"{LIMITS}.hugepages-4Mi: is not a supported Pod field"),
    ],
)
def test_unsound_resources_are_refused_by_path(limits: Any, requests: Any, told: str) -> None:
    (found,) = refusals(pod(container(limits, requests)))
    assert found.startswith(told), found


def test_annotations_name_devices_as_container_runtimes_read_them() -> None:
    assert refusals(pod(container(), annotations={"cdi.k8s.io/mine": "nvidia.com/gpu=0,nvidia.com/gpu=1"})) == []
    (told,) = refusals(pod(container(), annotations={"cdi.k8s.io/mine": "nvidia.com/gpu"}))
    assert "is not the qualified name of a device; write vendor/class=name" in told


def test_a_volume_of_huge_pages_needs_its_size_and_a_container_that_may_use_it() -> None:
    volumes = [{"name": "pages", "emptyDir": {"medium": "HugePages-2Mi"}}]
    assert refusals(pod(container({"hugepages-2Mi": "4Mi"}), volumes=volumes)) == []
    (told,) = refusals(pod(container(), volumes=volumes))
    assert told.startswith("pod.spec.volumes[0].emptyDir.medium: 'HugePages-2Mi' needs pages, and no container asks")
    either = [{"name": "pages", "emptyDir": {"medium": "HugePages"}}]
    assert refusals(pod(container({"hugepages-1Gi": "1Gi"}), volumes=either)) == []
    (told,) = refusals(pod(container({"hugepages-1Gi": "1Gi", "hugepages-2Mi": "2Mi"}), volumes=either))
    assert "names no size, and the pod uses 2" in told


def whole(cpu: Any = 2, memory: str = "64Mi", requests: Any = None, **more: Any) -> dict[str, Any]:
    return container({"cpu": cpu, "memory": memory} | more, requests)


@pytest.mark.parametrize(
    ("containers", "own"),
    [
        ((whole(),), 2),
        ((whole(requests={"cpu": "2", "memory": "64Mi"}),), 2),
        ((whole("2000m"),), 2),
        ((whole("1500m"),), 0),
        ((whole(requests={"cpu": 1}),), 0),
        ((whole(requests={"memory": "32Mi"}),), 0),
        ((container({"cpu": 2}),), 0),
        ((whole(), container()), 0),
        ((whole(), whole("500m")), 2),
    ],
)
def test_whole_cpus_of_a_guaranteed_pod_are_its_own(containers: tuple[dict[str, Any], ...], own: int) -> None:
    manifest = pod(*containers)
    assert refusals(manifest) == []
    assert exclusive_cpus(manifest, manifest["spec"]["containers"][0]) == own


def told_of(*pods: dict[str, Any], cpus: int = 2, memory_mib: int = 512, gpus: tuple[GpuSpec, ...] = ()) -> list[str]:
    made = tuple(p | {"metadata": {"name": f"p{i}"}} for i, p in enumerate(pods))
    spec = EnvironmentSpec(Cpu(cpus), Memory(memory_mib), "debian-13", pods=made, gpus=gpus)
    return [str(v) for v in check_environment(Environment(Meta("env", "ran"), spec))]


def test_more_gpus_than_the_vm_has_are_refused_at_the_container_that_is_one_too_many() -> None:
    one, two = pod(container({"nvidia.com/gpu": 1})), pod(container({"nvidia.com/gpu": 2}))
    assert told_of(one, two, gpus=(GpuSpec(count=3),)) == []
    (told,) = told_of(one, two, gpus=(GpuSpec(count=2),))
    assert told.startswith(
        "spec.pods[1].spec.containers[0].resources.limits.nvidia.com/gpu: '2' asks for GPU 3 of a VM that has 2"
    )
    named = pod(container({"nvidia.com/gpu=all": 1}))
    assert told_of(named, named, gpus=(GpuSpec(),)) == [], "a device by name may be had by several"
    (told,) = told_of(named)
    assert "asks for GPU 1 of a VM that has 0; raise spec.gpus" in told
    assert told_of(pod(container({"intel.com/fec": 1}))) == [], "what else a guest has, its image says"


def test_an_init_container_leaves_the_others_what_it_had() -> None:
    both = pod(container({"nvidia.com/gpu": 2, "hugepages-2Mi": "300Mi"}))
    both["spec"]["initContainers"] = [container({"nvidia.com/gpu": 2, "hugepages-2Mi": "300Mi"}, name="first")]
    assert told_of(both, gpus=(GpuSpec(count=2),)) == []
    told = told_of(both, gpus=(GpuSpec(),))
    assert [t.split(":")[0].rpartition(".limits")[0] for t in told] == [
        "spec.pods[0].spec.initContainers[0].resources",
        "spec.pods[0].spec.containers[0].resources",
    ]


def test_huge_pages_leave_the_guest_some_memory() -> None:
    pages = pod(container({"hugepages-2Mi": "224Mi"}))
    assert told_of(pages, pages) == []
    (told,) = told_of(pages, pages, memory_mib=511)
    assert told.startswith(
        "spec.pods[1].spec.containers[0].resources.limits.hugepages-2Mi: '224Mi' brings the huge pages"
    )


def test_one_cpu_stays_with_the_guest() -> None:
    own = pod(whole(1))
    assert told_of(own, own, cpus=3) == []
    (told,) = told_of(own, own, cpus=2)
    assert told.startswith("spec.pods[1].spec.containers[0].resources.limits.cpu: '1' brings the CPUs that containers")
    assert "write spec.cpu.count: 3, or a request below the limit" in told


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        (GpuSpec(count=65), "spec.gpus[0].count: '65' is out of range"),
        (GpuSpec(share="1g.18gb", link="nvlink"), "spec.gpus[0].link: 'nvlink' is for whole GPUs: slices have none"),
        (GpuSpec(model="\n"), "spec.gpus[0].model: '\N{REPLACEMENT CHARACTER}' is no name"),
    ],
)
def test_requests_for_gpus_are_refused_by_path(gpu: GpuSpec, told: str) -> None:
    (found,) = told_of(gpus=(gpu,))
    assert found.startswith(told), found


@pytest.mark.parametrize("gpu", [GpuSpec("*H200*", 2, "nvlink"), GpuSpec(share="1g.18gb"), GpuSpec(share_milli=250)])
def test_requests_for_gpus_go_both_ways(gpu: GpuSpec) -> None:
    env = Environment(Meta("env", "ran"), EnvironmentSpec(Cpu(2), Memory(512), "debian-13", gpus=(gpu,)))
    assert codec.from_message(codec.to_message(env)).spec == env.spec
