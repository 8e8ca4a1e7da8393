"""Pods and their containers as they are, and when one is started again."""

from __future__ import annotations

import json

from .frames import MAX_TEXT
from .loop import Signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .frames import Message
    from .loop import Loop

BACKOFF_FIRST_S, BACKOFF_MAX_S, BACKOFF_FORGET_S = 10.0, 300.0, 600.0  # those of the kubelet


class Container:
    """A container of a pod, as it is."""

    def __init__(self, name: str, image: str) -> None:
        self.name, self.image = name, image
        self.id = ""
        self.log_path = ""
        self.state = "waiting"  # waiting, running, terminated: the words of Kubernetes
        self.reason = "ContainerCreating"
        self.message = ""
        self.ready = False
        self.restarts = 0
        self.failures = 0  # in a row, for the back-off
        self.exit_code = 0
        self.started = 0.0
        self.finished = 0.0
        self.restart_at = 0.0  # monotonic; 0: not to be restarted
        self.starts: list[int] = []  # positions in the log at which the container was started, the last few
        self.trimmed: list[tuple[int, int]] = []  # (position up to which the log is gone, lines that went with it)
        self.cpus: list[int] = []  # those that it has for itself
        self.devices: list[str] = []  # qualified names of those that it was given by number

    def over(self) -> bool:
        """Whether it has ended and is not started again: its log is complete."""
        return self.state == "terminated" and not self.restart_at

    SAVED = (
        "id",
        "image",
        "log_path",
        "state",
        "reason",
        "restarts",
        "exit_code",
        "started",
        "finished",
        "starts",
        "trimmed",
        "cpus",
        "devices",
    )

    def report(self) -> Message:
        """What the host is told."""
        return {
            "name": self.name,
            "image": self.image,
            "state": self.state,
            "reason": self.reason,
            "message": self.message[:MAX_TEXT],
            "ready": self.ready,
            "restarts": self.restarts,
            "exit_code": self.exit_code,
            "started": self.started,
            "finished": self.finished,
        }


class Pod:
    """A pod that is wanted, or still there."""

    def __init__(self, name: str, loop: Loop) -> None:
        self.name = name
        self.wanted: Message | None = None  # its manifest; None: to be removed
        self.playing = ""  # text of the manifest that podman was given; "" while there is nothing
        self.infra = ""  # name of the container that holds its network
        self.maybe_there = False  # podman may have something of this name
        self.containers: dict[str, Container] = {}
        self.reason, self.message = "", ""
        self.address = "127.0.0.1"
        self.started = 0.0
        self.retry_at = 0.0
        self.failures = 0
        self.wake = Signal(loop)
        self.files: dict[str, list[Message]] = {}  # of secrets, by volume; in memory alone

    def spec(self) -> Message:
        """The spec of the manifest that plays, or of the wanted one."""
        manifest = json.loads(self.playing) if self.playing else self.wanted
        return dict(manifest["spec"]) if manifest else {}

    def phase(self) -> str:
        """The phase by the rules of Kubernetes."""
        states = list(self.containers.values())
        if not self.playing or not states or any(c.started == 0.0 for c in states):
            return "Pending"
        if all(c.over() for c in states):
            return "Succeeded" if all(c.exit_code == 0 for c in states) else "Failed"
        return "Running"

    def report(self) -> Message:
        """What the host is told."""
        phase = self.phase()
        containers = [c.report() for c in self.containers.values()]
        return {
            "name": self.name,
            "phase": phase,
            "ready": phase == "Running" and all(c["ready"] for c in containers),
            "reason": self.reason,
            "message": self.message[:MAX_TEXT],
            "started": self.started,
            "containers": containers,
        }


def restarts_after(policy: str, code: int) -> bool:
    """Whether a container that ended with ``code`` is started again."""
    return policy == "Always" or (policy == "OnFailure" and code != 0)


def backoff(failures: int) -> float:
    """Seconds before the next start, after so many ends in a row: none after the first, then doubling from 10."""
    return 0.0 if failures <= 1 else min(BACKOFF_FIRST_S * 2.0 ** min(failures - 2, 10), BACKOFF_MAX_S)
