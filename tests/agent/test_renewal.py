"""A certificate that is kept fresh, on virtual time: at two thirds, through managers that are away, and after a long absence."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from casemate_agent.enrolment import identity as identities
from casemate_agent.enrolment.enrol import JoinRefused, OtherAuthority, pinned
from casemate_agent.enrolment.identity import Identity, IdentityDamaged
from casemate_agent.enrolment.renewal import Renewal
from casemate_core.errors import CasemateError, Unavailable
from support.virtual import EPOCH_S, VirtualLoop, run_virtual

DAY_S = 86400.0


def identity(not_before_s: float = EPOCH_S) -> Identity:
    return Identity("h7", "m:7443", "m:7444", "KEY", "CERT", "ROOTS", not_before_s, not_before_s + DAY_S)


class Asked:
    """A manager that renews, or fails as it is told, and a disk."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.failing: CasemateError | None = None
        self.times: list[float] = []
        self.saved: list[Identity] = []

    async def renew(self, old: Identity) -> Identity:
        self.times.append(self.loop.time())
        if self.failing is not None:
            raise self.failing
        return old.renewed("NEW", "ROOTS2", self.loop.wall(), self.loop.wall() + DAY_S)

    async def save(self, fresh: Identity) -> None:
        self.saved.append(fresh)

    def start(self, first: Identity) -> tuple[Renewal, "asyncio.Task[None]"]:
        renewal = Renewal(first, self.renew, self.save, self.loop.wall, Random(3))
        return renewal, asyncio.ensure_future(renewal.run())


def test_it_renews_at_two_thirds_and_saves_before_it_is_used() -> None:
    async def main(loop: VirtualLoop) -> None:
        asked = Asked(loop)
        renewal, task = asked.start(identity())
        await asyncio.sleep(0.6 * DAY_S)
        assert asked.times == []
        await asyncio.sleep(0.08 * DAY_S)
        assert len(asked.times) == 1
        assert asked.saved == [renewal.identity]
        assert (renewal.identity.certificate, renewal.identity.roots, renewal.identity.key) == ("NEW", "ROOTS2", "KEY")
        await asyncio.sleep(10 * DAY_S)
        assert 15 <= len(asked.times) <= 17
        task.cancel()

    run_virtual(main)


def test_a_manager_that_is_away_is_asked_again_and_less_and_less_often() -> None:
    async def main(loop: VirtualLoop) -> None:
        asked = Asked(loop)
        asked.failing = Unavailable("away")
        renewal, task = asked.start(identity())
        await asyncio.sleep(0.9 * DAY_S)
        gaps = [b - a for a, b in zip(asked.times, asked.times[1:], strict=False)]
        assert len(gaps) > 20
        assert max(gaps) <= 300.0
        assert sum(gaps[-10:]) > sum(gaps[:10])
        asked.failing = None
        await asyncio.sleep(600.0)
        assert renewal.identity.certificate == "NEW"
        task.cancel()

    run_virtual(main)


def test_who_is_refused_asks_rarely() -> None:
    async def main(loop: VirtualLoop) -> None:
        asked = Asked(loop)
        asked.failing = JoinRefused("revoked")
        _, task = asked.start(identity())
        await asyncio.sleep(DAY_S)
        assert len(asked.times) < 150
        task.cancel()

    run_virtual(main)


def test_after_a_long_absence_it_renews_before_it_dials() -> None:
    async def main(loop: VirtualLoop) -> None:
        asked = Asked(loop)
        asked.failing = Unavailable("away")
        renewal, task = asked.start(identity(EPOCH_S - 30 * DAY_S))
        with pytest.raises(Unavailable, match="past its time"):
            await renewal.current()
        waiting = asyncio.ensure_future(renewal.current())
        await asyncio.sleep(1.0)
        asked.failing = None
        assert (await waiting).certificate == "NEW"
        task.cancel()

    run_virtual(main)


def test_the_file_is_private_whole_and_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    assert identities.load(folder) is None
    identities.save(folder, identity())
    assert identities.load(folder) == identity()
    assert (folder / "identity.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "KEY" not in repr(identity())
    (folder / "identity.json").write_text("{")
    with pytest.raises(IdentityDamaged):
        identities.load(folder)


def test_a_token_has_one_key_however_often_it_is_tried(tmp_path: Path) -> None:
    first = identities.pending_key(tmp_path, "aa")
    assert identities.pending_key(tmp_path, "aa") == first
    assert identities.pending_key(tmp_path, "bb") != first
    identities.save(tmp_path, identity())
    assert [p.name for p in tmp_path.iterdir()] == ["identity.json"]


def test_a_list_without_the_pinned_authority_is_nobodys(tmp_path: Path) -> None:
    for roots in (
        b"",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"\xff\x00-----END CERTIFICATE-----",
    ):
        with pytest.raises(OtherAuthority):
            pinned(roots, "0" * 64)
