"""`casemate dev`: a private fleet on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import options, term
from casemate_cli.failure import Exit, Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client
    from casemate_cli.dev.state import Fleet, Folder
    from casemate_wire.v1 import operators_pb2 as pb

_DIR = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="Folder of the fleet.  [default: ${XDG_STATE_HOME:-~/.local/state}/casemate/dev]",
)


@click.group()
def dev() -> None:
    """A private fleet on this machine.

    Nothing of the machine's own is used: an own libvirtd, an own manager on loopback, everything in one folder.
    """


def _folder(directory: Path | None) -> "Folder":
    from casemate_cli.dev import state

    return state.Folder((directory or state.default_folder()).absolute())


@dev.command()
@_DIR
@click.option("--simulated", type=click.IntRange(1, 10000), metavar="N", help="N simulated hosts: no root, no libvirt.")
@click.option("--shape", metavar="LINE", help="For --simulated: what a host is made of, in one line.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the manager.  [default: 7443]")
@click.option("--subnet", metavar="CIDR", help="Addresses of instances.  [default: 10.99.0.0/16]")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for built images, kept by dev down.")
@click.option("--timeout", type=options.SPAN, default="15m", show_default=True, help="Longest wait for the example.")
@click.option("--example/--no-example", default=True, help="Apply the example and wait for it.  [default: --example]")
@click.pass_context
def up(
    ctx: click.Context,
    directory: Path | None,
    simulated: int | None,
    shape: str | None,
    port: int | None,
    subnet: str | None,
    cache: Path | None,
    timeout: float,
    example: bool,
) -> None:
    """Bring up a fleet, and a first pod in a VM.

    Builds the guest image (kept for the next time), starts a private libvirtd, a manager and an agent, applies the first
    example and waits until its pod answers. What runs already is adopted. Everything stays up until `casemate dev down`.
    """
    from casemate_cli.dev import state

    folder = _folder(directory)
    with state.locked(folder):
        fleet = _decide(folder, simulated, shape, port, subnet)
        if fleet.simulated:
            _up_simulated(folder, fleet, timeout, example)
        else:
            _up_real(folder, fleet, cache or state.default_cache(), timeout, example)


def _decide(
    folder: "Folder", simulated: int | None, shape: str | None, port: int | None, subnet: str | None
) -> "Fleet":
    """The fleet of this folder: as recorded, or as asked for. Raises Failure where the two differ."""
    from casemate_cli.dev import preflight, state

    recorded = state.load(folder)
    if recorded is not None:
        asked = {"simulated": simulated, "shape": shape, "port": port, "subnet": subnet}
        for name, value in asked.items():
            if value is not None and value != getattr(recorded, name):
                raise Failure(
                    f"this fleet was begun with another --{name}: {getattr(recorded, name) or 'none'}",
                    remedy="end it first (casemate dev down), or name another --dir",
                )
        return recorded
    at = port or state.DEFAULT_PORT
    fleet = state.Fleet(
        simulated=simulated or 0,
        shape=shape or "",
        port=at,
        enrolment_port=preflight.free_port(at),
        subnet=subnet or state.DEFAULT_SUBNET,
    )
    if not fleet.simulated:
        preflight.check_machine()
        preflight.check_subnet(fleet.subnet)
    preflight.check_port(fleet.port)
    folder.root.mkdir(parents=True, exist_ok=True)
    state.save(folder, fleet)
    return fleet


def _up_real(folder: "Folder", fleet: "Fleet", cache: Path, timeout_s: float, example: bool) -> None:
    from casemate_cli.dev import steps

    images = steps.guest_image(folder, cache)
    virt = steps.libvirt(folder, cache)
    steps.operator(folder, fleet)
    steps.manager(folder, fleet)
    with steps.connect(folder) as client:
        steps.join(folder, fleet, [steps.HOST], client)
        extra = ["--name", steps.HOST, "--libvirt-uri", str(virt["uri"]), "--scope", str(virt["scope"])]
        # A pod may take ten seconds to end, and an emulated guest, asked while it boots, two minutes to power off.
        extra += ["--image-folder", str(cache / "guest"), "--stop-grace-s", "150"]
        steps.agent(folder, fleet, extra, 1, client)
        for name in ("image.yaml", "hello-image.yaml"):
            if remark := steps.apply_image(client, images / name):
                term.say(remark, "yellow")
        if not example:
            _tables(client)
            _next_steps(folder, fleet)
            return
        steps.apply(client, steps.hello_manifest(), "examples/hello.yaml")
        instances = steps.until_ready(client, "hello", timeout_s)
        address = instances[0].instance.spec.nics[0].address
        answer = steps.fetch(f"http://{address}:8080/", 30.0)
        _tables(client)
        term.out(f"\n$ curl http://{address}:8080/\n{term.clean(answer.strip(), keep=chr(10))}\n")
        _tell_virtualisation(instances[0])
        _next_steps(folder, fleet)


def _up_simulated(folder: "Folder", fleet: "Fleet", timeout_s: float, example: bool) -> None:
    from casemate_cli.dev import steps

    steps.operator(folder, fleet)
    steps.manager(folder, fleet)
    with steps.connect(folder) as client:
        # One simulated host is named as it is asked for; several are numbered after it.
        names = [f"sim-{n}" for n in range(1, fleet.simulated + 1)] if fleet.simulated > 1 else ["sim"]
        steps.join(folder, fleet, names, client)
        extra = ["--name", "sim", "--hosts", str(fleet.simulated), "--simulated", fleet.shape or steps.SHAPE]
        steps.agent(folder, fleet, extra, fleet.simulated, client)
        steps.apply(client, steps.simulated_images(), "simulated images")
        if example:
            steps.apply(client, steps.hello_manifest(), "examples/hello.yaml")
            steps.until_ready(client, "hello", timeout_s)
        _tables(client)
        term.say("hosts are simulated: no VM runs")
        _next_steps(folder, fleet)


def _tables(client: "Client") -> None:
    from casemate_cli import kinds
    from casemate_cli.verbs.get import View

    view = View("table", with_tenant=False, with_headings=True, prefixed=False)
    for kind in ("Environment", "Host"):
        view.rows(kinds.BY_NAME[kind], client.listed(kind, tenant=""))


def _tell_virtualisation(resource: "pb.Resource") -> None:
    if resource.instance.status.virtualisation == "kvm":
        term.say("KVM: guests run on this machine's processor")
    else:
        term.say("TCG: this machine gives no usable KVM, so QEMU emulates the guests' processor, which is slow")


def _next_steps(folder: "Folder", fleet: "Fleet") -> None:
    from casemate_cli import settings

    term.say("everything stays up; next:")
    if settings.load_contexts(settings.config_path()).current != fleet.context:
        term.say(f"  casemate context use {fleet.context}")
    for line in (
        "casemate get all                 what there is",
        "casemate describe env/hello      the story of the example",
        "casemate logs hello -f           what its pod writes",
        "casemate dev down                end it, and leave nothing behind",
    ):
        term.say(f"  {line}")
    for name, place in (("manager", folder.manager), ("agent", folder.agent)):
        if url := folder.metrics(place):
            term.say(f"metrics of the {name}: {url}")


@dev.command()
@_DIR
def down(directory: Path | None) -> None:
    """End the fleet: instances, processes and files. Built images stay in the cache."""
    from casemate_cli.dev import down as ending
    from casemate_cli.dev import processes, state

    folder = _folder(directory)
    if not folder.root.exists() and not processes.marked(folder):
        term.say(f"no fleet lives in {folder.root}")
        return
    with state.locked(folder):
        try:
            fleet = state.load(folder)
        except Failure as failure:  # a torn record must not keep anything alive
            term.say(failure.what, "yellow")
            fleet = None
        ending.down(folder, fleet)
    cache = state.default_cache()
    kept = f"; built images stay in {cache}" if cache.exists() else ""
    term.say(f"the fleet is gone{kept}")


@dev.command()
@_DIR
@click.option("-o", "--output", "form", type=click.Choice(["text", "json"]), default="text", help="Form.")
def status(directory: Path | None, form: str) -> int:
    """Say what of the fleet runs; exit 4 if there is none, 8 if its manager does not answer."""
    from casemate_cli.dev import processes, state, steps

    folder = _folder(directory)
    fleet = state.load(folder)
    if fleet is None:
        raise Failure(f"no fleet lives in {folder.root}", code=Exit.NOT_FOUND, remedy="casemate dev up")
    facts: dict[str, Any] = {"folder": str(folder.root), "manager": fleet.manager, "simulated": fleet.simulated}
    for name in (steps.MANAGER, steps.AGENT):
        process = processes.running(folder, name)
        facts[f"{name}Pid"] = process.pid if process is not None else None
        facts[f"{name}Log"] = str(folder.log(name))
        facts[f"{name}Metrics"] = folder.metrics(folder.root / name) if process is not None else None
    reached: Failure | None = None
    try:
        with steps.connect(folder) as client:
            facts["hostsReady"] = steps.ready_hosts(client)
            facts["environments"] = len(client.listed("Environment", tenant=""))
    except Failure as failure:
        reached = failure
    if form == "json":
        term.out(json.dumps(facts, indent=2))
    else:
        for key, value in facts.items():
            term.out(f"{key:<14} {term.clean(str(value if value is not None else 'not running'))}")
    if reached is not None:
        raise reached
    return Exit.OK
