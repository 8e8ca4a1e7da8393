"""Interfaces of type sriov and devices: from the spec to the exact function in the host's record, and refusals."""

import pytest

from casemate_core.errors import InvalidSpec
from casemate_core.spec.environment import DeviceSpec, Environment, NicSpec
from casemate_core.spec.fleet import Network, NetworkSpec
from casemate_core.spec.meta import Meta
from casemate_manager.fleet import desired
from casemate_manager.fleet.placing import request_of
from casemate_wire import manifest
from casemate_wire.codec import environment as codec
from casemate_wire.codec import resources
from casemate_wire.codec.desired import instance_from_message, instance_to_message
from support.small_fleet import SmallFleet, environment, image, network, topology

FRONTHAUL = Network(Meta("fronthaul"), NetworkSpec("physical", "10.71.0.0/24"))
NIC = NicSpec("fronthaul", "sriov", 100, False, 0, 500)
LINE = "1s 4k/c 1t 8G disk=100G vf=1x2@fronthaul!vlan+rate dev=1xfec"


def fleet(line: str = LINE) -> SmallFleet:
    made = SmallFleet()
    made.apply(image(), network(), FRONTHAUL)
    made.join("h1", line=line)
    return made


def wanting(**fields: object) -> Environment:
    return environment("du", **({"nics": (NicSpec(), NIC), "devices": (DeviceSpec({"type": "fec"}),)} | fields))


def test_a_vf_and_a_device_are_placed_exactly_and_told_to_the_host() -> None:
    made = fleet()
    made.apply(wanting())
    made.settle()
    (placement,) = made.state.placements.values()
    assert [(vf.pf, vf.index, vf.nic) for vf in placement.claim.vfs] == [(topology(LINE).pfs[0].mac, 0, 0)]
    assert placement.claim.devices == (topology(LINE).devices[0].id,)
    told = desired.desired_instance(made.state, placement)
    assert [(n.type, n.vlan, n.max_rate_mbps) for n in told.nics] == [("bridge", 0, 0), ("sriov", 100, 500)]
    assert instance_from_message(instance_to_message(told)) == told


def test_what_no_port_can_do_is_said_at_the_placement() -> None:
    made = fleet()
    made.apply(wanting(nics=(NicSpec("fronthaul", "sriov", trust=True),)))
    made.settle()
    assert not made.state.placements
    assert request_of(wanting(nics=(NicSpec("fronthaul", "sriov", 5, True, 10, 20),)).spec).nics[0].needs == (
        "vlan",
        "trust",
        "min-rate",
        "rate",
    )


def test_an_isolated_environment_has_no_interface_and_no_address() -> None:
    made = fleet()
    made.apply(environment("alone", replicas=2, nics=(), isolated=True))
    made.settle()
    told = [desired.desired_instance(made.state, placement) for placement in made.state.placements.values()]
    assert [(d.nics, [peer.address for peer in d.peers]) for d in told] == [((), [""])] * 2
    # Given an interface, it has one when it is started the next time.
    made.apply(environment("alone", replicas=2))
    made.settle()
    assert {len(i.nics) for i in made.state.instances.values()} == {0}
    assert not made.state.check()


def test_both_directions_of_the_codec() -> None:
    before = wanting(nics=(NicSpec("fronthaul", "sriov", 5, True, 10, 20, "du"), NicSpec()))
    assert codec.from_message(codec.to_message(before)).spec == before.spec


@pytest.mark.parametrize(
    ("nic", "said"),
    [
        ({"network": "fronthaul", "type": "sriov", "vlan": 4095}, "spec.nics[0].vlan: '4095' is out of range"),
        ({"network": "default", "trust": True}, "spec.nics[0].trust: 'true' is for virtual functions"),
        ({"network": "f", "type": "sriov", "maxRate": "2000Gbit"}, "spec.nics[0].maxRate"),
        ({"network": "f", "type": "sriov", "minRate": "2Gbit", "maxRate": "1Gbit"}, "is above the highest rate"),
        ({"network": "f", "type": "sriov", "near": "gpu"}, "spec.nics[0].near: is not served"),
    ],
)
def test_wrong_interfaces_are_refused_by_field(nic: dict[str, object], said: str) -> None:
    assert any(said in line for line in refused({"nics": [nic]}))


def pod(name: str, **spec: object) -> dict[str, object]:
    containers = [{"name": "app", "image": "localhost/app:1"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": containers, **spec}}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("du", ""),
        ("cu", "spec.nics[0].pod: 'cu' is no pod of this environment; name one of spec.pods (du, own)"),
        ("own", "spec.nics[0].pod: 'own' has the guest's own network; leave pod out, or remove hostNetwork from it"),
    ],
)
def test_the_pod_of_an_interface_is_one_that_has_a_network_of_its_own(name: str, said: str) -> None:
    nics = [{"network": "fronthaul", "type": "sriov", "pod": name}]
    assert refused({"nics": nics, "pods": [pod("du"), pod("own", hostNetwork=True)]}) == ([said] if said else [])


def test_the_pod_of_an_interface_reaches_the_host() -> None:
    made = fleet()
    pods = (pod("du"), pod("cu"))
    made.apply(wanting(pods=pods, nics=(NicSpec(), NicSpec("default", pod="du"))))
    made.settle()
    (placement,) = made.state.placements.values()
    told = desired.desired_instance(made.state, placement)
    assert [n.pod for n in told.nics] == ["", "du"]
    assert instance_from_message(instance_to_message(told)) == told


def test_wrong_devices_are_refused_by_field() -> None:
    assert any("spec.devices[0].labels: is empty" in line for line in refused({"devices": [{"count": 1}]}))
    wrong = {"devices": [{"labels": {"a": "b"}, "count": 65}]}
    assert any("spec.devices[0].count: '65' is out of range" in line for line in refused(wrong))


def refused(fields: dict[str, object]) -> list[str]:
    """What an environment with these fields is refused for."""
    spec = {"cpu": {"count": 1}, "memory": {"size": "1Gi"}, "image": "debian", **fields}
    document = {"apiVersion": "casemate/v1", "kind": "Environment", "metadata": {"name": "du"}, "spec": spec}
    try:
        resources.from_message(manifest.parse(document))
    except InvalidSpec as invalid:
        return [str(v) for v in invalid.violations]
    return []


@pytest.mark.parametrize(
    ("nic", "said"),
    [
        (NicSpec("default", "sriov"), "is a network of type nat, and the interface is of type sriov"),
        (NicSpec("fronthaul"), "is a network of type physical, and the interface is of type bridge"),
    ],
)
def test_an_interface_fits_its_network(nic: NicSpec, said: str) -> None:
    made = fleet()
    with pytest.raises(InvalidSpec) as caught:
        made.apply(environment("du", nics=(nic,)))
    assert said in str(caught.value.violations[0])
