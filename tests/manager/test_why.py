"""The answer to ``why``, as operators get it."""

from casemate_core.fit import Fit, fit
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.meta import Meta
from casemate_manager.api.why import PlacerWhy
from casemate_manager.fleet.placing import request_of
from support.small_fleet import SmallFleet, environment, image, network


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
