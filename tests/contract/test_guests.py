"""What the agent relies on of the helpers in the guests: the same for a simulated guest and for the real helper."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from casemate_agent.drivers.ports import UNKNOWN, ExecRequest, GuestGone, GuestHello, GuestPods, GuestRefused
from casemate_core.errors import Unavailable
from support.guest_bench import WITHIN_S, GuestBench, guest_bench, pod

SLEEP = ("sleep", "1000")


@pytest.fixture(params=["simulated", "real"])
async def guest(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GuestBench]:
    """A guest that runs no pods yet, attached."""
    async with guest_bench(request.param, tmp_path) as made:
        yield made


# --- the connection ---------------------------------------------------------------------------------------------------


async def test_an_attached_guest_says_hello_and_then_its_pods(guest: GuestBench) -> None:
    hello = guest.last(GuestHello)
    assert hello is not None
    assert hello.uid == guest.uid
    assert hello.boot_id
    assert hello.version
    assert guest.pods == GuestPods(guest.uid, (), "")
    assert guest.seen.index(hello) < guest.seen.index(guest.pods)
    assert guest.guests.attached() == {guest.uid}


async def test_attaching_again_changes_nothing(guest: GuestBench) -> None:
    before = list(guest.seen)
    await guest.guests.attach(guest.uid, guest.path)
    await guest.apply("a")
    assert [e for e in guest.seen if isinstance(e, GuestHello)] == [e for e in before if isinstance(e, GuestHello)]
    assert guest.guests.attached() == {guest.uid}


async def test_a_detached_guest_is_gone_and_goes_on(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    for _ in range(2):
        await guest.guests.detach(guest.uid)
    await guest.until(lambda: guest.last(GuestGone))
    assert [e for e in guest.seen if isinstance(e, GuestGone)] == [GuestGone(guest.uid)]
    assert guest.guests.attached() == frozenset()
    with pytest.raises(Unavailable):
        await guest.apply("b")
    with pytest.raises(Unavailable):
        await guest.lines("web")
    with pytest.raises(Unavailable):
        await guest.run("true")
    with pytest.raises(Unavailable):
        await guest.guests.shutdown(guest.uid, WITHIN_S)
    guest.seen.clear()
    await guest.guests.attach(guest.uid, guest.path)
    web = await guest.until(lambda: guest.last(GuestPods) and guest.pod("web"))
    assert web
    assert (web.ready, web.containers[0].restarts, guest.pods.revision) == (True, 0, "a")


async def test_the_pods_outlive_the_agent(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    began_s = (await guest.ready("web")).started_s
    boot = guest.last(GuestHello)
    assert boot is not None
    await guest.start_agent()
    again = guest.last(GuestHello)
    assert again is not None
    assert again.boot_id == boot.boot_id
    web = await guest.ready("web")
    assert (guest.pods.revision, web.started_s, web.containers[0].restarts) == ("a", began_s, 0)


async def test_a_guest_that_was_never_attached_is_unavailable(guest: GuestBench) -> None:
    with pytest.raises(Unavailable):
        await guest.guests.apply("nobody", (), 0, "1", {}, 1.0)


# --- pods -------------------------------------------------------------------------------------------------------------


async def test_a_pod_becomes_ready(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    web = await guest.ready("web")
    assert (web.phase, web.reason) == ("Running", "")
    assert web.started_s > 0
    (app,) = web.containers
    assert (app.name, app.image, app.state, app.ready, app.restarts) == ("app", "localhost/app:1", "running", True, 0)
    assert guest.pods.revision == "a"


async def test_the_same_pods_go_on_whatever_the_revision_is_called(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    before = await guest.ready("web")
    for revision in ("a", "b"):
        await guest.apply(revision, pod("web", *SLEEP))
    await guest.until(lambda: guest.pods.revision == "b")
    assert guest.pod("web") == before


async def test_a_changed_pod_is_made_anew_and_a_removed_one_goes(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP), pod("old", *SLEEP))
    first = await guest.ready("web")
    await guest.ready("old")
    await guest.apply("b", pod("web", "sleep", "2000"), pod("new", *SLEEP))
    await guest.ready("new")
    await guest.until(lambda: (p := guest.pod("web")) and p.ready and p.started_s > first.started_s)
    await guest.until(lambda: guest.pod("old") is None)
    assert guest.container("web").restarts == 0
    assert {p.name for p in guest.pods.pods} == {"web", "new"}
    await guest.apply("c")
    await guest.until(lambda: guest.pods == GuestPods(guest.uid, (), "c"))


async def test_two_pods_of_one_name_are_refused(guest: GuestBench) -> None:
    with pytest.raises(GuestRefused):
        await guest.apply("a", pod("web", *SLEEP), pod("web", "sleep", "5"))


@pytest.mark.parametrize(
    ("policy", "program", "phase", "code", "reason"),
    [
        ("Never", "true", "Succeeded", 0, "Completed"),
        ("Never", "false", "Failed", 1, "Error"),
        ("OnFailure", "true", "Succeeded", 0, "Completed"),
    ],
)
async def test_a_pod_that_ends_for_good(
    guest: GuestBench, policy: str, program: str, phase: str, code: int, reason: str
) -> None:
    await guest.apply("a", pod("job", program, policy=policy))
    job = await guest.until(lambda: (p := guest.pod("job")) and p.phase == phase and p)
    assert job
    assert job.ready is False
    (app,) = job.containers
    assert (app.state, app.reason, app.exit_code, app.restarts) == ("terminated", reason, code, 0)
    assert app.finished_s >= app.started_s > 0
    await guest.until(lambda: guest.notes("ContainerExited"))
    (note,) = guest.notes("ContainerExited")
    assert (note.pod, note.message) == ("job", f"app: {reason} with exit code {code}")
    assert note.severity == ("Normal" if code == 0 else "Warning")


async def test_a_container_that_fails_is_restarted_at_once_and_then_later(guest: GuestBench) -> None:
    await guest.apply("a", pod("bad", "false", policy="OnFailure"))
    await guest.until(lambda: guest.pod("bad") and guest.container("bad").reason == "CrashLoopBackOff")
    bad = guest.container("bad")
    assert (bad.state, bad.exit_code, bad.restarts, bad.ready) == ("waiting", 1, 1, False)
    assert bad.message == "Error with exit code 1; next start in 10 s"
    assert guest.pod("bad").phase == "Running"  # type: ignore[union-attr]
    await guest.until(lambda: len(guest.notes("ContainerExited")) == 2)


async def test_a_killed_container_comes_back(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    await guest.kill("web")
    await guest.until(lambda: guest.container("web").restarts == 1 and guest.container("web").ready)
    assert (guest.container("web").exit_code, guest.container("web").state) == (137, "running")
    (note,) = await guest.until(lambda: guest.notes("ContainerRestarted"))
    assert note.message == "app: restart 1"


# --- logs -------------------------------------------------------------------------------------------------------------


async def test_logs_come_whole_by_their_tail_and_after_a_position(guest: GuestBench) -> None:
    await guest.apply("a", pod("say", "echo", "hello", policy="Always"))
    await guest.until(lambda: guest.pod("say") and guest.container("say").reason == "CrashLoopBackOff")
    both = await guest.lines("say")
    assert [(line.text, line.pod, line.container, line.stream, line.lost) for line in both] == [
        ("hello", "say", "app", "stdout", 0)
    ] * 2
    assert 0 < both[0].sequence < both[1].sequence
    assert both[0].time_s <= both[1].time_s
    assert await guest.lines("say", "app") == both
    assert await guest.lines("say", tail=1) == both[1:]
    assert await guest.lines("say", tail=0) == []
    assert await guest.lines("say", tail=50) == both
    assert await guest.lines("say", after_sequence=both[0].sequence) == both[1:]
    assert await guest.lines("say", after_sequence=both[1].sequence) == []
    assert await guest.lines("say", since_s=both[1].time_s + 1) == []


async def test_a_followed_log_goes_on_and_ends_with_its_pod(guest: GuestBench) -> None:
    await guest.apply("a", pod("say", "echo", "hello", policy="Always"))
    await guest.until(lambda: guest.pod("say") and guest.container("say").started_s > 0)
    following = asyncio.create_task(guest.lines("say", follow=True))
    await guest.until(lambda: guest.container("say").reason == "CrashLoopBackOff")
    assert not following.done()
    await guest.apply("b")
    assert [line.text for line in await following] == ["hello", "hello"]


async def test_following_a_log_that_is_over_ends(guest: GuestBench) -> None:
    await guest.apply("a", pod("job", "echo", "done", policy="Never"))
    await guest.until(lambda: (p := guest.pod("job")) and p.phase == "Succeeded")
    assert [line.text for line in await guest.lines("job", follow=True)] == ["done"]


async def test_the_log_of_the_run_before_the_last_start(guest: GuestBench) -> None:
    await guest.apply("a", pod("say", "echo", "hello", policy="Always"), pod("web", *SLEEP))
    await guest.ready("web")
    await guest.until(lambda: guest.pod("say") and guest.container("say").reason == "CrashLoopBackOff")
    both = await guest.lines("say")
    assert len(both) == 2
    assert await guest.lines("say", previous=True) == both[:1]
    assert await guest.lines("say", previous=True, tail=0) == []
    assert await guest.lines("say", previous=True, since_s=both[0].time_s + 1) == []
    with pytest.raises(GuestRefused, match="started once: there is no earlier run"):
        await guest.lines("web", previous=True)


async def test_a_log_goes_on_behind_a_line_and_tells_where_it_cannot(guest: GuestBench) -> None:
    await guest.apply("a", pod("say", "echo", "hello", policy="Always"))
    await guest.until(lambda: guest.pod("say") and guest.container("say").reason == "CrashLoopBackOff")
    first, second = await guest.lines("say")
    assert first.log == second.log != ""
    assert await guest.lines("say", after_sequence=first.sequence, log=first.log) == [second]
    await guest.start_agent()
    assert await guest.lines("say", after_sequence=first.sequence, log=first.log) == [second]
    await guest.apply("b", pod("say", "echo", "anew", policy="Never"))
    await guest.until(lambda: (p := guest.pod("say")) and p.phase == "Succeeded")
    (anew,) = await guest.lines("say", after_sequence=second.sequence, log=second.log)
    assert (anew.text, anew.lost) == ("anew", UNKNOWN)
    assert anew.log != first.log


async def test_following_ends_when_the_guest_is_let_go(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    following = asyncio.create_task(guest.lines("web", follow=True))
    await asyncio.sleep(0.1)
    await guest.guests.shutdown(guest.uid, WITHIN_S)
    await guest.off()
    await guest.guests.detach(guest.uid)
    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(following, return_exceptions=True)


async def test_logs_of_what_is_not_there_are_refused(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP), pod("two", *SLEEP, containers=("left", "right")))
    await guest.ready("two")
    await guest.ready("web")
    with pytest.raises(GuestRefused, match="no pod none"):
        await guest.lines("none")
    with pytest.raises(GuestRefused, match="pod web has no container nope, but app"):
        await guest.lines("web", "nope")
    with pytest.raises(GuestRefused, match="but left, right"):
        await guest.lines("two")


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [{"pod": "web"}, {"pod": "web", "container": "app"}, {}])
async def test_a_command_takes_input_and_gives_output_and_exit_code(guest: GuestBench, where: dict[str, Any]) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    assert await guest.run("cat", stdin=b"in\0and out\n", **where) == (0, b"in\0and out\n", b"")
    assert await guest.run("echo", "two", "words", **where) == (0, b"two words\n", b"")
    assert await guest.run("false", **where) == (1, b"", b"")


async def test_a_command_that_is_not_there(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    code, out, errors = await guest.run("no-such-program", pod="web")
    assert (code, out) == (127, b"")
    assert b"executable file `no-such-program` not found" in errors
    with pytest.raises(GuestRefused, match="No such file or directory"):
        await guest.run("no-such-program")


async def test_commands_that_cannot_begin_are_refused(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP), pod("job", "true", policy="Never"))
    await guest.ready("web")
    await guest.until(lambda: (p := guest.pod("job")) and p.phase == "Succeeded")
    with pytest.raises(GuestRefused, match="no pod none"):
        await guest.run("true", pod="none")
    with pytest.raises(GuestRefused, match="has no container nope, but app"):
        await guest.run("true", pod="web", container="nope")
    with pytest.raises(GuestRefused, match="container app is terminated"):
        await guest.run("true", pod="job")
    with pytest.raises(GuestRefused):
        await guest.run()


async def test_a_signal_ends_a_command(guest: GuestBench) -> None:
    session = await guest.guests.exec(guest.uid, ExecRequest(("sleep", "1000")), WITHIN_S)
    assert session.exit_code is None
    await session.signal(signal.SIGTERM)
    async with asyncio.timeout(WITHIN_S):
        assert [data async for _, data in session.output()] == []
    assert session.exit_code == 143
    await session.close()


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_a_guest_asked_to_power_off_is_gone(guest: GuestBench) -> None:
    await guest.apply("a", pod("web", *SLEEP))
    await guest.ready("web")
    following = asyncio.create_task(guest.lines("web", follow=True))
    await asyncio.sleep(0.05)
    await guest.guests.shutdown(guest.uid, WITHIN_S)
    await guest.off()
    await guest.until(lambda: isinstance(guest.seen[-1], GuestGone))
    with pytest.raises(Unavailable):
        await guest.apply("b")
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
