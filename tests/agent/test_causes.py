"""What an event follows from, and what happens by itself."""

from dataclasses import replace

from casemate_agent.causes import Causes
from casemate_core.cause import PREFIX, cause_of
from casemate_core.spec.instance import InstanceState, Phase, Run
from support.agents import instance, uid

NOW = [100.0]


def causes() -> Causes:
    NOW[0] = 100.0
    return Causes(lambda: NOW[0])


ASKED = replace(instance(1), cause="r-one")
READY = InstanceState(uid(1), ASKED.generation, Phase.READY)
BOOTING = InstanceState(uid(1), ASKED.generation, Phase.STARTING)


def test_a_cause_is_short_and_the_same_everywhere_and_tells_nothing_of_the_key() -> None:
    assert cause_of("key") == cause_of("key") != cause_of("key2")
    assert cause_of("key").startswith(PREFIX) and len(cause_of("x" * 128)) == 14
    assert "secret" not in cause_of("secret")


def test_a_cause_holds_until_the_instance_is_as_asked() -> None:
    known = causes()
    known.asked([ASKED])
    assert known.of(uid(1)) == "r-one"
    NOW[0] += 5
    assert known.seen(ASKED, BOOTING, idle=True) is None
    assert known.seen(ASKED, READY, idle=False) is None, "something is still to be done"
    assert known.seen(ASKED, replace(READY, reason="ApplyPods"), idle=True) is None
    assert known.seen(ASKED, replace(READY, generation=0), idle=True) is None, "it is ready of something older"
    assert known.seen(ASKED, READY, idle=True) == 5
    known.settle(ASKED)
    assert known.of(uid(1)) == ""
    known.asked([ASKED])
    assert known.of(uid(1)) == "", "the same wish again begins nothing"
    assert known.seen(ASKED, BOOTING, idle=False) is None
    assert known.of(uid(1)) == "", "a crash follows from nothing"
    known.asked([replace(ASKED, cause="r-two", run=Run.STOPPED)])
    assert known.of(uid(1)) == "r-two"


def test_after_a_restart_of_the_agent_the_ledger_tells_the_cause_and_no_duration() -> None:
    known = causes()
    assert known.seen(ASKED, BOOTING, idle=False) is None
    assert known.of(uid(1)) == "r-one"
    assert known.seen(ASKED, READY, idle=True) is None
    assert known.of(uid(1)) == ""


def test_an_instance_that_is_at_rest_already_begins_no_story() -> None:
    known = causes()
    assert known.seen(ASKED, READY, idle=True) is None
    assert known.of(uid(1)) == ""


def test_a_boot_is_timed_once_for_each_start() -> None:
    known = causes()
    assert known.booted(uid(1)) is None
    known.started(uid(1))
    NOW[0] += 20
    assert known.booted(uid(1)) == 20
    assert known.booted(uid(1)) is None
    known.started(uid(1))
    known.forget(uid(1))
    assert known.booted(uid(1)) is None
