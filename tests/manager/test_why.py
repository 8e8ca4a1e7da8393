"""The answer to ``why``, as operators get it."""

from dataclasses import replace

import pytest

from casemate_core.fit import Fit, fit
from casemate_core.gpu import GpuPhase, GpuState
from casemate_core.spec.environment import GpuSpec
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.meta import Meta
from casemate_core.topology import ShareProfile
from casemate_manager.api.why import PlacerWhy
from casemate_manager.fleet.commands import HostGone, HostInventory
from casemate_manager.fleet.placing import request_of
from casemate_wire.stream import HostReport, Inventory
from support.small_fleet import SmallFleet, environment, image, network, topology


def fleet() -> SmallFleet:
    made = SmallFleet()
    made.apply(image(), network())
    for name in ("h1", "h2"):
        made.join(name)
    return made


async def test_a_waiting_instance_is_told_why_and_what_helps() -> None:
    made = fleet()
    made.apply(environment("big", cpus=2, memory_mib=20_000))
    instance = made.state.instances[made.state.instance_names["default/big-0"]]
    answer = await PlacerWhy(made.rules.placer).why(made.state, made.observed, instance, "")
    assert answer.hosts == 2 and not answer.placed
    assert [(r.reason, r.hosts) for r in answer.reasons] == [("have too little memory", 2)]
    assert {m.host for m in answer.nearest} == {"h1", "h2"} and "memory" in answer.nearest[0].messages[0]
    assert answer.suggestions and "memory" in answer.suggestions[0].change.lower()


async def test_a_placed_instance_is_told_its_host_and_another_host_why_not() -> None:
    made = fleet()
    made.apply(environment("one", cpus=1))
    instance = made.state.instances[made.state.instance_names["default/one-0"]]
    why = PlacerWhy(made.rules.placer)
    answer = await why.why(made.state, made.observed, instance, "")
    assert answer.placed and answer.host in ("h1", "h2")
    assert answer.holds == ["1 CPUs of the pool of cell 0", "512 MiB of cell 0", "1024 MiB of disk"]
    assert [(r.reason, r.hosts) for r in answer.reasons] == [("have enough as well", 1)]
    other = "h2" if answer.host == "h1" else "h1"
    there = await why.why(made.state, made.observed, instance, other)
    assert there.host == other and not there.placed  # it would fit there as well


async def test_a_cordoned_fleet_is_told_to_uncordon() -> None:
    made = fleet()
    for name in ("h1", "h2"):
        made.apply(Host(Meta(name), HostSpec(cordoned=True)))
    made.apply(environment("wait"))
    instance = made.state.instances[made.state.instance_names["default/wait-0"]]
    answer = await PlacerWhy(made.rules.placer).why(made.state, made.observed, instance, "")
    assert [s.command for s in answer.suggestions][:2] == ["casemate uncordon h1", "casemate uncordon h2"]
    one = await PlacerWhy(made.rules.placer).why(made.state, made.observed, instance, "h2")
    assert one.hosts == 1 and one.nearest[0].messages == ["the host is cordoned"]


async def test_suggestions_come_true() -> None:
    made = fleet()
    made.apply(environment("big", cpus=1, memory_mib=20_000))
    instance = made.state.instances[made.state.instance_names["default/big-0"]]
    placer = made.rules.placer
    why = PlacerWhy(placer)
    await why.why(made.state, made.observed, instance, "")
    record = made.state.environment_of(instance).environment
    explained = why._placer.explain_synced(made.state, record, record.spec, instance.meta.uid)
    assert explained.changes
    for change in explained.changes:
        assert change.request is not None
        view = why._placer.scheduler.columns.row(change.host).view
        assert isinstance(fit(view.topology, view.claims, change.request.request, owner="x"), Fit)
    assert request_of(record.spec) != explained.changes[0].request.request  # type: ignore[union-attr]


async def test_a_gang_that_waits_is_not_told_that_it_fits() -> None:
    made = fleet()  # two hosts of 4 CPUs
    made.apply(environment("gang", cpus=3, replicas=3, gang=True))
    why = PlacerWhy(made.rules.placer)
    for ordinal in range(3):
        instance = made.state.instances[made.state.instance_names[f"default/gang-{ordinal}"]]
        answer = await why.why(made.state, made.observed, instance, "")
        assert not answer.host and answer.group.startswith("2 of 3 instances")
        assert "ask for 2 replicas" in [s.change for s in answer.suggestions]
    made.apply(environment("gang", cpus=3, replicas=2, gang=True))
    made.settle()
    assert len(made.state.placements) == 2


async def test_suggestions_are_carried_out_on_the_fleet_and_it_runs() -> None:
    """Each as its own story, from the sentence to the placement."""
    for change, act in (
        ("uncordon host h2", lambda made: made.apply(Host(Meta("h2"), HostSpec()))),
        ("ask for 7Gi", None),
    ):
        made = fleet()
        made.apply(Host(Meta("h2"), HostSpec(cordoned=act is not None)))
        made.apply(environment("first", cpus=1, memory_mib=6000))
        big = 6000 if act is not None else 20_000
        made.apply(environment("big", cpus=1, memory_mib=big))
        instance = made.state.instances[made.state.instance_names["default/big-0"]]
        why = PlacerWhy(made.rules.placer)
        answer = await why.why(made.state, made.observed, instance, "")
        assert not answer.placed and answer.suggestions
        if act is not None:
            assert answer.suggestions[0].change == change
            act(made)
        else:
            record = made.state.environment_of(instance).environment
            (found, *_) = why._placer.explain_synced(made.state, record, record.spec, instance.meta.uid).changes
            assert found.request is not None and "memory" in found.sentence
            made.apply(environment("big", cpus=1, memory_mib=found.request.request.memory.size_mib))
        assert (await why.why(made.state, made.observed, instance, "")).placed


async def test_a_move_is_told_by_the_name_of_the_instance() -> None:
    made = SmallFleet()
    made.apply(image(), network())
    made.join("h1")
    made.apply(environment("small", cpus=2))
    made.join("h2", line="1s 2k/c 1t 8G disk=100G")
    made.apply(environment("wide", cpus=4))
    instance = made.state.instances[made.state.instance_names["default/wide-0"]]
    answer = await PlacerWhy(made.rules.placer).why(made.state, made.observed, instance, "")
    assert answer.suggestions[0].change == "move instance default/small-0 from h1 to h2"


async def test_columns_are_kept_warm_some_hosts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_manager.api.why.WARM_HOSTS", 2)
    made = SmallFleet()
    made.apply(image(), network())
    for n in range(5):
        made.join(f"h{n}")
    why = PlacerWhy(made.rules.placer)
    rounds = [await why.warm(made.state, made.observed) for _ in range(3)]
    assert rounds == [False, False, True]
    assert len(why._placer.scheduler.columns) == 5
    # a question between two rounds sees everything
    made.apply(environment("one"))
    made.do(HostGone("h4", 1, ""))
    made.delete("Host", "h4")
    other = PlacerWhy(made.rules.placer)
    await other.warm(made.state, made.observed)
    made.apply(environment("big", memory_mib=20_000))
    instance = made.state.instances[made.state.instance_names["default/big-0"]]
    assert (await other.why(made.state, made.observed, instance, "")).reasons[0].hosts == 4
    assert await other.warm(made.state, made.observed)


async def test_a_slice_that_no_vm_can_be_given_and_a_label_that_no_gpu_has() -> None:
    made = SmallFleet()
    made.apply(image(), network())
    plain = topology("1s 4k/c 1t 8G disk=100G gpu=2xA100:40G name=h1")
    bare = (ShareProfile("1g.5gb", 125, 5120, 1, (0, 1, 2, 3, 4, 5, 6), bare=True),)
    gpus = tuple(replace(g, share_slots=8, share_profiles=bare, labels=(("pool", "train"),)) for g in plain.gpus)
    made.hello("h1", 1)
    made.do(HostInventory("h1", 1, Inventory("digest", replace(plain, gpus=gpus))))
    free = HostReport(gpus=tuple(GpuState(g.uuid, GpuPhase.HOST_OWNED) for g in gpus))
    made.tell("h1", 1, snapshot=True, report=free)
    why = PlacerWhy(made.rules.placer)
    for name, spec, words in (
        ("slice", GpuSpec(share="1g.5gb"), "a MIG instance without a vGPU: it has no PCI function, and goes to no VM"),
        (
            "label",
            GpuSpec(labels={"pool": "infer"}),
            "GPUs pool=infer asked, none of 2 of model * is; they are pool=train",
        ),
    ):
        made.apply(environment(name, gpus=(spec,)))
        instance = made.state.instances[made.state.instance_names[f"default/{name}-0"]]
        answer = await why.why(made.state, made.observed, instance, "h1")
        assert not answer.placed and words in answer.nearest[0].messages[0], answer.nearest
    suggested = await why.why(made.state, made.observed, instance, "")
    assert any("leave out labels in gpus[0]" in s.change for s in suggested.suggestions), suggested.suggestions
    made.apply(environment("right", gpus=(GpuSpec(labels={"pool": "train"}),)))
    right = made.state.instances[made.state.instance_names["default/right-0"]]
    assert (await why.why(made.state, made.observed, right, "")).placed
