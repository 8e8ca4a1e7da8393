"""What strangers wrote cannot command a terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_cli import term

HOSTILE = [
    ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
    ("\x9b31m", r"\x9b31m"),
    ("line\r\nline", r"line\x0d\nline"),
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("abc\u202edcba", r"abc\u202edcba"),
    ("a\x00b\x7f", r"a\x00b\x7f"),
    ("tag\U000e0041", r"tag\U000e0041"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_clean_escapes_what_a_terminal_obeys(text: str, shown: str) -> None:
    assert term.clean(text) == shown


def test_clean_keeps_ordinary_text() -> None:
    assert term.clean("Grüße, 世界 ✓") == "Grüße, 世界 ✓"
    assert term.clean("a\tb\n", keep="\t\n") == "a\tb\n"


@given(st.text())
def test_clean_leaves_nothing_that_is_not_printable(text: str) -> None:
    assert term.clean(text).isprintable()


def test_no_colour_in_a_pipe_or_against_the_users_will(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert term.paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert term.paint("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert term.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert term.paint("x", "red", Terminal()) == "x"


def test_progress_in_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with term.Progress("one") as progress:
        progress.update("two")
        progress.update("two")
        progress.done("over")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:2] == ["one", "two"]
    assert lines[2].startswith("✓ over (")
    assert "\x1b" not in captured.err
