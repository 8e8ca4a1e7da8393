"""Fifty texts of secrets through real processes of a manager and an agent: each is on its host, and nowhere else."""

import base64
import json
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.fleet import Done, casemate, clean_environment, free_port
from support.realfleet import until

COUNT = 50
CANARIES = [f"canary-{n:02d}-quothe-{n * 104729:08x}" for n in range(COUNT)]
LATER = "canary-50-rotated-0badcafe"


def forms(canary: str) -> tuple[bytes, ...]:
    """A text, and what would hide it from a plain search."""
    raw = canary.encode()
    return raw, base64.b64encode(raw).rstrip(b"=")[:-1], raw.hex().encode(), canary.encode("utf-16-le"), raw[::-1]


FORMS = [form for canary in (*CANARIES, LATER) for form in forms(canary)]


def hits(data: bytes) -> int:
    return sum(form in data for form in FORMS)


def secrets(first: str = CANARIES[0]) -> list[dict[str, Any]]:
    texts = [first, *CANARIES[1:]]
    return [
        {
            "apiVersion": "casemate/v1",
            "kind": "Secret",
            "metadata": {"name": f"s{n}"},
            "spec": {"data": {f"k{i}": texts[i] for i in range(n * 10, n * 10 + 10)}},
        }
        for n in range(5)
    ]


def pod() -> dict[str, Any]:
    """Half of the texts as variables, half as files."""
    variables = [
        {"name": f"V{n}", "valueFrom": {"secretKeyRef": {"name": f"s{n // 10}", "key": f"k{n}"}}}
        for n in range(COUNT // 2)
    ]
    items = [{"key": f"k{n}", "path": f"f{n}"} for n in range(25, 30)]
    volumes: list[dict[str, Any]] = [{"name": "s2", "secret": {"secretName": "s2", "items": items}}]
    volumes += [{"name": f"s{n}", "secret": {"secretName": f"s{n}"}} for n in (3, 4)]
    mounts = [{"name": v["name"], "mountPath": f"/{v['name']}"} for v in volumes]
    container = {"name": "c", "image": "localhost/hello:1", "env": variables, "volumeMounts": mounts}
    spec = {"containers": [container], "volumes": volumes}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": spec}


def core_limit(package: str) -> set[str]:
    """Largest core dumps, in bytes, of all processes of a package that run now."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if package.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                limits = (process / "limits").read_text().splitlines()
                found |= {words.split()[4] for words in limits if words.startswith("Max core file size")}
        except OSError:
            continue
    return found


@contextmanager
def watched_arguments(seen: set[bytes]) -> Iterator[None]:
    """The arguments and environments of all processes, looked at again and again."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            for process in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    try:
                        data = (process / name).read_bytes()
                    except OSError:
                        continue
                    if hits(data):
                        seen.add(data)

    thread = threading.Thread(target=look, name="arguments")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.timeout(300)
def test_fifty_canaries_through_real_processes_are_found_in_one_place_alone(tmp_path: Path) -> None:
    root, port = tmp_path / "dev", free_port()
    environ = clean_environment(tmp_path, f"127.0.0.1:{port}")
    told: list[bytes] = []
    arguments: set[bytes] = set()

    def run(*words: str, stdin: str = "") -> Done:
        done = casemate(*words, environ=environ, stdin=stdin, timeout_s=100)
        told.append((" ".join(words) + done.out + done.err).encode())
        return done

    def apply(*documents: dict[str, Any]) -> Done:
        return run("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, documents)))

    def tails() -> str:
        return (told[-1] if told else b"").decode()

    up = ("dev", "up", "--simulated", "1", "--port", str(port), "--no-example", "--dir", str(root))
    casemate(*up, environ=environ, timeout_s=100).ok()
    try:
        with watched_arguments(arguments):
            apply(*secrets()).ok()
            environment = {
                "apiVersion": "casemate/v1",
                "kind": "Environment",
                "metadata": {"name": "a"},
                "spec": {
                    "cpu": {"count": 1},
                    "memory": {"size": "512Mi"},
                    "image": "debian-13",
                    "disk": {"size": "8Gi"},
                    "pods": [pod()],
                },
            }
            apply(environment).ok()
            run("wait", "env/a", "--for", "condition=Ready", "--timeout", "90s").ok()

            def private() -> list[Path]:
                return [p for p in root.rglob("*.json") if p.parent.name == "private"]

            assert len(private()) == 1 and hits(private()[0].read_bytes()) == COUNT, "each is on its host"
            assert private()[0].stat().st_mode & 0o777 == 0o600 and private()[0].parent.stat().st_mode & 0o077 == 0
            apply(secrets(LATER)[0]).ok()
            until("the new text", lambda: LATER.encode() in private()[0].read_bytes(), 90, tails)
            assert CANARIES[0].encode() not in private()[0].read_bytes(), "the old one is gone"
            kinds = "secrets,env,inst,pods,placements,events,hosts,operations"
            for words in (
                ("get", kinds, "-o", "yaml"),
                ("get", "secret", "s0", "-o", "yaml"),
                ("describe", "secret", "s1"),
                ("describe", "env", "a"),
                ("describe", "host"),
                ("events",),
                ("why", "a"),
                ("audit", "-o", "json"),
                ("audit", "--verify"),
                ("exec", "a-0", "--", "env"),
                ("logs", "a"),
            ):
                run(*words)
            run("diff", "-f", "-", stdin="\n---\n".join(map(json.dumps, secrets())))
            bad = secrets()[0]
            bad["spec"]["data"] |= {"bad key": CANARIES[3], "nul": CANARIES[4] + "\0"}
            assert apply(bad).code != 0
            assert apply({**secrets()[1], "specc": {"data": CANARIES[5]}}).code != 0
            bundle = tmp_path / "bundle.tar.gz"
            run("support-bundle", "-o", str(bundle)).ok()
            with tarfile.open(bundle) as archive:
                names = archive.getnames()
                told.extend(archive.extractfile(m).read() for m in archive.getmembers() if m.isfile())  # type: ignore[union-attr]
            assert any(n.endswith("ledger.json") for n in names) and any("Secret.json" in n for n in names)
            for note in root.rglob("metrics-url"):
                with urllib.request.urlopen(note.read_text().strip(), timeout=60) as answer:
                    told.append(answer.read())
            limits = {name: core_limit(name) for name in ("casemate_manager", "casemate_agent")}
            kept = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p.parent.name != "private"}
            modes = {p.stat().st_mode & 0o777 for p in kept if "ledger" in p.parts}
    finally:
        casemate("dev", "down", "--dir", str(root), environ=environ, timeout_s=100).ok()
    assert limits == {"casemate_manager": {"0"}, "casemate_agent": {"0"}}, "no memory of theirs is ever dumped"
    assert {p.name for p in kept} >= {"fleet.db", "manager.log", "host.json"}, sorted(p.name for p in kept)
    assert any(p.name.endswith("-wal") for p in kept), "the store's log of writes was looked at too"
    assert modes == {0o600}
    places = {
        "what people were told": sum(map(hits, told)),
        "arguments and environments": len(arguments),
        **{str(path.relative_to(root)): hits(data) for path, data in kept.items()},
    }
    assert {place: count for place, count in places.items() if count} == {}
    assert hits("\n".join(map(json.dumps, secrets())).encode()) >= COUNT, "the search finds what is there"
