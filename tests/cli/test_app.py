"""The verbs: found by name, documented, imported when they are called for, and wrong command lines told as every error."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from casemate_cli import gendocs
from casemate_cli.__main__ import run
from casemate_cli.app import VERBS, root

HEAVY = (
    "grpc",
    "google.protobuf",
    "yaml",
    "rich",
    "asyncio",
    "json",
    "casemate_wire.v1",
    "casemate_wire.schema",
    "numpy",
)


def verbs() -> list[tuple[str, str]]:
    return [(name, text) for family in VERBS.values() for name, (_, _, text) in family.items()]


@pytest.mark.parametrize(("name", "text"), verbs())
def test_the_table_of_verbs_tells_what_the_verb_tells(name: str, text: str) -> None:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    assert command.name == name
    first = (command.help or "").split("\n\n")[0]
    assert " ".join(first.split()).startswith(text.rstrip(".").split(";")[0])


@pytest.mark.parametrize("name", [name for name, _ in verbs()])
def test_help_of_every_verb(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert name in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom casemate_cli.__main__ import run\nassert run(['--help']) == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gte", "env"], "did you mean get?"),
        (["get"], "Missing argument"),
        (["get", "env", "--nope"], "No such option"),
        (["apply"], "Missing option"),
        (["wait", "env/a", "--for", "ready", "--timeout", "soon"], "is not a quantity"),
        (["logs", "a", "--tail", "0"], "--tail"),
        (["delete"], "say what to delete"),
        (["get", "env/a", "-l", "x=y"], "exclude one another"),
        (["apply", "-f", "-", "--prune"], "--prune needs a selector"),
    ],
)
def test_a_wrong_command_line_is_told_in_the_one_shape(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_the_documents_are_fresh() -> None:
    assert gendocs.main(["--check"]) == 0


def test_an_unreachable_manager_is_told_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "casemate_cli", "get", "env", "--manager", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
        env={**os.environ, "CASEMATE_INSECURE_LOOPBACK": "1"},
    )
    assert done.returncode == 8
    assert done.stdout == ""
    assert "no manager answers at 127.0.0.1:1" in done.stderr
    assert "remedy:" in done.stderr


def test_without_a_certificate_nothing_is_sent(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CASEMATE_")}
    for plain, manager in (("0", "127.0.0.1:1"), ("1", "192.0.2.1:7443"), ("1", "manager.example:7443")):
        done = subprocess.run(
            [sys.executable, "-m", "casemate_cli", "get", "env", "--manager", manager],
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
            env={**environ, "CASEMATE_CONFIG": str(tmp_path / "none"), "CASEMATE_INSECURE_LOOPBACK": plain},
        )
        assert done.returncode == 5
        assert "there is no certificate" in done.stderr


def test_help_reads_a_closed_pipe_quietly() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "casemate_cli", "explain", "environment", "-r"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(10) == 0
