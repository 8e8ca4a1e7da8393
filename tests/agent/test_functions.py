"""Virtual functions and devices: what an instance is to be given, and what becomes of it."""

import asyncio
from dataclasses import replace

import pytest

from casemate_agent.hardware.functions import CLEAN, FunctionFacts, Grant, GrantedVf, Stamp, VfFacts, VfState, grant_of
from casemate_agent.ledger.records import Note
from casemate_agent.plan.giving import drifted, to_give_back
from casemate_core.claims import VfClaim
from casemate_core.errors import InternalError
from casemate_core.spec.instance import Run
from support.agents import Rig, instance, uid
from support.functions import DEVICES, HOST, PORTS, with_functions
from support.virtual import VirtualLoop, run_virtual


def test_a_grant_follows_the_claim_and_the_interfaces() -> None:
    desired = with_functions(1, (0, 1), (1, 0), devices=DEVICES[:1], trust=True, max_rate_mbps=100)
    grant = grant_of(desired)
    assert grant.keys == (f"{PORTS[0]}/1", f"{PORTS[1]}/0", DEVICES[0])
    assert grant.stamp == Stamp(uid(1), 1, 1)
    assert grant.vfs[0].state == VfState("52:54:00:0f:00:01", 100, False, True, 0, 100)
    assert not grant_of(instance(1)), "a bridged interface needs no function"
    claim = replace(desired.placement.claim, vfs=(VfClaim(PORTS[0], 0, 5),))
    with pytest.raises(InternalError, match="interface 5 of 2"):
        grant_of(replace(desired, placement=replace(desired.placement, claim=claim)))


def test_a_state_is_compared_field_by_field() -> None:
    wanted = VfState("52:54:00:00:00:01", 100, True, False, 0, 50)
    assert wanted.differences(wanted) == ()
    assert wanted.differences(replace(wanted, vlan=0, max_rate_mbps=0)) == (
        "vlan is 0, should be 100",
        "max_rate_mbps is 0, should be 50",
    )
    assert wanted.differences(replace(wanted, trust=None)) == (), "a port without trust trusts nobody"
    trusted = replace(wanted, trust=True)
    assert trusted.differences(replace(wanted, trust=None)) == ("trust cannot be given by this port's driver",)


def test_a_release_covers_its_own_generation_and_older_ones_of_the_same_owner() -> None:
    stamp = Stamp("me", 2, 5)
    assert stamp.covers(stamp) and stamp.covers(Stamp("me", 2, 4)) and stamp.covers(Stamp("me", 1, 9))
    assert not stamp.covers(Stamp("me", 2, 6)) and not stamp.covers(Stamp("me", 3, 1))
    assert not stamp.covers(Stamp("you", 1, 1))


def test_a_trusted_guest_may_change_its_address() -> None:
    grant = grant_of(with_functions(1, (0, 0), trust=True))
    facts = VfFacts(PORTS[0], 0, "", "vfio-pci", replace(grant.vfs[0].state, mac="02:00:00:00:00:01"), grant.stamp)

    assert drifted(grant, FunctionFacts({facts.key: facts})) == ()
    held = grant_of(with_functions(1, (0, 0)))
    changed = replace(facts, state=replace(held.vfs[0].state, mac="02:00:00:00:00:01"))
    assert drifted(held, FunctionFacts({facts.key: changed}))[0].startswith("VfChanged")


def rig_of(loop: VirtualLoop) -> Rig:
    return Rig(loop, HOST)


def clean(rig: Rig) -> bool:
    return not (rig.host.cards.stamps or rig.host.cards.states or rig.host.cards.bound)


def test_an_instance_has_its_functions_from_before_its_start_to_its_end() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        await rig.start()
        wanted = with_functions(1, (0, 1), devices=DEVICES[:1])
        await rig.want(wanted)
        await rig.settle()
        cards, grant = rig.host.cards, grant_of(wanted)
        assert set(cards.bound) == set(grant.keys)
        assert cards.states == {grant.vfs[0].key: grant.vfs[0].state}
        await rig.want(replace(wanted, run=Run.STOPPED))
        await rig.settle()
        assert set(cards.stamps) == set(grant.keys), "a stopped instance keeps what it was placed on"
        await rig.unwant(uid(1))
        await rig.settle()
        assert clean(rig) and rig.broken == []
        await rig.kill()

    run_virtual(story)


def test_a_new_placement_gives_back_what_the_old_one_had() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        await rig.start()
        await rig.want(with_functions(1, (0, 0)))
        await rig.settle()
        await rig.want(replace(with_functions(1, (0, 0)), run=Run.STOPPED))
        await rig.settle()
        # Two exchange: the second takes what the first had.
        await rig.want(with_functions(1, (1, 1), generation=2), with_functions(2, (0, 0)))
        await rig.settle()
        assert {key: stamp.owner for key, stamp in rig.host.cards.stamps.items()} == {
            f"{PORTS[1]}/1": uid(1),
            f"{PORTS[0]}/0": uid(2),
        }
        assert rig.broken == []
        await rig.kill()

    run_virtual(story)


def test_a_vf_that_somebody_changed_is_named_and_put_right_under_the_same_process() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        await rig.start()
        await rig.want(with_functions(1, (0, 0)))
        await rig.settle()
        pid, key = rig.active()[uid(1)], f"{PORTS[0]}/0"
        rig.host.cards.states[key] = replace(rig.host.cards.states[key], vlan=7)
        rig.broken.clear()
        assert rig.agent is not None
        told: list[Note] = []
        rig.agent.note = told.append  # type: ignore[method-assign]
        await asyncio.sleep(5)
        assert [(n.reason, n.message, n.uid) for n in told] == [
            ("VfChanged", f"{key}: vlan is 7, should be 100", uid(1))
        ]
        assert rig.host.cards.states[key].vlan == 100
        assert rig.active()[uid(1)] == pid and rig.host.check() == []
        await rig.kill()

    run_virtual(story)


def test_what_a_port_does_not_do_fails_by_name_and_is_not_started() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        rig.host.cards.deaf.add(f"{PORTS[0]}/0")
        await rig.start()
        await rig.want(with_functions(1, (0, 0)))
        await asyncio.sleep(60)
        assert rig.states()[uid(1)].reason == "VfMismatch"
        assert rig.active() == {}
        await rig.unwant(uid(1))
        await rig.settle()
        assert clean(rig)
        await rig.kill()

    run_virtual(story)


def test_leftovers_of_an_instance_nobody_knows_are_taken_back_and_a_leak_is_named() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        rig.host.cards.stamps[f"{PORTS[0]}/0"] = Stamp(uid(9), 1, 1)
        rig.host.cards.bound.add(f"{PORTS[0]}/0")
        rig.host.cards.states[f"{PORTS[1]}/1"] = VfState("52:54:00:00:00:99", 5)
        await rig.start()
        await asyncio.sleep(40)
        assert rig.host.cards.stamps == {} and rig.host.cards.bound == set()
        assert rig.agent is not None
        (leak,) = [line for line in rig.agent.feed.report.drift if line.startswith("VfLeak")]
        assert "mac is 52:54:00:00:00:99, should be 00:00:00:00:00:00; vlan is 5, should be 0" in leak
        await rig.kill()

    run_virtual(story)


def test_a_port_that_is_gone_holds_its_instances_back_with_the_reason() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = rig_of(loop)
        await rig.start()
        await rig.want(with_functions(1, (0, 0)), with_functions(2, (1, 0)))
        await rig.settle()
        await rig.kill()
        rig.host.reboot()
        moved = replace(HOST.pfs[1], place=replace(HOST.pfs[1].place, address="0000:99:00.0"))
        rig.host.topology = replace(HOST, pfs=(moved,))  # one card is missing, the other is in another slot
        await rig.start()
        await asyncio.sleep(60)
        states = rig.states()
        assert states[uid(1)].reason == "FunctionMissing" and PORTS[0] in states[uid(1)].message
        assert set(rig.active()) == {uid(2)} and rig.host.check() == []
        await rig.kill()

    run_virtual(story)


def test_giving_back_keeps_what_is_to_stay() -> None:
    grant = Grant(Stamp("me", 1, 2), (GrantedVf(PORTS[0], 0, CLEAN),))

    facts = FunctionFacts({f"{PORTS[0]}/{i}": VfFacts(PORTS[0], i, "", "", CLEAN, Stamp("me", 1, i)) for i in range(2)})
    assert to_give_back("me", grant, facts) == (Stamp("me", 1, 1), (f"{PORTS[0]}/1",))
    assert to_give_back("me", None, facts) == (Stamp("me", 1, 1), (f"{PORTS[0]}/0", f"{PORTS[0]}/1"))
    assert to_give_back("you", None, facts) is None
