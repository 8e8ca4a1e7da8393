"""PURE. Changes that need a restart or a new root disk, brought to instances that run, as the update strategy says.

Theory of operation. An instance is *held*: its host is told to stop it. When it is off, and said so of the present spec,
`advance` gives it the fields that changed, and a new root disk where they need one, and lets go of it: it starts. So an
instance never runs on what is given to another meanwhile, and a rollout broken off after any batch goes on from the
records. `rolling` holds an instance only while fewer than ``max_unavailable`` are down; one that is down anyway costs
nothing. What does not fit on its host is let go of with its old fields, and not tried again until the spec changes.
"""

from dataclasses import replace

from casemate_core.spec.environment import UpdateStrategy
from casemate_manager.fleet import operations
from casemate_manager.fleet.draft import MAX_RECORDS, Draft, instance_ref
from casemate_manager.fleet.records import EnvironmentRecord, InstanceRecord


def is_behind(record: EnvironmentRecord, instance: InstanceRecord) -> bool:
    """Whether the environment has fields that the instance has not."""
    return (
        instance.restart_generation < record.restart_generation
        or instance.replace_generation < record.replace_generation
    )


def take_turns(draft: Draft, record: EnvironmentRecord) -> None:
    """Hold the next instances, and release the next operations, as many as may be down."""
    state, observed, environment = draft.state, draft.observed, record.environment
    strategy = environment.spec.update_strategy
    row = [i for i in state.instances_of(environment.meta.uid) if not i.meta.deleting_s]
    waiting = any((o := state.open_operation(i.meta.uid)) is not None and not o.released for i in row)
    if strategy is None and not waiting:
        return
    down = {i.meta.uid for i in row if operations.unavailable(state, observed, i)}
    free = len(row)
    if (strategy or UpdateStrategy()).type == "rolling":
        free = (strategy or UpdateStrategy()).max_unavailable - len(down)
    free -= operations.release(draft, record, max(free, 0))
    if strategy is None or environment.spec.run != "started":
        return
    for instance in row:
        if len(draft) + 2 > MAX_RECORDS:
            return
        uid = instance.meta.uid
        placement = state.placement_of(uid)
        if (
            instance.held
            or not is_behind(record, instance)
            or instance.refused_generation == environment.meta.generation
            or placement is None
            or not observed.host(placement.host).connected
            or state.open_operation(uid) is not None
            or ("Instance", uid) in draft.changed
        ):
            continue
        if uid not in down:
            if free <= 0:
                continue
            free -= 1
        draft.put(held(draft, instance, "update"))
        draft.event(instance_ref(instance), "Updating", "it is stopped, to take fields that have changed")


def held(draft: Draft, instance: InstanceRecord, why: str) -> InstanceRecord:
    """The instance, kept off for a reason; let go of where that is empty."""
    meta = replace(instance.meta, resource_version=draft.revision)
    return replace(instance, held=why, meta=meta)
