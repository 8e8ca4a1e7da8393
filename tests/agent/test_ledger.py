"""The agent's memory on disk: what is accepted is there after a power cut, what is torn is said, what is stale is refused."""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.drivers.simulated_disk import SimulatedDisk
from casemate_agent.ledger.files import Files, OsFiles
from casemate_agent.ledger.records import Failure, HostRecord, InstanceRecord, Intent, Refusal, Started
from casemate_agent.ledger.store import (
    Damaged,
    Ledger,
    LedgerFailed,
    StaleEpoch,
    Threaded,
    decode,
    encode,
    inline,
)
from casemate_core.spec.instance import DesiredInstance, Run
from casemate_core.spec.secret import SecretText
from casemate_wire.stream import Desired
from support.agents import NETWORK, instance, uid

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def loaded(files: Files) -> Ledger:
    return await Ledger.load(files, inline)


def snapshot(*numbers: int, epoch: int = 1, revision: int = 1) -> Desired:
    return Desired(epoch, revision, True, tuple(map(instance, numbers)), networks=(NETWORK,))


FULL = InstanceRecord(
    desired=instance(1, user_data="#cloud-config\n", ssh_keys=("ssh-ed25519 AAAA x",)),
    removed=True,
    claim=instance(1).placement.claim,
    claim_epoch=3,
    claim_generation=4,
    refusal=Refusal(1, 2, "does not fit"),
    stop_since_s=1.5,
    stop_asked_s=2.5,
    started=Started("boot", 9.25),
    starts=7,
    exits=2,
    exited_s=3.0,
    failure=Failure("Start", 2, 1.0, "MachineFailed", "no", True, 5),
    intent=Intent(("Define", "Start"), 5.0),
    phase="Ready",
    phase_since_s=8.0,
    adopted=True,
)


def test_a_record_is_read_as_it_was_written() -> None:
    assert decode(InstanceRecord, encode(FULL)) == FULL
    host = HostRecord(3, 4, 5, (NETWORK,), True)
    assert decode(HostRecord, encode(host)) == host


@given(st.integers(0, 5000), st.integers(0, 255))
def test_one_changed_byte_is_noticed(position: int, byte: int) -> None:
    data = bytearray(encode(FULL))
    position %= len(data)
    if data[position] == byte or data[position : position + 1].isspace():
        return
    data[position] = byte
    try:
        read = decode(InstanceRecord, bytes(data))
    except Damaged:
        return
    assert read == FULL  # a change that JSON does not care about


@given(st.integers(0, 5000))
def test_a_torn_file_is_noticed(length: int) -> None:
    data = encode(FULL)
    with pytest.raises(Damaged):
        decode(InstanceRecord, data[: length % (len(data) - 1)])


def test_a_file_of_a_later_release_is_not_read() -> None:
    data = encode(HostRecord(1)).replace(b'"version":1', b'"version":2')
    with pytest.raises(Damaged, match="later release"):
        decode(HostRecord, data)


def test_what_was_accepted_is_there_after_a_power_cut() -> None:
    async def story() -> None:
        disk = SimulatedDisk()
        ledger = await loaded(disk)
        assert not ledger.host.complete
        assert await ledger.accept(snapshot(1, 2)) == {uid(1), uid(2)}
        await ledger.accept(Desired(1, 2, instances=(instance(3),), removed=(uid(1),)))
        before = ledger.book
        disk.power_cut()
        after = (await loaded(disk)).book
        assert after == before
        assert after.host == HostRecord(1, 2, 0, (NETWORK,), True)
        assert {name: r.removed for name, r in after.instances.items()} == {uid(1): True, uid(2): False, uid(3): False}

    run(story())


SECRET = "canary-of-the-ledger"


def with_secret(text: str, mark: str = "f1", **changes: Any) -> DesiredInstance:
    return instance(1, secrets={"s/k": SecretText(mark, text)}, **changes)


def test_texts_of_secrets_have_a_place_of_their_own(tmp_path: Path) -> None:
    async def story() -> None:
        folder = tmp_path / "ledger"
        ledger = await loaded(OsFiles(folder))
        await ledger.accept(Desired(1, 1, True, (with_secret(SECRET),)))
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert [p.parent.name for p in files if SECRET in p.read_text()] == ["private"]
        assert {p.stat().st_mode & 0o777 for p in files} == {0o600}
        assert {p.stat().st_mode & 0o777 for p in (folder, folder / "private", folder / "instances")} == {0o700}
        assert SECRET not in repr(ledger.book)
        again = await loaded(OsFiles(folder))
        assert again.book == ledger.book and again.host.complete
        await again.accept(Desired(1, 2, instances=(with_secret("rotated", "f2"),)))
        assert not [p for p in folder.rglob("*") if p.is_file() and SECRET in p.read_text()]
        assert (await loaded(OsFiles(folder))).book == again.book
        await again.accept(Desired(1, 3, instances=(instance(1),)))  # its pods name none any more
        assert not list((folder / "private").iterdir())
        await again.accept(Desired(1, 4, instances=(with_secret(SECRET),)))
        await again.accept(Desired(1, 5, removed=(uid(1),)))
        assert await again.forget(uid(1))
        assert not list((folder / "private").iterdir())

    run(story())


class CutDisk(SimulatedDisk):
    """A disk whose operations end with the n-th one, counted from ``arm``."""

    left = 0

    def _operate(self, writes: bool = False) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                raise OSError(5, "cut")
        super()._operate(writes)


@pytest.mark.parametrize("operation", range(1, 17))
def test_a_power_cut_leaves_a_record_with_the_texts_that_it_names_or_asks_for_them(operation: int) -> None:
    async def story() -> None:
        disk = CutDisk()
        ledger = await loaded(disk)
        await ledger.accept(Desired(1, 1, True, (with_secret("old", "f1"),)))
        disk.left = operation
        with contextlib.suppress(LedgerFailed):
            await ledger.accept(Desired(1, 2, instances=(with_secret("new", "f2"),)))
        disk.left = 0
        disk.power_cut()
        after = await loaded(disk)
        (secret,) = after.book.instances[uid(1)].desired.secrets.values()
        if secret.text is None:
            assert after.book.damage and not after.host.complete
        else:
            assert (secret.fingerprint, secret.text) in (("f1", "old"), ("f2", "new"))

    run(story())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", encode(HostRecord(1)), None])
def test_texts_that_are_damaged_or_gone_are_asked_for_again(tmp_path: Path, data: bytes | None) -> None:
    async def story() -> None:
        folder = tmp_path / "ledger"
        await (await loaded(OsFiles(folder))).accept(Desired(1, 1, True, (with_secret(SECRET),)))
        path = folder / "private" / f"{uid(1)}.json"
        path.unlink() if data is None else path.write_bytes(data)
        after = await loaded(OsFiles(folder))
        assert not after.host.complete and after.host.revision == 0 and "private/" in after.book.damage[0]
        record = after.book.instances[uid(1)]
        assert record.desired.secrets["s/k"].text is None
        await after.accept(Desired(1, 1, True, (with_secret(SECRET),)))
        assert (await loaded(OsFiles(folder))).book.instances[uid(1)].desired.secrets["s/k"].text == SECRET

    run(story())


def test_it_lives_in_a_real_folder_for_its_owner_only(tmp_path: Path) -> None:
    async def story() -> None:
        offload = Threaded()
        files = OsFiles(tmp_path / "ledger")
        ledger = await Ledger.load(files, offload)
        await ledger.accept(snapshot(1, 2))
        assert await ledger.next_session(1_800_000_000.0) == 1_800_000_000
        await ledger.accept(snapshot(2, revision=2))
        assert await ledger.forget(uid(1))
        again = await Ledger.load(OsFiles(tmp_path / "ledger"), offload)
        assert again.book == ledger.book
        assert await again.next_session(5.0) == 1_800_000_001
        assert sorted(p.name for p in (tmp_path / "ledger").rglob("*")) == [
            f"{uid(2)}.json",
            "gpus",
            "host.json",
            "instances",
            "private",
        ]
        for path in (tmp_path / "ledger").rglob("*.json"):
            assert path.stat().st_mode & 0o077 == 0
        offload.close()

    run(story())


def test_a_snapshot_ends_what_it_does_not_name_and_a_change_only_what_it_names() -> None:
    async def story() -> None:
        ledger = await loaded(SimulatedDisk())
        await ledger.accept(snapshot(1, 2))
        assert await ledger.accept(Desired(1, 2, instances=(instance(2, generation=2),))) == {uid(2)}
        assert not ledger.book.instances[uid(1)].removed
        assert await ledger.accept(snapshot(2, revision=3)) == {uid(1), uid(2)}
        assert ledger.book.instances[uid(1)].removed
        # wanted again before it was gone: it lives on
        assert await ledger.accept(Desired(1, 4, instances=(instance(1),))) == {uid(1)}
        assert not ledger.book.instances[uid(1)].removed
        # the same again changes nothing
        assert await ledger.accept(Desired(1, 5, instances=(instance(1),))) == frozenset()
        assert ledger.host.revision == 5

    run(story())


def test_an_older_term_is_refused_for_ever() -> None:
    async def story() -> None:
        disk = SimulatedDisk()
        ledger = await loaded(disk)
        await ledger.accept(snapshot(1, epoch=4))
        with pytest.raises(StaleEpoch):
            await ledger.accept(snapshot(epoch=3, revision=99))
        disk.power_cut()
        ledger = await loaded(disk)
        with pytest.raises(StaleEpoch):
            await ledger.accept(Desired(3, 100, removed=(uid(1),)))
        assert not ledger.book.instances[uid(1)].removed

    run(story())


def test_the_term_is_known_from_the_records_where_the_hosts_is_lost() -> None:
    async def story() -> None:
        disk = SimulatedDisk()
        ledger = await loaded(disk)
        placement = replace(instance(1).placement, epoch=6)
        await ledger.accept(Desired(6, 1, True, (instance(1, placement=placement),)))
        disk.remove("host.json")
        ledger = await loaded(disk)
        assert (ledger.host.epoch, ledger.host.revision, ledger.host.complete) == (6, 0, False)

    run(story())


@pytest.mark.parametrize("name", ["host.json", f"instances/{uid(1)}.json"])
def test_a_damaged_file_is_set_aside_reported_and_made_good_by_a_snapshot(name: str) -> None:
    async def story() -> None:
        disk = SimulatedDisk()
        await (await loaded(disk)).accept(snapshot(1, 2))
        disk.write(name, disk.read(name)[:-9])
        ledger = await loaded(disk)
        assert not ledger.host.complete
        assert ledger.host.revision == 0
        assert name in ledger.book.damage[0]
        assert uid(2) in ledger.book.instances
        await ledger.accept(snapshot(1, 2, revision=2))
        assert ledger.host.complete
        assert ledger.book.damage == ()
        again = await loaded(disk)
        assert again.book == ledger.book

    run(story())


@pytest.mark.parametrize("name", ["host.json", f"instances/{uid(1)}.json", f"private/{uid(1)}.json"])
def test_a_file_that_the_file_system_has_lost_is_set_aside_too(tmp_path: Path, name: str) -> None:
    """A power cut may leave a folder in a file's place, on a file system without a journal."""

    async def story() -> None:
        folder = tmp_path / "ledger"
        wanted = Desired(1, 1, True, (with_secret(SECRET), instance(2)))
        await (await loaded(OsFiles(folder))).accept(wanted)
        (folder / name).unlink()
        (folder / name / "in it").mkdir(parents=True)
        after = await loaded(OsFiles(folder))
        assert not after.host.complete and name in after.book.damage[0] and uid(2) in after.book.instances
        await after.accept(wanted)
        again = await loaded(OsFiles(folder))
        assert again.host.complete and again.book.damage == ()
        assert again.book.instances[uid(1)].desired.secrets["s/k"].text == SECRET

    run(story())


def test_a_disk_that_fails_fails_the_operation_and_changes_nothing() -> None:
    async def story() -> None:
        disk = SimulatedDisk()
        ledger = await loaded(disk)
        await ledger.accept(snapshot(1))
        before = ledger.book
        disk.full = True
        for work in (
            lambda: ledger.accept(snapshot(1, 2, revision=2)),
            lambda: ledger.next_session(9.0),
            lambda: ledger.amend(uid(1), lambda r: replace(r, starts=9)),
        ):
            with pytest.raises(LedgerFailed, match="No space left"):
                await work()
        assert ledger.book.host == before.host
        assert ledger.book.instances == before.instances
        disk.full = False
        await ledger.accept(snapshot(1, 2, revision=2))
        assert (await loaded(disk)).book == ledger.book

    run(story())


def test_a_plan_made_from_an_older_record_is_not_saved() -> None:
    async def story() -> None:
        ledger = await loaded(SimulatedDisk())
        await ledger.accept(snapshot(1))
        base = ledger.book.instances[uid(1)]
        await ledger.accept(Desired(1, 2, instances=(instance(1, run=Run.STOPPED),)))
        assert not await ledger.save(base, replace(base, starts=1))
        now = ledger.book.instances[uid(1)]
        assert now.desired.run is Run.STOPPED
        assert await ledger.save(now, replace(now, starts=1))

    run(story())


def test_only_what_is_no_longer_wanted_is_forgotten() -> None:
    async def story() -> None:
        ledger = await loaded(SimulatedDisk())
        await ledger.accept(snapshot(1))
        assert not await ledger.forget(uid(1))
        await ledger.accept(snapshot(revision=2))
        assert await ledger.forget(uid(1))
        assert await ledger.forget(uid(1))
        assert ledger.book.instances == {}

    run(story())
