"""Volumes at the manager: bound once, used by one, found again, and deleted only when somebody says so."""

from dataclasses import replace
from typing import Any

import pytest

from casemate_core.claims import volume_owner
from casemate_core.errors import Conflict, InvalidSpec
from casemate_core.spec.access import Tenant
from casemate_core.spec.environment import Environment, check_environment
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.instance import Phase
from casemate_core.spec.meta import Meta
from casemate_core.spec.volume import Volume, VolumeMount, VolumeSpec
from casemate_manager import views
from casemate_manager.api.why import PlacerWhy
from casemate_manager.fleet import desired
from casemate_manager.fleet import volumes as rules
from casemate_manager.fleet.commands import Advance, HostGone
from casemate_manager.fleet.quotas import QuotaExceeded
from casemate_manager.fleet.records import KINDS, PlacementRecord, VolumeRecord
from casemate_wire.stream import HostReport, VolumeFacts
from support.small_fleet import SmallFleet, environment, image, network, told

KEY = "default/data"


def volume(name: str = "data", gib: int = 10) -> Volume:
    return Volume(Meta(name, "default"), VolumeSpec(gib * 1024))


def using(name: str = "db", *names: str, replicas: int = 1, **fields: Any) -> Environment:
    mounts = tuple(VolumeMount(n) for n in names or ("data",))
    return environment(name, volumes=mounts, replicas=replicas, **fields)


def fleet(*hosts: str) -> SmallFleet:
    made = SmallFleet()
    made.apply(image(), network())
    for host in hosts or ("h1", "h2", "h3"):
        made.join(host)
    return made


def record(made: SmallFleet, key: str = KEY) -> VolumeRecord:
    return made.state.volumes[key]


def placement(made: SmallFleet, name: str = "db", ordinal: int = 0) -> PlacementRecord:
    environment = made.state.environments[f"default/{name}"].environment
    found = made.state.placement_of(made.state.environment_instances[environment.meta.uid][ordinal])
    assert found is not None
    return found


def has(made: SmallFleet, host: str, *keys: str, allocated_mib: int = 5) -> None:
    """The host says that it has the data of these volumes, and of no others."""
    facts = tuple(
        VolumeFacts(record(made, key).volume.meta.uid, record(made, key).volume.spec.size_mib, allocated_mib)
        for key in keys
    )
    made.tell(host, 1, report=HostReport(volumes=facts))


def ended(made: SmallFleet, name: str = "db") -> None:
    """The environment is deleted, and its host lets go of it."""
    host = placement(made, name).host
    made.delete("Environment", name)
    made.obey(host)
    assert f"default/{name}" not in made.state.environments


def status(made: SmallFleet, key: str = KEY) -> Any:
    return views.volume_status(made.state, made.observed, record(made, key))


def test_the_first_placement_binds_a_volume_and_the_next_environment_finds_it_again() -> None:
    made = fleet()
    made.apply(volume())
    assert status(made).phase == "Pending"
    made.apply(using())
    host = placement(made).host
    assert record(made).host == host
    assert made.state.claims[host][volume_owner(record(made).volume.meta.uid)].disk_mib == 10 * 1024
    (wanted,) = desired.whole(made.state, host)[0]
    (ref,) = wanted.volumes
    assert (ref.uid, ref.name, ref.size_mib, ref.made) == (record(made).volume.meta.uid, "data", 10 * 1024, False)
    has(made, host, KEY)
    assert desired.whole(made.state, host)[0][0].volumes[0].made, "its data is there: it is never made anew"
    now = status(made)
    assert (now.phase, now.host, now.environment, now.instance) == ("Bound", host, "db", "db-0")
    assert now.allocated_mib == 5

    ended(made)
    assert record(made).host == host and status(made).phase == "Available"
    assert rules.removed(made.state, host) == (), "the environment's end is not the volume's"
    # other hosts are emptier; its data is on this one
    made.apply(using("other"))
    assert placement(made, "other").host == host
    assert made.reload().check() == []
    assert made.reload().host_volumes == made.state.host_volumes
    assert made.reload().volume_users == made.state.volume_users


def test_several_instances_use_volumes_by_their_ordinals() -> None:
    made = fleet()
    made.apply(*(volume(f"data-{n}") for n in range(3)), using(replicas=3))
    for ordinal in range(3):
        assert record(made, f"default/data-{ordinal}").host == placement(made, "db", ordinal).host
        wanted = next(
            i for i in desired.whole(made.state, placement(made, "db", ordinal).host)[0] if i.ordinal == ordinal
        )
        assert [v.name for v in wanted.volumes] == ["data"], "pods of all instances name one path"
    with pytest.raises(InvalidSpec, match=r"spec\.replicas: '1' gives other volumes to its instances"):
        made.apply(using(replicas=1))
    with pytest.raises(InvalidSpec, match=r"spec\.volumes\[0\]\.volume: 'data-3' is no volume of this tenant"):
        made.apply(using(replicas=4))
    made.apply(volume("data-3"), using(replicas=4))
    assert record(made, "default/data-3").host


def test_what_a_volume_takes_counts_on_its_host_and_a_refusal_has_numbers() -> None:
    made = fleet("h1")
    made.apply(volume(gib=98), using())
    assert placement(made).host == "h1", "98 GiB and a disk of 1 GiB are on 100 GiB"
    made.apply(environment("two", disk_mib=3072))
    (waiting,) = made.state.pending
    assert "3Gi of disk asked, 1Gi free" in made.observed.attempts[waiting].message
    ended(made)
    # its data is still there: the room of its root disk alone is free
    assert "3Gi of disk asked, 2Gi free" in made.observed.attempts[waiting].message
    made.apply(volume("more", 90), using("three", "more"))
    found = next(i for i in made.state.pending if made.state.instances[i].environment == "three")
    assert "91Gi of disk asked, 2Gi free" in made.observed.attempts[found].message
    assert record(made, "default/more").host == "", "what was not placed binds nothing"


def test_an_instance_waits_for_the_host_of_its_volume_and_says_so() -> None:
    made = fleet()
    made.apply(volume(), using())
    host = placement(made).host
    has(made, host, KEY)
    ended(made)
    made.do(HostGone(host, 1, "cut"))
    assert status(made).phase == "Unknown"
    made.apply(using("again"))
    (uid,) = made.state.pending
    message = made.observed.attempts[uid].message
    assert f"2: volume data is on host {host}, and its instance runs there alone" in message
    assert "1: host is not heard from" in message
    made.join(host, session=2)
    assert placement(made, "again").host == host


async def test_why_tells_which_hosts_lack_the_data() -> None:
    made = fleet()
    made.apply(volume(), using())
    host = placement(made).host
    has(made, host, KEY)
    ended(made)
    made.apply(Host(replace(made.state.hosts[host].host.meta, resource_version=0), HostSpec(cordoned=True)))
    made.apply(using("again"))
    (uid,) = made.state.pending
    why = PlacerWhy(made.rules.placer)
    answer = await why.why(made.state, made.observed, made.state.instances[uid], "")
    assert {r.reason: r.hosts for r in answer.reasons}["do not have the data of a volume that it uses"] == 2
    near = {miss.host: list(miss.messages) for miss in answer.nearest}
    other = next(name for name in near if name != host)
    assert any(f"volume data is on host {host}" in text for text in near[other])
    assert "the host is cordoned" in near[host]
    assert next(s.command for s in answer.suggestions) == f"casemate uncordon {host}"


def test_volumes_on_two_hosts_have_no_place_together() -> None:
    made = fleet("h1", "h2")
    made.apply(volume("a"), volume("b"), using("one", "a", memory_mib=5000), using("two", "b", memory_mib=5000))
    hosts = {record(made, "default/a").host, record(made, "default/b").host}
    assert hosts == {"h1", "h2"}
    ended(made, "one")
    ended(made, "two")
    made.apply(using("both", "a", "b"))
    (uid,) = made.state.pending
    assert "2: volume" in made.observed.attempts[uid].message


def test_a_volume_has_one_user() -> None:
    made = fleet()
    made.apply(volume(), using())
    with pytest.raises(InvalidSpec, match=r"spec\.volumes\[0\]\.volume: 'data' is used by environment db"):
        made.apply(using("other"))
    with pytest.raises(InvalidSpec, match="is used by environment"):
        made.apply(volume("b"), using("x", "b"), using("y", "b"))
    assert "default/x" not in made.state.environments
    (twice,) = check_environment(using("z", "b", "b"))
    assert twice.path == "spec.volumes[1].volume" and "is also spec.volumes[0]" in str(twice)
    # let go of in the spec, and still used until the restart
    made.apply(environment("db"))
    with pytest.raises(InvalidSpec, match="is used by environment db"):
        made.apply(using("other"))
    with pytest.raises(Conflict, match="volume data is used by instance db-0 of environment db"):
        made.delete("Volume", "data")


def test_a_volume_in_use_is_not_deleted_and_one_that_is_deleted_ends_on_its_host_first() -> None:
    made = fleet()
    made.apply(volume(), using())
    host = placement(made).host
    has(made, host, KEY)
    with pytest.raises(Conflict, match=r"volume data is used by instance db-0 of environment db: take it out of"):
        made.delete("Volume", "data")
    ended(made)
    uid = record(made).volume.meta.uid
    answer = made.delete("Volume", "data")
    assert answer.pending and status(made).phase == "Deleting"
    assert rules.removed(made.state, host) == (uid,)
    with pytest.raises(Conflict, match="is being deleted"):
        made.apply(volume())
    with pytest.raises(InvalidSpec, match="is being deleted"):
        made.apply(using("other"))
    has(made, host, KEY)
    made.tell(host, 1, report=HostReport(volumes=None))
    assert record(made).volume.meta.uid == uid, "a host that does not know says nothing"
    made.tell(host, 1, report=HostReport(volumes=()))
    assert KEY not in made.state.volumes and volume_owner(uid) not in made.state.claims[host]
    made.apply(volume(), using())
    assert record(made).volume.meta.uid != uid, "another volume, although of that name"


def test_a_volume_that_was_never_placed_is_gone_at_once() -> None:
    made = fleet()
    made.apply(volume())
    assert not made.delete("Volume", "data").pending
    assert KEY not in made.state.volumes


def test_a_deletion_wakes_its_host_although_none_of_its_instances_changed() -> None:
    made = fleet()
    made.apply(volume(), using())
    host = placement(made).host
    ended(made)
    woken: list[dict[str, set[str]]] = []
    fold = made.fold

    def watching(batch: Any) -> Any:
        folded = fold(batch)
        woken.append(made.woken)
        return folded

    made.fold = watching  # type: ignore[method-assign]
    made.delete("Volume", "data")
    assert {host: set()} in woken


def test_it_grows_where_there_is_room_and_does_not_shrink() -> None:
    made = fleet("h1")
    made.apply(volume(gib=10), using())
    with pytest.raises(InvalidSpec, match=r"spec\.size: '5Gi' is smaller than the volume, which has 10Gi"):
        made.apply(volume(gib=5))
    with pytest.raises(InvalidSpec, match=r"needs 190Gi more on its host h1, which has 89Gi free; write 99Gi or less"):
        made.apply(volume(gib=200))
    has(made, "h1", KEY)
    made.apply(volume(gib=99))
    assert made.state.claims["h1"].usage.disk_mib == 100 * 1024
    assert desired.whole(made.state, "h1")[0][0].volumes[0].size_mib == 99 * 1024
    # what its host said is as it was; what is asked for is more
    made.tell("h1", 1, report=HostReport(volumes=(VolumeFacts(record(made).volume.meta.uid, 10 * 1024, 7),)))
    assert status(made).capacity_mib == 10 * 1024 and "grows" in status(made).message


def test_two_volumes_that_grow_at_once_are_counted_together() -> None:
    made = fleet("h1")
    made.apply(volume("a"), volume("b"), using("one", "a"), using("two", "b"))
    with pytest.raises(InvalidSpec, match="needs 80Gi more on its host h1"):
        made.apply(volume("a", 50), volume("b", 50))
    assert record(made, "default/a").volume.spec.size_mib == 10 * 1024


def test_a_host_that_has_lost_the_data_is_told() -> None:
    made = fleet()
    made.apply(volume(), using())
    host = placement(made).host
    has(made, host, KEY)
    made.tell(host, 1, report=HostReport(volumes=()))
    assert status(made).phase == "Lost"
    assert any(e.reason == "VolumeLost" for e in made.state.events.values())
    made.tell(host, 1, report=HostReport(volumes=(VolumeFacts("0" * 8 + "-0000-4000-8000-" + "0" * 12, 1, 1),)))
    assert any(e.reason == "UnknownVolumes" for e in made.state.events.values())


def test_a_host_with_volumes_stays_until_they_are_given_up() -> None:
    made = fleet("h1")
    made.apply(volume(), using())
    has(made, "h1", KEY)
    ended(made)
    made.do(HostGone("h1", 1, "burnt down"))
    with pytest.raises(Conflict, match=r"host h1 has the data of volume default/data \(1 in all\)"):
        made.delete("Host", "h1")
    assert made.delete("Volume", "data").pending
    assert "not heard from" in status(made).message
    made.delete("Host", "h1")
    assert KEY not in made.state.volumes and made.reload().check() == []


def test_a_restart_brings_a_volume_that_was_added_and_binds_it_to_the_instances_host() -> None:
    made = fleet()
    made.apply(environment("db", run="stopped"))
    host = placement(made).host
    made.apply(volume(), using(run="stopped"))
    assert record(made).host == ""
    uid = placement(made).instance_uid
    made.tell(host, 1, told(uid, Phase.STOPPED, generation=2))
    assert record(made).host == host and [v.volume for v in made.state.instances[uid].volumes] == ["data"]


def test_a_gang_that_finds_no_place_binds_nothing() -> None:
    made = fleet("h1")
    names = [volume(f"data-{n}", 1) for n in range(40)]
    made.apply(*names)
    made.apply(using(replicas=40, gang=True))
    assert made.state.pending and all(not r.host for r in made.state.volumes.values())
    assert made.state.claims.get("h1") is None or not len(made.state.claims["h1"])


def test_what_was_reserved_for_a_gang_is_unbound_when_it_is_given_back() -> None:
    line = "1s 64k/c 1t 512G disk=4T"
    made = SmallFleet()
    made.apply(image(), network("default", "10.99.0.0/16"))
    made.join("h1", line=line)
    for start in range(0, 40, 20):
        made.apply(*(volume(f"data-{n}", 1) for n in range(start, start + 20)), settle=False)
    made.apply(using(replicas=40, gang=True), settle=False)
    while not made.state.placements:
        made.do(Advance("seed"))
    reserved = len(made.state.placements)
    assert reserved < 40, "a part of it is reserved"
    assert sum(bool(r.host) for r in made.state.volumes.values()) == reserved
    made.do(HostGone("h1", 1, "cut"))
    made.settle()
    assert not made.state.placements
    assert all(not r.host for r in made.state.volumes.values()), "no host was told of them"


def test_the_quotas_of_a_tenant_count_volumes_and_their_size() -> None:
    made = fleet()
    made.apply(Tenant(Meta("default"), {"volumes": 2, "storage": 30 * 1024}))
    made.apply(volume("a"))
    with pytest.raises(QuotaExceeded, match=r"would have 40Gi of storage, and its quota is 30Gi"):
        made.apply(volume("b", 30))
    with pytest.raises(QuotaExceeded, match=r"would have 3 of volumes, and its quota is 2"):
        made.apply(volume("b", 1), volume("c", 1))
    made.apply(volume("b", 20))
    with pytest.raises(QuotaExceeded, match="31Gi of storage"):
        made.apply(volume("a", 11))
    made.delete("Volume", "b")
    made.apply(volume("a", 30))
    assert views.tenant_status(made.state, made.state.tenants["default"]).used["storage"] == 30 * 1024


def test_pods_name_volumes_by_claims() -> None:
    made = fleet()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "db"},
        "spec": {
            "containers": [{"name": "db", "image": "x", "volumeMounts": [{"name": "d", "mountPath": "/data"}]}],
            "volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}],
        },
    }
    made.apply(volume(), using(pods=(pod,)))
    wanted = desired.whole(made.state, placement(made).host)[0][0]
    assert wanted.pods[0]["spec"]["volumes"] == [
        {"name": "d", "hostPath": {"path": "/volumes/data", "type": "Directory"}}
    ]
    stored = made.state.environments["default/db"].environment.spec.pods[0]
    assert "persistentVolumeClaim" in stored["spec"]["volumes"][0], "what was written is what is shown"
    (found,) = check_environment(using("x", "other", pods=(pod,)))
    assert found.path == "spec.pods[0].spec.volumes[0].persistentVolumeClaim.claimName"
    assert "name one of other" in str(found)


def test_every_kind_of_record_can_be_asked_for() -> None:
    made = fleet()
    assert {kind for kind in KINDS if made.state.holds(kind, "nobody/nothing")} <= {k for k in KINDS if "Audit" in k}
