"""The folder of a private fleet: where things are, what was decided, and the lock against two at once."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from casemate_cli.failure import Failure

RECORD = "dev.json"
DEFAULT_PORT = 7443
DEFAULT_SUBNET = "10.99.0.0/16"


@dataclass(frozen=True, slots=True)
class Fleet:
    """What this fleet is; written once, when it is first brought up. `simulated` is the number of hosts, 0 for real ones."""

    simulated: int = 0
    #: Line of text that describes a simulated host (casemate-agent run --simulated).
    shape: str = ""
    port: int = DEFAULT_PORT
    subnet: str = DEFAULT_SUBNET
    #: Port at which hosts join.
    enrolment_port: int = DEFAULT_PORT + 1

    @property
    def manager(self) -> str:
        """The manager's address."""
        return f"127.0.0.1:{self.port}"

    @property
    def enrolment(self) -> str:
        """Where hosts join."""
        return f"127.0.0.1:{self.enrolment_port}"

    @property
    def context(self) -> str:
        """Name of the fleet in a person's file of contexts."""
        return "dev" if self.port == DEFAULT_PORT else f"dev-{self.port}"


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths of a private fleet."""

    root: Path

    @property
    def record(self) -> Path:
        """What the fleet is."""
        return self.root / RECORD

    @property
    def manager(self) -> Path:
        """State of the manager."""
        return self.root / "manager"

    @property
    def agent(self) -> Path:
        """State of the agent."""
        return self.root / "agent"

    @property
    def run(self) -> Path:
        """Sockets of the agent."""
        return self.root / "run"

    @property
    def libvirt(self) -> Path:
        """The private libvirtd. A short name: its sockets' paths are bounded."""
        return self.root / "virt"

    @property
    def operator(self) -> Path:
        """File of contexts with the operator's certificate."""
        return self.root / "operator.yaml"

    @property
    def logs(self) -> Path:
        """One file for each process."""
        return self.root / "logs"

    @property
    def pids(self) -> Path:
        """One file for each process."""
        return self.root / "pids"

    def log(self, name: str) -> Path:
        """Log of one process."""
        return self.logs / f"{name}.log"

    def metrics(self, state: Path) -> str:
        """Where a process with this state folder serves metrics; empty where it does not."""
        try:
            return (state / "metrics-url").read_text().strip()
        except OSError:
            return ""


def default_folder() -> Path:
    """``${XDG_STATE_HOME:-~/.local/state}/casemate/dev``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "casemate" / "dev"


def default_cache() -> Path:
    """Where built images are kept for the next time: the machine's cache for root, a person's own for others."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "casemate"
    return Path("/var/cache/casemate") if os.geteuid() == 0 else Path.home() / ".cache" / "casemate"


def load(folder: Folder) -> Fleet | None:
    """What was decided for this folder; None where nothing was. Raises Failure for a record that is none."""
    try:
        data = json.loads(folder.record.read_text())
        return Fleet(**data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise Failure(
            f"{folder.record} is not understood: {error}", remedy="end that fleet: casemate dev down"
        ) from error


def save(folder: Folder, fleet: Fleet) -> None:
    """Write the record, whole or not at all."""
    fresh = folder.record.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(fleet)))
    fresh.replace(folder.record)


@contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Only one `up` or `down` of a folder at a time. Raises Failure where another one is at work."""
    path = folder.root.with_name(folder.root.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                "another casemate dev is at work on this fleet", remedy="wait for it to end, or name another --dir"
            ) from None
        yield
