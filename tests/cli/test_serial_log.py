"""`casemate console --log`: what a guest wrote, as lines that no terminal obeys."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_cli.seriallog import Lines, printable
from support.fleet import Fleet


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[0;32m  OK  \x1b[0m Started\r", "  OK   Started"),
        ("\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link", "textlink"),
        ("\x1bc\x1b(Bplain", "plain"),
        ("10%\r50%\r100%\r", "100%"),
        ("bell\x07 \x9b31m null\x00", "bell\\x07 \\x9b31m null\\x00"),
        ("cut off \x1b[", "cut off \\x1b["),
    ],
)
def test_sequences_are_left_out_and_the_rest_is_escaped(line: str, shown: str) -> None:
    assert printable(line) == shown


@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"\x1b[", b"\x1b]", b"m", b"\r\n", b"\x9b", b"\xc2"])))
def test_whatever_a_guest_writes_is_printable(pieces: list[bytes]) -> None:
    lines, whole = Lines(), Lines()
    shown = [line for piece in pieces for line in lines.feed(piece)] + lines.feed(b"", final=True)
    assert all(line.replace("\t", "").isprintable() for line in shown)
    assert shown == whole.feed(b"".join(pieces), final=True), "how it was cut into pieces does not matter"


MANIFEST = """\
apiVersion: casemate/v1
kind: Environment
metadata: {name: serial}
spec: {cpu: {count: 1}, memory: {size: 256Mi}, image: debian-13}
"""


@pytest.fixture
def name(fleet: Fleet) -> Iterator[str]:
    fleet.run("apply", "-f", "-", stdin=MANIFEST).ok()
    fleet.run("wait", "env/serial", "--for", "ready", "--timeout", "60s").ok()
    yield "serial"
    fleet.run("delete", "env", "serial").ok()


def test_the_log_is_read_without_a_terminal(fleet: Fleet, name: str) -> None:
    first = fleet.run("console", name, "--log").ok()
    assert first.startswith("simulated kernel, boot ")
    fleet.run("reset", name, "--timeout", "60s").ok()
    assert fleet.run("console", f"{name}-0", "--log").ok().startswith(first)
    assert len(fleet.run("console", name, "--log", "--since", "10m").ok().splitlines()) == 2
    assert fleet.run("console", name, "--since", "10m").code == 1
    fleet.run("stop", name, "--wait", "--timeout", "60s").ok()
    assert fleet.run("console", name, "--log").ok().startswith(first), "of one that is off, too"
    assert fleet.run("console", "nowhere", "--log").code == 4
