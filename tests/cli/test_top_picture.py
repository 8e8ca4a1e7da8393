"""The picture of a host and the sums of a fleet, as a person sees them: kept texts of named machines with made claims."""

import io
import sys
from collections.abc import Callable

import pytest

from casemate_cli import picture, term
from casemate_cli.picture import Style
from casemate_core.claims import HostClaims
from casemate_core.fit import (
    CpuPolicy,
    CpuRequest,
    Fit,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    NicRequest,
    Request,
    ThreadPolicy,
    fit,
)
from casemate_core.topology import Topology
from casemate_manager.api import picture as messages
from casemate_wire.v1 import top_pb2 as pb
from support.hosts import host

GIB = 1024
PAGE_1G = 1024 * 1024
Golden = Callable[[str, str], None]
PLAIN = Style()
RICH = Style(rich=True)


def dedicated(count: int, gib: int, *, pages: bool = False, **more: object) -> Request:
    threads = more.pop("threads", ThreadPolicy.ANY)
    cpu = CpuRequest(count, policy=CpuPolicy.DEDICATED, threads=threads)  # type: ignore[arg-type]
    return Request(cpu, MemoryRequest(gib * GIB, page_kib=PAGE_1G if pages else 0), **more)  # type: ignore[arg-type]


def filled(topology: Topology, wanted: dict[str, Request]) -> HostClaims:
    claims = HostClaims.empty()
    for owner, request in wanted.items():
        found = fit(topology, claims, request, owner=owner)
        assert isinstance(found, Fit), found.sentence
        claims = claims.add(found.claim)
    return claims


def drawn(name: str, wanted: dict[str, Request]) -> pb.HostCapacity:
    topology = host(name)
    names = {owner: ("team", owner) for owner in wanted if not owner.startswith("foreign:")}
    found = messages.of_host(topology, filled(topology, wanted), names)
    found.name = name
    return found


SHARED = Request(CpuRequest(3), MemoryRequest(4 * GIB))
MADE: dict[str, dict[str, Request]] = {
    "hgx-h200": {
        "train-0": dedicated(
            48, 512, pages=True, gpus=(GpuRequest(4, link=GpuLink.NVLINK),), nics=(NicRequest("compute"),) * 4
        ),
        "infer-0": dedicated(7, 64, pages=True, gpus=(GpuRequest(1),)),
        "web-0": SHARED,
    },
    "epyc-nps4": {
        "ci-0": dedicated(30, 40, threads=ThreadPolicy.ISOLATE),
        "ci-1": dedicated(3, 4),
        "foreign:6f1d": SHARED,
    },
    "gb200": {"train-0": dedicated(70, 200, gpus=(GpuRequest(1),))},
    "ran-edge": {"du-0": dedicated(9, 16, pages=True, nics=(NicRequest("fronthaul"), NicRequest("midhaul")))},
    "offlined": {"a-0": dedicated(5, 4), "b-0": SHARED},
    "laptop": {"a-0": dedicated(3, 4)},
    "uneven": {"a-0": dedicated(9, 10), "b-0": dedicated(4, 13)},
}


@pytest.mark.parametrize("name", MADE)
def test_a_host_in_plain_ascii(golden: Golden, name: str) -> None:
    text = "\n".join(picture.host(drawn(name, MADE[name]), PLAIN)) + "\n"
    assert text.isascii()
    golden(f"top/{name}.txt", text)


def test_a_host_on_a_terminal_that_shows_more(golden: Golden) -> None:
    golden(
        "top/hgx-h200-rich.txt", "\n".join(picture.host(drawn("hgx-h200", MADE["hgx-h200"]), RICH, wide=True)) + "\n"
    )


@pytest.mark.parametrize("name", MADE)
def test_every_thread_is_drawn_once(name: str) -> None:
    found = drawn(name, MADE[name])
    threads = [t for cell in found.cells for cache in cell.caches for core in cache.cores for t in core.threads]
    assert sorted(t.number for t in threads) == list(host(name).online)
    lines = picture.host(found, PLAIN)
    rows = [line[15:] for line in lines if line.startswith(("  cores ", "  L3 ", " " * 15))]
    text = "".join(rows).replace(" ", "")
    assert len(text) == len(threads)
    for i, holder in enumerate(found.holders):
        owned = sum(t.holder == i + 1 for t in threads)
        assert text.count(picture.LETTERS[i]) == owned, holder.instance


def test_lines_keep_to_the_width() -> None:
    for columns in (60, 80, 120, 200):
        for line in picture.host(drawn("epyc-nps4", MADE["epyc-nps4"]), Style(columns)):
            cores = line.startswith(("  cores ", "  L3 ", " " * 15))
            assert not cores or len(line) <= columns, (columns, line)


def test_what_a_host_says_cannot_command_a_terminal() -> None:
    evil = "\x1b[2Jx\n\x9b"
    found = pb.HostCapacity(
        name=evil,
        closed=evil,
        offline=evil,
        amounts=[pb.NamedAmount(name="disk_mib", amount=pb.Amount(total=1, free=1))],
        stranded=[pb.StrandedAmount(name=evil, cause=evil, amount=2, cell=0, where=[evil])],
        cells=[
            pb.CellCapacity(
                id=0,
                amounts=[
                    pb.NamedAmount(name=n, amount=pb.Amount(total=2, free=2))
                    for n in (evil, f"vfs:{evil}", f"pages:{evil}")
                ],
                caches=[pb.CacheCapacity(cores=[pb.CoreCapacity(threads=[pb.ThreadCapacity(state=evil)])])],
            )
        ],
        gpus=[pb.FunctionCapacity(id=evil, what=evil, stranded=evil)],
        devices=[pb.FunctionCapacity(id=evil, what=evil, used_milli=1000, holders=[900])],
        ports=[pb.PortCapacity(mac=evil, networks=[evil], vfs=pb.Amount(total=-1))],
        holders=[pb.Holder(tenant=evil, instance=evil, threads=evil), pb.Holder(foreign=evil)],
    )
    group = pb.CapacityGroup(
        value=evil, amounts=list(found.cells[0].amounts), stranded=found.stranded, cells=[pb.CellKind(kind=evil)]
    )
    lines = picture.host(found, PLAIN, wide=True) + list(picture.group_lines(group, evil, PLAIN, wide=True))
    row = picture.host_row(pb.HostHeadroom(name=evil, closed=evil, stranded=found.stranded), ["threads"])
    for line in (*lines, *map(term.clean, row)):
        assert line.isprintable(), line


@pytest.mark.parametrize(
    ("amounts", "shown"),
    [
        ((0, 0, 0, 0), "-" * 24),
        ((100, 0, 100, 0), "-" * 24),
        ((100, 100, 0, 0), "#" * 24),
        ((10_000, 1, 9_999, 0), "#" + "-" * 23),
        ((10_000, 9_999, 1, 0), "#" * 23 + "-"),
        ((10_000, 9_999, 1, 1), "#" * 23 + "!"),
        ((10_000, 1, 9_999, 9_999), "#" + "!" * 23),
        ((24, 12, 12, 6), "#" * 12 + "!" * 6 + "-" * 6),
    ],
)
def test_bars_never_hide_the_last_one(amounts: tuple[int, int, int, int], shown: str) -> None:
    total, used, free, stranded = amounts
    assert picture.bar(pb.Amount(total=total, used=used, free=free, stranded=stranded), PLAIN) == shown


def test_more_holders_than_letters_share_one_sign() -> None:
    assert len(set(picture.LETTERS)) == len(picture.LETTERS)
    found = pb.HostCapacity(
        cells=[
            pb.CellCapacity(
                caches=[
                    pb.CacheCapacity(
                        cores=[
                            pb.CoreCapacity(threads=[pb.ThreadCapacity(state="held", holder=i)]) for i in (61, 62, 63)
                        ]
                    )
                ]
            )
        ]
    )
    assert "  cores        9 * *" in picture.host(found, PLAIN)


def test_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise ValueError

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert Style.of_output() == Style(100, rich=False, colour=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    style = Style.of_output()
    assert style == Style(80, rich=True, colour=True)
    assert "\x1b[31m!" in "\n".join(picture.host(drawn("epyc-nps4", MADE["epyc-nps4"]), style))


@pytest.mark.parametrize(
    ("mib", "text"), [(0, "0Mi"), (300, "300Mi"), (1024, "1Gi"), (1536, "1.5Gi"), (1 << 20, "1Ti"), (120_000, "117Gi")]
)
def test_sizes(mib: int, text: str) -> None:
    assert picture.size(mib) == text


def test_a_group_of_a_fleet(golden: Golden) -> None:
    amount = pb.Amount(total=480, used=200, free=280, stranded=30)
    group = pb.CapacityGroup(
        all=True,
        hosts=40,
        unknown=1,
        closed=2,
        amounts=[
            pb.NamedAmount(name="threads", amount=amount),
            pb.NamedAmount(name="pages:1048576", amount=amount),
            pb.NamedAmount(name="pages:2048", amount=amount),
            pb.NamedAmount(name="vfs:dc", amount=amount),
        ],
        stranded=[
            pb.StrandedAmount(name="threads", cause="odd-core", amount=30, hosts=12),
            pb.StrandedAmount(name="gpus", cause="no-cpu", amount=1, hosts=1),
        ],
        cells=[pb.CellKind(kind="gpu", cells=80, amounts=[pb.NamedAmount(name="memory_mib", amount=amount)])],
    )
    golden("top/group.txt", "\n".join(picture.group_lines(group, "", PLAIN, wide=True)) + "\n")
    group.all, group.value = False, "r1"
    assert next(picture.group_lines(group, "rack", PLAIN, wide=False)).startswith("rack=r1  40 hosts")
