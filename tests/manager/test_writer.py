"""The writer: a reply leaves after its commit, a failed commit loads the state anew, and nothing queued is unbounded."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from casemate_core.errors import Conflict, Unavailable
from casemate_manager.app import make_rules
from casemate_manager.fleet.commands import Answer, ApplyAnswer, ApplyResources, DeleteResource
from casemate_manager.store.ports import Fenced, Stored, StoreFailed, StoreFull, Transaction
from casemate_manager.store.sqlite import SqliteStore
from casemate_manager.writer import Published, Writer
from support.small_fleet import environment, image, network


class Flaky(SqliteStore):
    """The real store, on a disk that fails when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.commits: list[int] = []
        self.fail_before: Exception | None = None
        self.fail_after: Exception | None = None
        self.unwritable = False

    def lead(self) -> Stored:
        if self.unwritable:
            raise StoreFull("no room")
        return super().lead()

    def commit(self, epoch: int, transactions: Sequence[Transaction]) -> None:
        if self.unwritable:
            raise StoreFull("no room")
        before, self.fail_before = self.fail_before, None
        if before is not None:
            raise before
        super().commit(epoch, transactions)
        self.commits.append(len(transactions))
        after, self.fail_after = self.fail_after, None
        if after is not None:
            raise after


@asynccontextmanager
async def running(store: SqliteStore, steps: list[str] | None = None) -> AsyncIterator[Writer]:
    clock = iter(range(1_800_000_000, 1_900_000_000))
    trace = (steps if steps is not None else []).append
    writer = Writer(
        store, make_rules(), lambda: float(next(clock)), lambda: "seed", trace=trace, idle_s=60.0, retry_s=0.01
    )
    await writer.open()
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await writer.close()


def apply(key: str, *objects: object) -> ApplyResources:
    return ApplyResources(key, objects, f"seed-{key}")  # type: ignore[arg-type]


async def test_a_reply_leaves_after_its_commit_and_after_it_was_published(tmp_path: Path) -> None:
    steps: list[str] = []
    async with running(Flaky(tmp_path / "f.db"), steps) as writer:
        writer.subscribe(lambda published: steps.append(f"published {published.revision}"))
        answer = await writer.submit(apply("k", image()))
        steps.append("answered")
        assert isinstance(answer, ApplyAnswer)
        assert steps == ["before-commit", "after-commit", "published 1", "before-reply", "answered"]
        assert "debian" in writer.state.images


async def test_what_waits_together_is_committed_together(tmp_path: Path) -> None:
    store = Flaky(tmp_path / "f.db")
    async with running(store) as writer:
        await asyncio.gather(*(writer.submit(apply(f"k{n}", image(f"i{n}"))) for n in range(50)))
        assert len(store.commits) <= 3
        assert len(writer.state.images) == 50


async def test_readers_never_see_what_is_not_committed(tmp_path: Path) -> None:
    store = Flaky(tmp_path / "f.db")
    seen: list[int] = []
    async with running(store) as writer:
        original = store.commit

        def commit(epoch: int, transactions: Sequence[Transaction]) -> None:
            seen.append(len(writer.state.images))
            original(epoch, transactions)

        store.commit = commit  # type: ignore[method-assign]
        await writer.submit(apply("k", image()))
        assert seen == [0] and len(writer.state.images) == 1


async def test_a_refusal_changes_nothing_and_the_rest_of_its_group_goes_on(tmp_path: Path) -> None:
    async with running(Flaky(tmp_path / "f.db")) as writer:
        await writer.submit(apply("k", image(), network(), environment()))
        results: list[Answer | BaseException] = await asyncio.gather(
            writer.submit(DeleteResource("d", "Image", "", "debian")),
            writer.submit(apply("k2", image("other"))),
            return_exceptions=True,
        )
        assert isinstance(results[0], Conflict) and isinstance(results[1], ApplyAnswer)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_failed_commit_ends_the_term_and_a_retry_has_one_effect(tmp_path: Path, when: str) -> None:
    store = Flaky(tmp_path / "f.db")
    resets: list[Published] = []
    async with running(store) as writer:
        await writer.submit(apply("k0", image(), network()))
        epoch = writer.epoch
        writer.subscribe(lambda p: resets.append(p) if p.reset else None)
        setattr(store, f"fail_{when}", StoreFailed("the disk"))
        with pytest.raises(Unavailable, match="same request key"):
            await writer.submit(apply("k1", environment()))
        while not writer.leading:
            await asyncio.sleep(0.01)
        assert writer.epoch == epoch + 1 and len(resets) == 1
        assert ("default/hello" in writer.state.environments) == (when == "after")
        answer = await writer.submit(apply("k1", environment()))
        assert isinstance(answer, ApplyAnswer) and answer.results[0].action == "created"
        assert len(writer.state.environments) == 1
        assert writer.state.check() == []


async def test_a_full_disk_refuses_changes_reads_go_on_and_it_recovers(tmp_path: Path) -> None:
    store = Flaky(tmp_path / "f.db")
    async with running(store) as writer:
        await writer.submit(apply("k0", image()))
        store.unwritable = True
        for key in ("k1", "k2"):
            with pytest.raises(Unavailable):
                await writer.submit(apply(key, image("other")))
        await asyncio.sleep(0.05)
        assert not writer.leading and set(writer.state.images) == {"debian"}
        store.unwritable = False
        while not writer.leading:
            await asyncio.sleep(0.01)
        await writer.submit(apply("k1", image("other")))
        assert set(writer.state.images) == {"debian", "other"}


async def test_a_manager_that_was_replaced_stops(tmp_path: Path) -> None:
    writer = Writer(SqliteStore(tmp_path / "f.db"), make_rules(), lambda: 1.0, lambda: "s")
    await writer.open()
    task = asyncio.create_task(writer.run())
    other = SqliteStore(tmp_path / "f.db")
    other.lead()
    with pytest.raises(Unavailable):
        await writer.submit(apply("k", image()))
    with pytest.raises(Fenced):
        await task
    assert other.load().records == ()
    other.close()
    await writer.close()


async def test_too_many_waiting_commands_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_manager.writer.QUEUE", 4)
    async with running(Flaky(tmp_path / "f.db")) as writer:
        results: list[Answer | BaseException] = await asyncio.gather(
            *(writer.submit(apply(f"k{n}", image(f"i{n}"))) for n in range(10)), return_exceptions=True
        )
        assert sum(isinstance(r, Unavailable) for r in results) == 6
        assert len(writer.state.images) == 4


async def test_stopping_finishes_what_was_begun_and_refuses_the_rest(tmp_path: Path) -> None:
    store = Flaky(tmp_path / "f.db")
    writer = Writer(store, make_rules(), lambda: 1.0, lambda: "s")
    await writer.open()
    task = asyncio.create_task(writer.run())
    first = asyncio.create_task(writer.submit(apply("k1", image("a"))))
    while not store.commits and not first.done():
        await asyncio.sleep(0)
        if writer._queue.empty() and first._state == "PENDING":  # taken: its commit is under way
            break
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert isinstance(await first, ApplyAnswer)
    with pytest.raises(Unavailable):
        await writer.submit(apply("k2", image("b")))
    await writer.close()


async def test_a_listener_that_fails_harms_nobody(tmp_path: Path) -> None:
    heard: list[int] = []
    async with running(Flaky(tmp_path / "f.db")) as writer:
        writer.subscribe(lambda p: 1 / 0 and None)  # type: ignore[func-returns-value]
        end = writer.subscribe(lambda p: heard.append(p.revision))
        await writer.submit(apply("k1", image("a")))
        end()
        await writer.submit(apply("k2", image("b")))
        assert heard == [1]


async def test_the_clock_alone_ends_a_lifetime_after_its_notice(tmp_path: Path) -> None:
    now_s = [1_800_000_000.0]
    writer = Writer(SqliteStore(tmp_path / "f.db"), make_rules(), lambda: now_s[0], lambda: "seed", idle_s=0.01)
    await writer.open()
    task = asyncio.create_task(writer.run())
    seen: list[str] = []

    async def until(reason: str) -> None:
        async with asyncio.timeout(60):
            while reason not in seen:
                now_s[0] += 1.0
                await asyncio.sleep(0.001)
                seen[:] = [e.reason for e in writer.state.events.values()]

    try:
        await writer.submit(apply("k", image(), network(), environment(lifetime_s=100)))
        await until("LifetimeEnding")
        assert now_s[0] >= 1_800_000_060
        await until("Deleted")
        assert now_s[0] >= 1_800_000_100
        assert not writer.state.environments
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await writer.close()
