"""PURE. What comes due by the clock: ends of lifetimes, with notice, and deadlines of operations.

An environment with a lifetime is told to end before it ends: by an event and a condition, a tenth of its lifetime ahead
and an hour at most. The end that was told is kept (``notice_end_s``), and nothing ends before it: who shortens a lifetime
into the past still gets a notice. A longer lifetime takes the notice back.
"""

from dataclasses import replace
from typing import Final

from casemate_core.quantity import format_seconds
from casemate_core.spec.environment import Environment
from casemate_core.spec.views import ObjectRef
from casemate_manager.fleet import operations
from casemate_manager.fleet.commands import Batch
from casemate_manager.fleet.draft import MAX_RECORDS, Draft
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import EnvironmentRecord
from casemate_manager.fleet.state import State

LONGEST_NOTICE_S: Final = 3600.0
SHORTEST_NOTICE_S: Final = 30.0


def come_due(state: State, observed: Observed, now_s: float) -> Batch:
    """All that is due now, within one batch; the rest is found again."""
    draft = Draft(state, observed, now_s)
    operations.overdue(draft)
    for key in list(state.lifetimes):
        if len(draft) + 2 > MAX_RECORDS:
            break
        _lifetime(draft, state.environments[key])
    return draft.batch()


def notice_s(lifetime_s: float) -> float:
    """How long before its end an environment is told of it."""
    return max(SHORTEST_NOTICE_S, min(LONGEST_NOTICE_S, lifetime_s / 10))


def _lifetime(draft: Draft, record: EnvironmentRecord) -> None:
    environment, now_s = record.environment, draft.now_s
    meta, lifetime_s = environment.meta, environment.spec.lifetime_s
    if meta.deleting_s:
        return
    ref = ObjectRef("Environment", meta.name, meta.tenant, meta.uid)
    ends_s, told_s = meta.created_s + lifetime_s, record.notice_end_s
    if told_s and (not lifetime_s or ends_s > told_s):
        draft.put(replace(record, notice_end_s=0.0, environment=_touched(draft, record)))
        draft.event(ref, "LifetimeExtended", "its lifetime was made longer; the notice is taken back")
    elif not lifetime_s:
        return
    elif told_s and now_s >= told_s:
        ended = replace(meta, deleting_s=now_s, resource_version=draft.revision)
        draft.put(replace(record, environment=replace(environment, meta=ended)))
        draft.event(ref, "Deleting", f"its lifetime of {format_seconds(lifetime_s)} is over", warning=True)
    elif not told_s and now_s >= ends_s - notice_s(lifetime_s):
        end_s = max(ends_s, now_s + SHORTEST_NOTICE_S)
        draft.put(replace(record, notice_end_s=end_s, environment=_touched(draft, record)))
        draft.event(
            ref,
            "LifetimeEnding",
            f"its lifetime of {format_seconds(lifetime_s)} ends in {format_seconds(round(end_s - now_s))}: it is deleted"
            " then; a longer spec.lifetime keeps it",
            warning=True,
        )


def _touched(draft: Draft, record: EnvironmentRecord) -> Environment:
    environment = record.environment
    return replace(environment, meta=replace(environment.meta, resource_version=draft.revision))
