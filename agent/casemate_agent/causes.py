"""What the events of an instance follow from, and how long the steps of its story took.

What may live here: which request an instance is still on its way for, and when its steps began. In memory alone: after a
restart of the agent the ledger tells the cause again, and only durations that began before are not told.

Theory of operation. A wish carries its cause. From the moment that it is accepted, every event of the instance follows from
it, until the instance has come to rest as asked. What happens after that (a crash, a reboot from inside) happens by
itself and carries no cause; the next wish with another cause begins the next chapter.
"""

from collections.abc import Callable, Iterable

from casemate_agent import actions as act
from casemate_agent.plan.converge import ActionOutcome
from casemate_core.spec.instance import DesiredInstance, InstanceState, Phase, Run

MOST_SETTLED = 16
#: Phases in which an instance is as it was asked to be.
AT_REST = {Run.STARTED: Phase.READY, Run.STOPPED: Phase.STOPPED}


def step_told(outcome: ActionOutcome) -> tuple[str, str] | None:
    """Reason and message for a step that people wait for; None for the many small ones."""
    match outcome.action:
        case act.FetchImage(image=image):
            return "ImageFetched", f"image {image.name} in {outcome.took_s:.1f} s"
        case act.ApplyPods(desired=desired):
            return "PodsApplied", f"{len(desired.pods)} pods were given to the guest in {outcome.took_s:.1f} s"
    return None


class Causes:
    """The causes of one host's instances."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        #: uid -> the cause that it is on its way for, and when this process was told of it (0: before it began).
        self._under_way: dict[str, tuple[str, float]] = {}
        #: The last causes for which it came to rest: what is done once has its own, and the wish's own comes back after it.
        self._settled: dict[str, tuple[str, ...]] = {}
        self._started_s: dict[str, float] = {}

    def asked(self, instances: Iterable[DesiredInstance]) -> None:
        """These wishes were accepted."""
        for desired in instances:
            known = self._under_way.get(desired.uid, ("", 0.0))[0]
            if desired.cause and desired.cause not in (known, *self._settled.get(desired.uid, ())):
                self._under_way[desired.uid] = desired.cause, self._now()

    def of(self, uid: str) -> str:
        """What an event of the instance follows from now; empty: from nothing but itself."""
        return self._under_way.get(uid, ("", 0.0))[0]

    def seen(self, desired: DesiredInstance, state: InstanceState, *, idle: bool) -> float | None:
        """The instance was looked at. Where it has just come to rest as asked: the seconds that it took; call `settle` then."""
        cause, since_s = self._under_way.get(desired.uid, ("", 0.0))
        rested = idle and not state.reason and state.phase is AT_REST.get(desired.run)
        if not rested or state.generation != desired.generation:
            if not cause and desired.cause and desired.cause not in self._settled.get(desired.uid, ()):
                # A wish of the ledger, from before this process: it goes on, and nobody knows since when.
                self._under_way[desired.uid] = desired.cause, 0.0
            return None
        if cause and cause == desired.cause and since_s:
            return self._now() - since_s
        self.settle(desired)
        return None

    def settle(self, desired: DesiredInstance) -> None:
        """The instance is as asked: what comes now comes by itself."""
        self._under_way.pop(desired.uid, None)
        others = tuple(cause for cause in self._settled.get(desired.uid, ()) if cause != desired.cause)
        self._settled[desired.uid] = (*others, desired.cause)[-MOST_SETTLED:]

    def started(self, uid: str) -> None:
        """Its domain was started."""
        self._started_s[uid] = self._now()

    def booted(self, uid: str) -> float | None:
        """Its guest answers for the first time since the start: the seconds that it took, where the start was seen."""
        started_s = self._started_s.pop(uid, None)
        return None if started_s is None else self._now() - started_s

    def forget(self, uid: str) -> None:
        """The instance is gone."""
        for kept in (self._under_way, self._settled, self._started_s):
            kept.pop(uid, None)
