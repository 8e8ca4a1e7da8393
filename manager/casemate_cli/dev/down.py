"""The end of a private fleet: instances, processes, files, in this order, and a look whether anything is left."""

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casemate_cli import term
from casemate_cli.dev import processes, state, steps
from casemate_cli.dev.state import Fleet, Folder
from casemate_cli.failure import Failure
from casemate_cli.term import Progress

if TYPE_CHECKING:
    from casemate_cli.client import Client

#: Guests get this long to let go before they are ended by force.
DELETE_S = 60.0
GRACE_S = 15.0


def down(folder: Folder, fleet: Fleet | None) -> None:
    """End everything of this fleet. What is not there needs no end; so it may be run after anything."""
    # What simulated hosts hold ends with their process: there is nothing to let go of.
    if (
        fleet is not None
        and not fleet.simulated
        and all(processes.running(folder, n) for n in (steps.MANAGER, steps.AGENT))
    ):
        _delete_environments(folder)
    for name in (steps.AGENT, steps.MANAGER):
        process = processes.running(folder, name)
        if process is not None:
            with Progress(f"ending the {name}") as progress:
                asked = processes.end(process, GRACE_S)
                progress.done(f"{name} ended" + ("" if asked else " by force"))
    for stray in processes.marked(folder):
        processes.end(stray, GRACE_S)
        term.say(f"ended process {stray.pid}, which belonged to this fleet")
    if folder.libvirt.exists():
        with Progress("ending the private libvirtd, its VMs and networks") as progress:
            argv = [sys.executable, "-m", "casemate_agent.sandbox", "down", "--dir", str(folder.libvirt)]
            steps.run_program(folder, "libvirt", argv, progress)
            progress.done("private libvirtd, its VMs and networks ended")
    if fleet is not None:
        steps.forget_operator(fleet)
    _remove_folder(folder.root)


def _delete_environments(folder: Folder) -> None:
    """Ask the manager for the end of every environment, and wait until the hosts have let go."""
    from casemate_cli.client import request_key
    from casemate_wire.v1 import operators_pb2 as pb

    try:
        with steps.connect(folder) as client, Progress("deleting environments") as progress:
            for resource in client.listed("Environment", tenant=""):
                metadata = resource.environment.metadata
                client.call(
                    client.stub.Delete,
                    pb.DeleteRequest(
                        request_key=request_key(), kind="Environment", tenant=metadata.tenant, name=metadata.name
                    ),
                )
            give_up_s = time.monotonic() + DELETE_S
            while left := _left(client):
                progress.update(f"waiting for {len(left)} instances to go: {', '.join(left[:5])}")
                if time.monotonic() > give_up_s:
                    term.say("some instances did not go when asked; they are ended with their libvirtd", "yellow")
                    return
                time.sleep(0.2)
            progress.done("environments deleted")
    except Failure as failure:
        term.say(f"the manager did not delete the environments ({failure.what}); going on without it", "yellow")


def _left(client: "Client") -> list[str]:
    instances: list[Any] = client.listed("Instance", tenant="")
    return [r.instance.metadata.name for r in instances]


def _remove_folder(root: Path) -> None:
    """Remove the fleet's folder; the default one's parent, which is Casemate's own, goes too where nothing else is in it."""
    if root.exists():
        shutil.rmtree(root)
    root.with_name(root.name + ".lock").unlink(missing_ok=True)
    if root != state.default_folder():
        return  # a folder that a person named lies in one of theirs
    try:
        root.parent.rmdir()
    except OSError:  # not empty, or not there
        return
