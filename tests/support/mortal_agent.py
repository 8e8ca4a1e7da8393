"""The agent's process on its real drivers, which kills itself at a step of its work, as if the machine had.

Run as a program: ``python mortal_agent.py run FLAGS`` with the flags of ``casemate-agent``, and in the environment
``CASEMATE_TEST_DIE_AT`` = ``POINT [ACTION] [COUNT]``. Once it is armed, by
SIGUSR1 or from the start by ``CASEMATE_TEST_ARMED``, it SIGKILLs itself when a job passes that
point for the COUNT-th time (1) in an instance that is not the one of ``CASEMATE_TEST_SPARED``. Points are those of
``casemate_agent.execute.executor.Point``, and ``during-action``: a moment after the action has begun.
"""

import os
import signal
import sys
import threading
from types import FrameType

from casemate_agent import __main__ as program
from casemate_agent import actions as act
from casemate_agent.agent import Agent
from casemate_agent.execute.executor import Point, Step, log_steps

#: Long enough that the driver is at work, short enough that it has not ended.
MOMENT_S = 0.004


def die() -> None:
    """SIGKILL: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Fate:
    """Counts passages, and ends the process at the one named."""

    def __init__(self, text: str, spared: str) -> None:
        words = text.split()
        self.during = words[0] == "during-action"
        self.point = Point.BEFORE_ACTION if self.during else Point(words[0])
        self.action = next((word for word in words[1:] if not word.isdigit()), "")
        self.left = next((int(word) for word in words[1:] if word.isdigit()), 1)
        self.spared = spared
        self.armed = "CASEMATE_TEST_ARMED" in os.environ

    def arm(self, number: int, frame: FrameType | None) -> None:
        self.armed = True

    def __call__(self, step: Step) -> None:
        log_steps(step)
        name = act.name(step.action) if step.action is not None else ""
        here = step.uid not in ("", self.spared) and step.point is self.point and name == self.action
        if not self.armed or not here:
            return
        self.left -= 1
        if self.left == 0 and self.during:
            threading.Timer(MOMENT_S, die).start()
        elif self.left == 0:
            die()


FATE = Fate(os.environ.get("CASEMATE_TEST_DIE_AT", "after-outcome"), os.environ.get("CASEMATE_TEST_SPARED", ""))


class MortalAgent(Agent):
    """An agent whose steps are followed by its fate."""

    def __init__(self, *positional: object, **named: object) -> None:
        super().__init__(*positional, **named | {"trace": FATE})  # type: ignore[arg-type]


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, FATE.arm)
    vars(program)["Agent"] = MortalAgent
    sys.exit(program.main())
