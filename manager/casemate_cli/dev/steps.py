"""The steps of `casemate dev up`, each of which adopts what is there already."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casemate_cli.dev import preflight, processes
from casemate_cli.dev.state import Fleet, Folder
from casemate_cli.failure import Detail, Exit, Failure
from casemate_cli.term import Progress

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_cli.settings import Context
    from casemate_wire.v1 import operators_pb2 as pb

#: Name of the host that a fleet on real VMs has.
HOST = "dev"
#: A simulated host, where `--shape` says nothing else (casemate_core.topology_loaders.line).
SHAPE = "2s 8k/c 2t 64G disk=1T"
MANAGER = "manager"
AGENT = "agent"
#: Metrics take whatever port is free, and say which in a file.
ANY_PORT = "127.0.0.1:0"
#: Longest time until a process answers.
START_S = 60.0


def run_program(folder: Folder, name: str, argv: Sequence[str], progress: Progress, given: str = "") -> str:
    """Run a program to its end, its talk shown as progress and kept in the logs; its standard output. Raises Failure.

    ``given`` is its standard input: what nobody may see in its arguments.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    log = folder.log(name)
    last: list[str] = []
    with log.open("a") as kept:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=processes.environment(folder),
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before it read; its own words say why
            child.stdin.write(given)
            child.stdin.close()
        for line in child.stderr:
            kept.write(line)
            kept.flush()
            if line.strip():
                last = [*last[-7:], line.rstrip()]
                progress.update(line.strip())
        answer = child.stdout.read()
        code = child.wait()
        child.stdout.close()
        child.stderr.close()
    if code:
        raise Failure(
            f"{name} failed (exit code {code})",
            log=last,
            remedy=f"the whole log is in {log}",
        )
    return answer.strip()


def guest_image(folder: Folder, cache: Path) -> Path:
    """Folder with the manifests of the guest image and the example's container; built where it is not in the cache."""
    with Progress("guest image") as progress:
        answer = run_program(
            folder,
            "guest-image",
            [sys.executable, "-m", "casemate_agent.guestimage", "build", "--out", str(cache / "guest")],
            progress,
        )
        found = Path(answer).parent
        progress.done(f"guest image in {found}")
    return found


def libvirt(folder: Folder, cache: Path) -> dict[str, Any]:
    """The private libvirtd: its `uri` and the `scope` of names on this machine."""
    import json

    with Progress("private libvirtd") as progress:
        answer = run_program(
            folder,
            "libvirt",
            [
                sys.executable,
                "-m",
                "casemate_agent.sandbox",
                "up",
                "--dir",
                str(folder.libvirt),
                "--cache",
                str(cache / "libvirt"),
            ],
            progress,
        )
        try:
            facts: dict[str, Any] = json.loads(answer.splitlines()[-1])
        except (ValueError, IndexError):
            raise Failure("the private libvirtd did not say how to reach it", details=[Detail(value=answer)]) from None
        progress.done(f"private libvirtd in {folder.libvirt}")
    return facts


def manager(folder: Folder, fleet: Fleet) -> None:
    """The manager, until it answers."""
    argv = [sys.executable, "-m", "casemate_manager", "serve"]
    argv += ["--state-dir", str(folder.manager), "--listen", fleet.manager, "--default-subnet", fleet.subnet]
    argv += ["--metrics-listen", ANY_PORT]
    argv += ["--listen-enrolment", fleet.enrolment]
    with Progress("manager") as progress:
        _adopt_or_start(folder, MANAGER, argv, before=lambda: preflight.check_port(fleet.port))
        _until(folder, MANAGER, lambda: _answers(folder))
        progress.done(f"manager on {fleet.manager}")


def operator(folder: Folder, fleet: Fleet) -> None:
    """The operator's certificate: in the fleet's folder, and in this person's file of contexts."""
    from casemate_cli import settings

    with Progress("operator's certificate") as progress:
        if not folder.operator.exists():
            argv = [sys.executable, "-m", "casemate_manager", "operator", "--state-dir", str(folder.manager)]
            argv += ["--manager", fleet.manager, "--days", "365", "--out", str(folder.operator)]
            run_program(folder, "operator", argv, progress)
        path = settings.config_path()
        known = settings.load_contexts(path)
        context = _context(folder)
        if known.contexts.get(fleet.context) != context:
            contexts = {**known.contexts, fleet.context: context}
            settings.save_contexts(path, settings.Contexts(known.current or fleet.context, contexts))
        progress.done(f"operator's certificate in context {fleet.context} of {path}")


def forget_operator(fleet: Fleet) -> None:
    """Take the fleet out of this person's file of contexts."""
    from casemate_cli import settings

    path = settings.config_path()
    known = settings.load_contexts(path)
    if known.contexts.get(fleet.context, settings.Context()).manager != fleet.manager:
        return
    left = {name: c for name, c in known.contexts.items() if name != fleet.context}
    if not left:
        path.unlink(missing_ok=True)
        return
    settings.save_contexts(path, settings.Contexts("" if known.current == fleet.context else known.current, left))


def _context(folder: Folder) -> "Context":
    from casemate_cli import settings

    found = settings.load_contexts(folder.operator)
    if not found.current:
        raise Failure(f"{folder.operator} is missing", remedy="bring the fleet up again: casemate dev up")
    return found.contexts[found.current]


def join(folder: Folder, fleet: Fleet, names: Sequence[str], client: "Client") -> None:
    """Each of these hosts joins by a token of its own; who has joined already is left alone."""
    from casemate_cli.verbs.tokens import create

    each = fleet.simulated > 1  # a single host has the state folder for itself, as its agent sees it
    missing = [
        n for n in names if not ((folder.agent / n if each else folder.agent) / "identity/identity.json").exists()
    ]
    if not missing:
        return
    with Progress("joining") as progress:
        tokens = []
        for number, name in enumerate(missing):
            progress.update(f"a token for {name} ({number + 1} of {len(missing)})")
            tokens.append(create(client, name).secret)
        argv = [sys.executable, "-m", "casemate_agent", "join", "--manager", fleet.enrolment]
        argv += ["--state-dir", str(folder.agent), *(["--each"] if each else [])]
        run_program(folder, "join", argv, progress, "\n".join(tokens))
        what = f"host {missing[0]}" if len(missing) == 1 else f"{len(missing)} hosts"
        progress.done(f"{what} enrolled")


def agent(folder: Folder, fleet: Fleet, extra: Sequence[str], hosts: int, client: "Client") -> None:
    """The agent (or the process with all simulated hosts), until the manager sees its hosts Ready."""
    argv = [sys.executable, "-m", "casemate_agent", "run"]
    argv += ["--state-dir", str(folder.agent), "--run-dir", str(folder.run), "--metrics-listen", ANY_PORT, *extra]
    what = "agent" if not fleet.simulated else f"{fleet.simulated} simulated hosts"
    with Progress(what) as progress:
        _adopt_or_start(folder, AGENT, argv)
        _until(folder, AGENT, lambda: ready_hosts(client) >= hosts)
        progress.done(f"{what} joined")


def _adopt_or_start(folder: Folder, name: str, argv: Sequence[str], before: Callable[[], None] = lambda: None) -> None:
    if processes.running(folder, name) is None:
        before()
        processes.start(folder, name, argv)


def _until(folder: Folder, name: str, met: Callable[[], bool]) -> None:
    """Return when `met`; raise Failure when the process ends before, or START_S are over."""
    give_up_s = time.monotonic() + START_S
    while not met():
        if processes.running(folder, name) is None:
            raise Failure(
                f"the {name} ended at its start",
                log=processes.tail(folder.log(name), 8),
                remedy=f"see {folder.log(name)}",
            )
        if time.monotonic() > give_up_s:
            raise Failure(
                f"the {name} does not answer after {START_S:g} s",
                code=Exit.TIMEOUT,
                log=processes.tail(folder.log(name), 8),
                remedy=f"see {folder.log(name)}",
            )
        time.sleep(0.1)


def connect(folder: Folder, retry_s: float = 2.0) -> "Client":
    """A client of this fleet's manager, as its operator."""
    from casemate_cli.client import Client
    from casemate_cli.settings import Settings

    me = _context(folder)
    return Client(Settings(manager=me.manager, retry_s=retry_s, roots=me.roots, certificate=me.certificate, key=me.key))


def _answers(folder: Folder) -> bool:
    from casemate_wire.v1 import operators_pb2 as pb

    with connect(folder, retry_s=0.0) as client:
        try:
            client.call(client.stub.Version, pb.VersionRequest())
        except Failure:
            return False
    return True


def ready_hosts(client: "Client") -> int:
    """How many hosts the manager sees Ready."""
    return sum(r.host.status.phase == "Ready" for r in client.listed("Host", tenant=""))


# --- what the fleet is given to run ----------------------------------------------------------------------------------


def hello_manifest() -> bytes:
    """The first example, as it is shipped."""
    return resources.files("casemate_cli.dev").joinpath("hello.yaml").read_bytes()


def simulated_images() -> bytes:
    """Images for hosts that hold no bytes: sources and digests that nobody fetches or compares."""
    return resources.files("casemate_cli.dev").joinpath("simulated-images.yaml").read_bytes()


def apply(client: "Client", text: bytes, source: str) -> "list[pb.ApplyResult]":
    """Apply manifests that this program ships or built."""
    from casemate_cli import manifests
    from casemate_cli.client import request_key

    parsed = manifests.parse(text, source, tenant="default")
    return list(client.apply(parsed, key=request_key(), doing=f"applying {source}").results)


def apply_image(client: "Client", path: Path) -> str:
    """Make an image known; a remark where another build of it is in use already, else empty."""
    from casemate_cli import manifests

    wanted = manifests.parse(path.read_bytes(), str(path), tenant="")[0]
    try:
        known = client.get("Image", wanted.image.metadata.name, "")
    except Failure as failure:
        if failure.code is not Exit.NOT_FOUND:
            raise
        apply(client, path.read_bytes(), str(path))
        return ""
    if known.image.spec.digest == wanted.image.spec.digest:
        return ""
    name = wanted.image.metadata.name
    return f"image {name} was built anew since this fleet began; it keeps the old one until casemate dev down"


def until_ready(client: "Client", name: str, timeout_s: float) -> "list[pb.Resource]":
    """Wait until the environment is Ready, its changes of phase shown; its instances. Raises Failure (TIMEOUT)."""
    give_up_s = time.monotonic() + timeout_s
    with Progress(f"environment {name}") as progress:
        while True:
            environment = client.get("Environment", name, "default").environment
            instances = client.listed("Instance", tenant="default", owner=name)
            pods = client.listed("Pod", tenant="default", owner=name)
            if environment.status.phase == "Ready" and instances:
                progress.done(f"environment {name} is Ready")
                return instances
            told = [f"environment {name} {environment.status.phase or 'Pending'}"]
            told += [f"{r.instance.metadata.name} {r.instance.status.phase}" for r in instances]
            told += [f"pod {r.pod.metadata.name} {r.pod.status.phase or 'Pending'}" for r in pods]
            progress.update(", ".join(told))
            if time.monotonic() > give_up_s:
                conditions = [
                    Detail(f"condition {c.type}", c.status, c.message or c.reason)
                    for c in (
                        *environment.status.conditions,
                        *(c for r in instances for c in r.instance.status.conditions),
                    )
                    if c.status != "True"
                ]
                raise Failure(
                    f"environment {name} is not Ready after {timeout_s:g} s: {', '.join(told)}",
                    code=Exit.TIMEOUT,
                    details=conditions,
                    remedy=f"see casemate describe env/{name}, and casemate dev status for the logs",
                )
            time.sleep(0.3)


def fetch(url: str, timeout_s: float) -> str:
    """The first answer of a web server, as text. Raises Failure when there is none in time."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    give_up_s = time.monotonic() + timeout_s
    while True:
        try:
            with opener.open(url, timeout=5) as answer:
                return str(answer.read(4096).decode("utf-8", "replace"))
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > give_up_s:
                reason = getattr(error, "reason", error)
                raise Failure(f"{url} does not answer: {reason}", code=Exit.TIMEOUT) from None
            time.sleep(0.3)
