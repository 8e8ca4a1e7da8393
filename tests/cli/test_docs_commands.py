"""Every command of the documents is run, as it stands there, on a fleet of simulated hosts.

What is collected: the lines with ``$`` of each ```console block, and what README's transcript says comes next. The page of
errors is a transcript of its own (`test_errors_doc`). A command that needs a real VM stands in `ELSEWHERE` with the place
where it is run; a command of neither list, and an entry that no document has any more, fail.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fleet import Fleet, casemate, clean_environment, free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    {ROOT / "README.md", ROOT / "examples/README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs/errors.md"}
)
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
NEXT = re.compile(r"^  (casemate [^\n]*?)(?:  +[^\n]*)?$", re.MULTILINE)

#: Command → where it is run instead.
ELSEWHERE = {
    "casemate exec -it hello-0.web -- sh": "a shell needs a container with one: tests/journeys/test_hello.py",
    "casemate exec --vm hello-0 -- podman ps": "podman needs a guest: tests/journeys/test_hello.py",
    "casemate ssh hello": "a login needs sshd: tests/journeys/test_hello.py",
    "casemate ssh hello-0 -- uname -a": "a login needs sshd: tests/journeys/test_hello.py",
    "casemate ssh hello -- -L 8080:127.0.0.1:8080 -N": "a login needs sshd: tests/journeys/test_hello.py",
    "casemate dev down": "it would end the fleet of these tests: below, with one of its own in tests/cli/test_docs_commands.py",
}
#: Names of the documents → of this fleet.
NAMES = {
    r"\bh1\b": "sim-1",
    r"=kvm\b": "=simulated",  # what such a host says of itself
    r"port-forward hello 8080": f"port-forward hello {free_port()}:8080",
    r"9000:9001": f"{free_port()}:9001",
    r"~/": "$HOME/",
}
#: Commands whose answer is another exit code than 0 here.
CODES = {"casemate logs hello --previous --since 2h": 7}  # it was started once
#: They go on until they are interrupted.
ENDLESS = re.compile(r" -f\b(?! \S+\.yaml| fleet/)| -w\b|^casemate (console (?!.*--log)|port-forward)")
_SHELLS = re.compile(r"^(bash|zsh|fish): +")


def blocks() -> list[tuple[str, tuple[str, ...]]]:
    """(page, commands that stand together), in the order of the pages."""
    found = []
    for page in PAGES:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        found += [(name, tuple(w[2:] for w in b.splitlines() if w.startswith("$ "))) for b in BLOCK.findall(text)]
        if name == "README.md":
            found.append((name, tuple(NEXT.findall(text.partition("next:")[2].partition("```")[0]))))
    return [(name, lines) for name, lines in found if lines]


BLOCKS = blocks()
#: An environment whose pod has a label.
LABELLED = """
apiVersion: casemate/v1
kind: Environment
metadata: {name: labelled, labels: {app: web}}
spec:
  cpu: {count: 1}
  memory: {size: 256Mi}
  image: debian-13
  pods:
    - apiVersion: v1
      kind: Pod
      metadata: {name: web, labels: {app: web}}
      spec: {containers: [{name: app, image: "localhost/hello:1"}]}
"""
#: A program that may change things.
PROGRAM = """
apiVersion: casemate/v1
kind: User
metadata: {name: ci-ran}
spec: {type: service}
---
apiVersion: casemate/v1
kind: RoleBinding
metadata: {name: default-ci-ran}
spec: {role: operator, users: [ci-ran], scope: tenant/default}
"""


def test_the_exceptions_are_few_and_of_commands_that_are_there() -> None:
    there = {line for _, lines in BLOCKS for line in lines}
    assert set(ELSEWHERE) <= there
    assert set(CODES) <= there
    assert len(ELSEWHERE) < 10
    for command, why in ELSEWHERE.items():
        assert f'"{command}"' in (ROOT / why.rpartition(" ")[2]).read_text(), f"{command} is not run where it says"


@pytest.mark.timeout(300)
def test_the_fleet_that_is_nobody_elses_ends_as_the_documents_say(tmp_path: Path) -> None:
    """The folder is the default one, of a person of its own."""
    port = free_port()
    environ = clean_environment(tmp_path, f"127.0.0.1:{port}")
    casemate(
        "dev", "up", "--simulated", "1", "--no-example", "--port", str(port), environ=environ, timeout_s=120
    ).ok()  # fmt: skip
    kept = tmp_path / "state/casemate/dev"
    assert (kept / "pids/manager.json").is_file()
    down = "casemate dev down"
    assert casemate(*down.split()[1:], environ=environ, timeout_s=120).code == 0
    assert not kept.exists()
    assert casemate("version", environ=environ).code == 8


@pytest.fixture(scope="module")
def folder(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the commands are run: what their examples name is there."""
    made = tmp_path_factory.mktemp("docs")
    (made / "examples").symlink_to(ROOT / "examples")
    (made / "fleet").mkdir()
    (made / "fleet/one.yaml").write_text(
        "{apiVersion: casemate/v1, kind: Environment, metadata: {name: one, labels: {team: ran}},"
        " spec: {cpu: {count: 1}, memory: {size: 256Mi}, image: debian-13, run: stopped}}\n"
    )
    (made / "site").mkdir()
    (made / "site/index.html").write_text("<p>hello</p>\n")
    (made / ".config/fish/completions").mkdir(parents=True)
    fleet.run("label", "host", "sim-1", "rack=r1", "site=fra1", "--overwrite").ok()
    (made / "own.yaml").write_text((made / "fleet/one.yaml").read_text().replace("name: one", "name: own"))
    fleet.run("apply", "-f", "-", stdin=LABELLED).ok()
    fleet.run("apply", "-f", "-", stdin=PROGRAM).ok()
    (made / "key").write_text(fleet.run("key", "create", "ci-ran").ok().strip())
    yield made
    fleet.run("delete", "env", "hello", "labelled", "own", "--ignore-not-found").ok()
    fleet.run("delete", "rolebinding", "default-ci-ran").ok()
    fleet.run("delete", "user", "ci-ran").ok()
    fleet.run("label", "host", "sim-1", "rack-", "site-").ok()


def shell(fleet: Fleet, folder: Path, line: str) -> "subprocess.CompletedProcess[str]":
    program = f'casemate() {{ {shlex.quote(sys.executable)} -m casemate_cli "$@"; }}\nset -o pipefail\n{line}'
    return subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env={**fleet.environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("page", "lines"), BLOCKS, ids=[f"{page}: {lines[0]}" for page, lines in BLOCKS])
def test_the_commands_of_a_block(fleet: Fleet, folder: Path, page: str, lines: tuple[str, ...]) -> None:
    for command in lines:
        if command not in ELSEWHERE:
            run(fleet, folder, page, command)


def run(fleet: Fleet, folder: Path, page: str, command: str) -> None:
    if "hello" in command:
        ready = ("wait", "env/hello", "--for", "ready", "--timeout", "60s")
        if fleet.run(*ready).code:  # an earlier command has deleted it
            fleet.run("apply", "-f", str(ROOT / "examples/hello.yaml")).ok()
            fleet.run(*ready).ok()
    line = _SHELLS.sub("", command)
    if command.startswith("zsh: "):  # bash cannot take what is meant for zsh
        line = "casemate completion zsh"
    for name, ours in NAMES.items():
        line = re.sub(name, ours, line)
    line = line.replace("cak_…", "$(cat key)")
    if command == "casemate wait env hello --for delete":
        fleet.run("delete", "env", "hello", "--no-wait").ok()
    if ENDLESS.search(command):
        line = line.replace(
            "casemate ", f"timeout --foreground --signal INT 4 {shlex.quote(sys.executable)} -m casemate_cli ", 1
        )
        done = shell(fleet, folder, line)
        assert done.returncode in (0, 124, 130), (page, done.stdout, done.stderr)
        assert "error" not in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stdout or ">" in line or "console" in line or "denied" in line, done.stderr
        return
    done = shell(fleet, folder, line)
    assert done.returncode == CODES.get(command, 0), (page, done.stdout, done.stderr)
