"""PURE. Which objects a batch makes: what a watcher that resumes from before it cannot have.

To be asked before the batch is folded, since that tells new records from changed ones.
"""

from collections.abc import Iterator

from casemate_core.spec.pod import pod_name
from casemate_manager.fleet.commands import Batch
from casemate_manager.fleet.records import EnvironmentRecord, InstanceRecord, Put, key_of, kind_of
from casemate_manager.fleet.state import State

#: Kind and key of an object; of a pod that is new in an instance that is there, its own name behind the key.
Born = tuple[str, str]


def born(state: State, batch: Batch) -> Iterator[Born]:
    """The objects that ``batch`` makes of ``state``."""
    for change in batch.records:
        if not isinstance(change, Put):
            continue
        kind, key = kind_of(change.record), key_of(change.record)
        match change.record:
            case EnvironmentRecord() as record:
                known = state.environments.get(key)
                if known is None:
                    yield kind, key
                    continue
                before = {pod_name(manifest) for manifest in known.environment.spec.pods}
                added = {pod_name(manifest) for manifest in record.environment.spec.pods} - before
                for instance in state.instances_of(record.environment.meta.uid) if added else ():
                    yield from (("Pod", f"{instance.meta.uid}/{instance.meta.name}.{name}") for name in sorted(added))
            case InstanceRecord() if key not in state.instances:
                yield kind, key
                yield "Pod", key
            case _:
                if not state.holds(kind, key):
                    yield kind, key
