"""What a guest prints, where it goes into a pipe; and archives that a guest made up."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_cli.failure import Failure
from casemate_cli.pipes import Escaped
from casemate_cli.tarball import pack, unpack

SEQUENCES = st.sampled_from(
    [
        b"\x1b[2J",
        b"\x1b]0;owned\x07",
        b"\x1bP1$r\x1b\\",
        b"\x9b31m",
        b"\xc2\x9b31m",
        b"\r",
        b"\n",
        b"\r\n",
        b"\x08",
        b"\xe2\x80\xae",
    ]
)


@given(st.lists(st.binary(max_size=12) | SEQUENCES | st.text(max_size=6).map(str.encode), max_size=12))
def test_nothing_that_a_terminal_obeys_gets_into_a_pipe(pieces: list[bytes]) -> None:
    escaped = Escaped()
    text = "".join(map(escaped.feed, pieces)) + escaped.feed(b"", final=True)
    assert all(c.isprintable() or c in "\n\t" for c in text)
    whole = Escaped()
    assert whole.feed(b"".join(pieces)) + whole.feed(b"", final=True) == text, "how it was cut makes no difference"


@given(
    st.lists(
        st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="\\"), max_size=20), max_size=6
    )
)
def test_plain_text_goes_through_as_it_is(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    kept = text if text.isprintable() or all(c.isprintable() or c == "\n" for c in text) else None
    if kept is not None:
        escaped = Escaped()
        assert escaped.feed(kept.replace("\n", "\r\n").encode()) + escaped.feed(b"", final=True) == kept


# --- archives ---------------------------------------------------------------------------------------------------------

KINDS = {
    "file": tarfile.REGTYPE,
    "folder": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "device": tarfile.CHRTYPE,
}


def archive(*members: tuple[str, str, str]) -> bytes:
    """A tar of (name, kind, target) in any order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = KINDS[kind], target, 0o6777
            member.size = 3 if kind == "file" else 0
            tar.addfile(member, io.BytesIO(b"bad"))
    return out.getvalue()


HOSTILE = [
    [("../out", "file", "")],
    [("x/../../out", "file", "")],
    [("/tmp/out", "file", "")],
    [("x", "folder", ""), ("x/l", "link", "/"), ("x/l/out", "file", "")],
    [("x", "link", "/etc")],
    [("x", "folder", ""), ("x/l", "hard", "/etc/passwd")],
    [("x", "folder", ""), ("x/p", "fifo", "")],
    [("x", "folder", ""), ("x/d", "device", "")],
    [("x", "folder", ""), ("x//a", "file", "")],
    [("x", "folder", ""), ("x/.", "file", "")],
    [("y", "file", "")],
]


@pytest.mark.parametrize("members", HOSTILE, ids=str)
def test_a_hostile_archive_is_refused(tmp_path: Path, members: list[tuple[str, str, str]]) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(Failure, match="archive is refused"):
        unpack(iter([archive(*members)]), str(tmp_path / "in/target"), "n")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink() or p.is_file()]


PARTS = st.lists(st.sampled_from(["x", "..", "", ".", "a", "b", "/"]), min_size=1, max_size=5).map("/".join)


@given(st.lists(st.tuples(PARTS, st.sampled_from(sorted(KINDS)), st.sampled_from(["/", "..", "a", "x"])), max_size=6))
def test_whatever_an_archive_holds_nothing_is_made_outside(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, str, str]]
) -> None:
    base = tmp_path_factory.mktemp("a")
    (base / "in").mkdir()
    try:
        unpack(iter([archive(*members)]), str(base / "in/target"), "n")
    except Failure:
        pass
    assert [p.name for p in base.iterdir()] == ["in"]
    assert {p.name for p in (base / "in").iterdir()} <= {"target"}
    for path in (base / "in").rglob("*"):
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o7000 == 0


@given(st.binary(max_size=3000))
def test_what_is_no_archive_is_told(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    base = tmp_path_factory.mktemp("b")
    try:
        unpack(iter([data]), str(base / "target"), "n")
    except Failure:
        pass


def test_nothing_is_written_through_a_link_that_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "in/x").mkdir(parents=True)
    (tmp_path / "in/x/l").symlink_to(tmp_path)
    data = archive(("x", "folder", ""), ("x/l", "folder", ""), ("x/l/out", "file", ""))
    with pytest.raises(Failure, match="nothing is written through it"):
        unpack(iter([data]), str(tmp_path / "in"), "x")
    assert not (tmp_path / "out").exists()


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "s"
    (source / "deep" / ("d" * 200)).mkdir(parents=True)
    (source / "deep" / ("d" * 200) / "f").write_bytes(b"1" * 100_001)
    (source / "empty").mkdir()
    skipped: list[str] = []
    pieces = b"".join(pack(source, skipped.append))
    unpack(iter([pieces[at : at + 777] for at in range(0, len(pieces), 777)]), str(tmp_path / "t"), "n")
    assert skipped == []
    assert {p.relative_to(source) for p in source.rglob("*")} == {
        p.relative_to(tmp_path / "t") for p in (tmp_path / "t").rglob("*")
    }
    with pytest.raises(Failure, match="no whole archive"):
        unpack(iter([pieces[:70_000]]), str(tmp_path / "u"), "n")
    assert not list((tmp_path / "u").rglob("*.part"))
