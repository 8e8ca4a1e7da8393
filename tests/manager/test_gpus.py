"""GPUs at the manager: who may be given one, what is kept of its hand-overs, and what operators ask."""

from dataclasses import replace

import pytest

from casemate_core.errors import Conflict, InvalidSpec, NotFound
from casemate_core.gpu import Check, GpuPhase, GpuState, Passport, Result, Rung, Step
from casemate_core.spec.environment import Environment, GpuSpec
from casemate_manager.fleet import desired, gpus
from casemate_manager.fleet.commands import Due, GpuAnswer, HostFacts, OrderGpu
from casemate_manager.fleet.gpus import MOST_PASSPORTS
from casemate_manager.fleet.requests import KeyReused
from casemate_wire import manifest
from casemate_wire.codec import desired as told_codec
from casemate_wire.codec import environment as codec
from casemate_wire.codec import hosts as wire
from casemate_wire.codec import resources
from casemate_wire.stream import Facts, HostReport
from support.small_fleet import SmallFleet, environment, image, network, topology

LINE = "1s 8k/c 1t 32G disk=100G gpu=2xH200 name=h1"
A, B = (gpu.uuid for gpu in topology(LINE).gpus)


def passport(uuid: str = A, generation: int = 1, climb: int = 1, *, clean: bool = True) -> Passport:
    checks = (Check("ecc", Result.UNKNOWN, "not told"),)
    return Passport(
        uuid, generation, "ran", (Step(Rung.CHECKS, Result.PASSED, "all", 10.0, 1.5, checks),), clean, "", climb
    )


def state(uuid: str = A, phase: GpuPhase = GpuPhase.FREE, **more: object) -> GpuState:
    return GpuState(uuid, phase, **more)  # type: ignore[arg-type]


class House:
    """A fleet of one host with two GPUs, and what that says of them."""

    def __init__(self) -> None:
        self.made = SmallFleet()
        self.made.apply(image(), network())
        self.made.join("h1", line=LINE)
        self.sequence = 100

    def says(self, *states: GpuState) -> int:
        """The revision after it."""
        self.sequence += 1
        self.made.do(HostFacts("h1", 1, Facts(self.sequence, host=HostReport(gpus=states))))
        return self.made.state.revision

    def wants(self, count: int = 1, **more: object) -> None:
        self.made.apply(environment("train", gpus=(GpuSpec("*H200*", count),), **more))
        self.made.settle()

    @property
    def placed(self) -> tuple[str, ...]:
        return tuple(gpu for p in self.made.state.placements.values() for gpu in p.claim.gpus)

    @property
    def waits(self) -> str:
        return next(a.message for a in self.made.observed.attempts.values())

    def order(self, verb: str, uuid: str = A, key: str = "", reason: str = "") -> GpuAnswer:
        self.sequence += 1
        answer = self.made.do(OrderGpu(key or f"key-{self.sequence}", uuid, verb, f"seed-{self.sequence}", reason))
        assert isinstance(answer, GpuAnswer)
        return answer


@pytest.fixture
def house() -> House:
    return House()


def test_a_gpu_that_its_host_has_not_told_is_given_to_nobody(house: House) -> None:
    house.wants()
    assert house.placed == () and "not told by its host yet" in house.waits
    house.says(state(A), state(B, GpuPhase.RETURNED))
    house.made.settle()
    assert house.placed == (A,)


@pytest.mark.parametrize("phase", [p for p in GpuPhase if p not in (GpuPhase.FREE, GpuPhase.HOST_OWNED)])
def test_a_gpu_that_is_not_clean_is_given_to_nobody_and_why_names_it(house: House, phase: GpuPhase) -> None:
    house.says(state(A, phase, reason="XID 79"), state(B))
    house.wants(2)
    assert house.placed == ()
    assert f"1 free of 2 ({A} is {phase}: XID 79)" in house.waits
    house.says(state(A, GpuPhase.HOST_OWNED), state(B))
    house.made.settle()
    assert sorted(house.placed) == [A, B]


def test_what_an_instance_has_is_held_by_it_alone_and_after_it_until_it_is_clean(house: House) -> None:
    house.says(state(A), state(B, GpuPhase.QUARANTINED, reason="hot"))
    house.wants()
    (placement,) = house.made.state.placements.values()
    told = desired.desired_instance(house.made.state, placement)
    assert told_codec.instance_from_message(told_codec.instance_to_message(told)) == told
    attached = state(A, GpuPhase.ATTACHED, owner=placement.instance_uid, tenant="default")
    house.says(attached, state(B, GpuPhase.QUARANTINED, reason="hot"))
    view = gpus.view(house.made.state, house.made.observed, A)
    assert view is not None and (view.instance, view.phase) == ("default/train-0", "Attached")
    house.made.delete("Environment", "train")
    house.made.settle()
    # The host lets go of the instance, and in the same word says that its GPU is not clean.
    house.sequence += 1
    returned = replace(attached, phase=GpuPhase.RETURNED)
    report = HostReport(gpus=(returned, state(B, GpuPhase.QUARANTINED, reason="hot")))
    house.made.do(HostFacts("h1", 1, Facts(house.sequence, gone=(placement.instance_uid,), host=report)))
    house.made.apply(environment("next", gpus=(GpuSpec(),)))
    house.made.settle()
    assert house.placed == () and f"{A} is Returned" in house.waits


def test_passports_are_kept_once_each_and_so_many(house: House) -> None:
    for generation in range(MOST_PASSPORTS + 3):
        said = state(A, passport=passport(generation=generation))
        revision = house.says(said)
        assert house.says(replace(said, health="well")) == revision, "the same passport again is no news"
    kept = house.made.state.gpus[A].passports
    assert [p.generation for p in kept] == list(range(3, MOST_PASSPORTS + 3))
    assert house.made.reload().gpus[A].passports == kept
    view = gpus.view(house.made.state, house.made.observed, A, whole=True)
    assert view is not None
    message = resources.to_message(view).gpu
    assert [p.generation for p in message.status.passports][:2] == [MOST_PASSPORTS + 2, MOST_PASSPORTS + 1]
    assert list(message.status.passports[0].not_proven) == [
        "that its memory was emptied: nothing overwrote it",
        "that its firmware is what its maker shipped",
        "ecc: not told",
    ]


def test_a_gpu_of_another_host_leaves_nothing(house: House) -> None:
    house.says(state("GPU-other", passport=passport("GPU-other")))
    assert "GPU-other" not in house.made.state.gpus


def test_an_operator_holds_a_gpu_back_at_once_and_lets_it_out(house: House) -> None:
    house.says(state(A), state(B))
    answer = house.order("quarantine", reason="smells")
    assert answer.order and answer.host == "h1"
    (told,) = gpus.orders(house.made.state, "h1")
    assert (told.uuid, told.verb, told.reason) == (A, "quarantine", "smells")
    house.wants(2)
    assert house.placed == () and "an operator said" in house.waits
    assert house.order("quarantine", reason="smells").order == "", "asked for already"
    house.says(state(A, GpuPhase.QUARANTINED, reason="smells", order=answer.order), state(B))
    assert house.order("quarantine", reason="smells").order == ""
    released = house.order("release")
    assert released.order not in ("", answer.order)
    assert house.order("release").order == ""
    house.says(state(A, order=released.order), state(B))
    house.made.settle()
    assert sorted(house.placed) == [A, B]
    assert house.order("release").order == "", "it is not in quarantine"


def test_an_order_has_one_effect_however_often_it_arrives(house: House) -> None:
    house.says(state(A), state(B))
    first = house.order("sanitise", key="one")
    revision = house.made.state.revision
    assert house.order("sanitise", key="one") == first
    assert house.made.state.revision == revision
    with pytest.raises(KeyReused):
        house.order("quarantine", key="one")


def test_orders_that_cannot_be(house: House) -> None:
    house.says(state(A, GpuPhase.ATTACHED), state(B))
    with pytest.raises(NotFound):
        house.order("quarantine", "GPU-none")
    with pytest.raises(Conflict, match="is sanitised when its instance lets go of it"):
        house.order("sanitise")
    with pytest.raises(InvalidSpec, match="verb: 'burn' is not known; write one of release, quarantine, sanitise"):
        house.order("burn")
    with pytest.raises(InvalidSpec, match="reason: 'x' means nothing to release"):
        house.order("release", reason="x")
    with pytest.raises(InvalidSpec, match="at most 200 characters"):
        house.order("quarantine", reason="x" * 201)


def test_it_is_unknown_while_its_host_is(house: House) -> None:
    from casemate_manager.fleet.commands import HostGone

    house.says(state(A, health="well"), state(B))
    house.made.do(HostGone("h1", 1, "cut"))
    view = gpus.view(house.made.state, house.made.observed, A)
    assert view is not None and (view.phase, view.state) == ("Unknown", None)
    house.made.do(Due())


def test_both_directions_of_the_codec() -> None:
    asked = environment("train", gpus=(GpuSpec("*H200*", 2, "pcie", near=True), GpuSpec()))
    assert codec.from_message(codec.to_message(asked)).spec == asked.spec
    whole = state(
        A,
        GpuPhase.QUARANTINED,
        owner="u",
        tenant="ran",
        reason="hot",
        generation=3,
        since_s=12.5,
        address="0000:17:00.0",
        driver="vfio-pci",
        health="broken",
        reasons=("XID 79",),
        order="o",
        passport=passport(),
    )
    facts = Facts(1, True, host=HostReport(gpus=(whole,)))
    assert wire.from_host_from_wire(wire.from_host_to_wire(facts)) == facts


@pytest.mark.parametrize(
    "wrong",
    [
        state(A, passport=passport(B)),
        state("", GpuPhase.FREE),
        state("GPU x"),
        state(A, reason="x" * 2000),
        state(A, reasons=("x",) * 17),
        state(A, passport=replace(passport(), steps=passport().steps * 17)),
    ],
)
def test_what_a_host_may_not_say(wrong: GpuState) -> None:
    message = wire.from_host_to_wire(Facts(1, True, host=HostReport(gpus=(wrong,))))
    with pytest.raises(wire.BadMessage):
        wire.from_host_from_wire(message)


def test_an_environment_from_its_manifest() -> None:
    text = """
apiVersion: casemate/v1
kind: Environment
metadata: {name: train}
spec: {cpu: {count: 1}, memory: {size: 1Gi}, image: debian, gpus: [{model: "*H200*", count: 2}]}
"""
    (resource,) = manifest.load(text.encode(), "train.yaml")
    value = resources.from_message(resource)
    assert isinstance(value, Environment)
    assert value.spec.gpus == (GpuSpec("*H200*", 2),)
