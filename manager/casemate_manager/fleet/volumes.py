"""PURE. Volumes: who may use one, on which host its data is, and what hosts say of it.

Theory of operation. A volume is bound to a host in the batch that writes the first placement of an instance that uses it, and
stays bound for life: its room is a claim of its own on that host, whether or not an instance uses it, and later instances
are placed where it is. It has at most one user, an environment, judged when that is applied. Its data ends in two steps: the
record is marked, its host is told at every turn, and the record goes when the host has said, of all volumes it has, that this
one is not among them. So nothing but a deletion that somebody asked for ever takes data away.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from casemate_core.claims import volume_claim
from casemate_core.errors import Conflict, Violation, shown
from casemate_core.fit import VolumeRequest
from casemate_core.quantity import format_mib
from casemate_core.spec.environment import Environment
from casemate_core.spec.instance import VolumeRef
from casemate_core.spec.meta import Meta
from casemate_core.spec.views import ObjectRef
from casemate_core.spec.volume import MAX_VOLUMES, Volume, names
from casemate_manager.fleet.draft import MAX_RECORDS, Draft
from casemate_manager.fleet.observed import CapacityChanged, Observed
from casemate_manager.fleet.placing import Overlay
from casemate_manager.fleet.records import InstanceRecord, VolumeRecord, tenant_key
from casemate_manager.fleet.state import State, named
from casemate_wire.stream import HostReport, VolumeFacts

#: The one format that volumes are made in.
FORMAT: Final = "raw"


# --- what may be applied ----------------------------------------------------------------------------------------------


def check_environment(
    state: State, known: Mapping[str, Volume], others: Iterable[Environment], one: Environment
) -> Iterator[Violation]:
    """Violations of an environment that names volumes. ``known``: all there will be; ``others``: applied along with it."""
    spec, tenant = one.spec, one.meta.tenant
    if not spec.volumes:
        return
    old = state.environments.get(tenant_key(tenant, one.meta.name))
    if old is not None and old.environment.spec.volumes and not old.environment.meta.deleting_s:
        before = old.environment.spec.replicas
        if (before > 1) != (spec.replicas > 1):
            several = max(before, spec.replicas)
            yield Violation(
                "spec.replicas",
                str(spec.replicas),
                f"gives other volumes to its instances: {spec.volumes[0].volume} belongs to one,"
                f" {spec.volumes[0].volume}-0 to the first of {several}",
                f"keep {before}, or delete the environment and apply it again: volumes stay",
            )
            return
    asked = {
        tenant_key(tenant, name): other.meta.name
        for other in others
        if other.meta.tenant == tenant and other.meta.name != one.meta.name
        for _, name in names(other.spec.volumes, other.spec.replicas)
    }
    missing: dict[int, list[str]] = {}
    for i, name in names(spec.volumes, spec.replicas):
        key = tenant_key(tenant, name)
        path = f"spec.volumes[{i}].volume"
        volume = known.get(key)
        if volume is None:
            missing.setdefault(i, []).append(name)
        elif volume.meta.deleting_s:
            yield Violation(path, name, "is being deleted", "wait until it is gone, and apply it again")
        elif other := asked.get(key) or _other_user(state, key, one):
            yield Violation(path, name, f"is used by environment {other}", "give each environment volumes of its own")
    for i, absent in missing.items():
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        yield Violation(
            f"spec.volumes[{i}].volume",
            absent[0],
            f"is no volume of this tenant{more}",
            "apply it first: kind: Volume, with a size",
        )


def _other_user(state: State, key: str, one: Environment) -> str:
    """Name of another environment that uses a volume: by its spec, or by an instance that has not let go of it."""
    own = tenant_key(one.meta.tenant, one.meta.name)
    for environment in state.volume_askers.get(key, ()):
        if environment != own:
            return state.environments[environment].environment.meta.name
    for uid in state.volume_users.get(key, ()):
        instance = state.instances[uid]
        if instance.environment != one.meta.name:
            return instance.environment
    return ""


def check_change(state: State, observed: Observed, one: Volume, objects: Iterable[object]) -> Iterator[Violation]:
    """Violations of a volume that is there already: it does not shrink, and grows where its host has room for it."""
    record = state.volumes.get(tenant_key(one.meta.tenant, one.meta.name))
    if record is None:
        return
    before, after = record.volume.spec.size_mib, one.spec.size_mib
    if after < before:
        yield Violation(
            "spec.size",
            format_mib(after),
            f"is smaller than the volume, which has {format_mib(before)} and does not shrink",
            f"write {format_mib(before)} or more, or move the data to a smaller volume",
        )
    inventory = state.inventories.get(record.host)
    if after <= before or inventory is None:
        return
    more = 0
    for other in objects:
        if isinstance(other, Volume) and (its := state.volumes.get(tenant_key(other.meta.tenant, other.meta.name))):
            more += other.spec.size_mib - its.volume.spec.size_mib if its.host == record.host else 0
    free = inventory.topology.disk_mib - state.host_claims(record.host, observed).usage.disk_mib
    if more > free:
        yield Violation(
            "spec.size",
            format_mib(after),
            f"needs {format_mib(more)} more on its host {record.host}, which has {format_mib(max(free, 0))} free",
            f"write {format_mib(before + max(free - (more - (after - before)), 0))} or less, or make room there",
        )


def refuse_used(state: State, key: str) -> None:
    """Raises Conflict where somebody uses the volume, saying who."""
    meta = state.volumes[key].volume.meta
    users = sorted(state.instances[uid].meta.name for uid in state.volume_users.get(key, ()))
    askers = sorted(state.environments[k].environment.meta.name for k in state.volume_askers.get(key, ()))
    if not users and not askers:
        return
    who = f"instance {users[0]}" if users else f"environment {askers[0]}"
    of = f" of environment {state.instances[next(iter(state.volume_users[key]))].environment}" if users else ""
    raise Conflict(
        f"volume {meta.name} is used by {who}{of}: take it out of the environment's spec.volumes, or delete the environment,"
        " first; its data stays until the volume is deleted"
    )


def delete(draft: Draft, key: str) -> tuple[Meta, bool]:
    """Begin the end of a volume that nobody uses: its metadata, and whether its host is still to confirm it."""
    record = draft.state.volumes[key]
    meta = record.volume.meta
    if not record.host:
        draft.drop("Volume", key)
        return meta, False
    if not meta.deleting_s:
        meta = replace(meta, deleting_s=draft.now_s, resource_version=draft.revision)
        draft.put(replace(record, volume=replace(record.volume, meta=meta)))
    return meta, True


def held_by(state: State, host: str) -> list[str]:
    """Names of the volumes whose data is on a host and shall stay."""
    keys = state.host_volumes.get(host, {})
    return [named(state.volumes[k].volume.meta) for k in sorted(keys) if not state.volumes[k].volume.meta.deleting_s]


# --- placing ----------------------------------------------------------------------------------------------------------


def cost(instances: Iterable[InstanceRecord]) -> int:
    """Records that the binding of one instance's volumes may write, at most."""
    return max((min(len(i.volumes), MAX_VOLUMES) for i in instances), default=0)


def count(overlay: Overlay, host: str, asked: tuple[VolumeRequest, ...], epoch: int) -> None:
    """Count the room of volumes that a decision binds to a host."""
    for volume in asked:
        if not volume.host:
            overlay.add(host, volume_claim(volume.uid, volume.size_mib, epoch))


def bind(draft: Draft, host: str, asked: tuple[VolumeRequest, ...], instance: InstanceRecord) -> None:
    """Write that volumes which were nowhere are on this host from now on."""
    for volume in asked:
        if volume.host:
            continue
        key = tenant_key(instance.meta.tenant, volume.name)
        record = draft.state.volumes[key]
        meta = replace(record.volume.meta, resource_version=draft.revision)
        bound = replace(record, volume=replace(record.volume, meta=meta), host=host, bound_for=instance.meta.uid)
        draft.put(bound)


def unbind(draft: Draft, instance: InstanceRecord) -> None:
    """Take back what was bound for an instance whose host was never told of it."""
    for use in instance.volumes:
        record = draft.state.volumes[tenant_key(instance.meta.tenant, use.volume)]
        if record.bound_for == instance.meta.uid and not record.made:
            meta = replace(record.volume.meta, resource_version=draft.revision)
            draft.put(replace(record, volume=replace(record.volume, meta=meta), host="", bound_for=""))


def release(draft: Draft, instance: InstanceRecord) -> None:
    """An instance is forgotten: its volumes are written again, so that those who watch them see that nobody uses them."""
    for use in instance.volumes:
        record = draft.state.volumes.get(tenant_key(instance.meta.tenant, use.volume))
        if record is not None:
            meta = replace(record.volume.meta, resource_version=draft.revision)
            draft.put(replace(record, volume=replace(record.volume, meta=meta)))


# --- hosts ------------------------------------------------------------------------------------------------------------


def refs(state: State, instance: InstanceRecord) -> tuple[VolumeRef, ...]:
    """The volumes of an instance, as its host gets them."""
    found = []
    for use in instance.volumes:
        record = state.volumes[tenant_key(instance.meta.tenant, use.volume)]
        volume = record.volume
        found.append(VolumeRef(volume.meta.uid, use.mount, volume.spec.size_mib, FORMAT, use.read_only, record.made))
    return tuple(found)


def revision(state: State, instance: InstanceRecord) -> int:
    """At which revision a volume of the instance last changed."""
    return max(
        (
            state.volumes[tenant_key(instance.meta.tenant, use.volume)].volume.meta.resource_version
            for use in instance.volumes
        ),
        default=0,
    )


def removed(state: State, host: str) -> tuple[str, ...]:
    """Uids of the volumes whose data a host is to delete."""
    records = (state.volumes[key] for key in sorted(state.host_volumes.get(host, {})))
    return tuple(r.volume.meta.uid for r in records if r.volume.meta.deleting_s)


def told(draft: Draft, host: str, before: HostReport | None, report: HostReport) -> None:
    """A host has said which volumes it has: what it made is known to be there, what it deleted is forgotten."""
    if report.volumes is None:
        return
    state = draft.state
    here = {facts.uid for facts in report.volumes}
    earlier = {facts.uid for facts in (before.volumes or ())} if before is not None else set()
    known: set[str] = set()
    for key in list(state.host_volumes.get(host, {})):
        record = state.volumes[key]
        meta = record.volume.meta
        known.add(meta.uid)
        if len(draft) + 2 > MAX_RECORDS:
            continue  # the next report finds the rest
        if meta.deleting_s and meta.uid not in here:
            draft.drop("Volume", key)
            draft.event(_ref(record), "Deleted", f"its data is gone from host {host}", source=host)
            draft.sightings.append(CapacityChanged())
        elif not record.made and meta.uid in here:
            meta = replace(meta, resource_version=draft.revision)
            draft.put(replace(record, volume=replace(record.volume, meta=meta), made=True))
            draft.event(_ref(record), "Made", f"its disk is on host {host}", source=host)
        elif record.made and meta.uid in earlier and meta.uid not in here:
            draft.event(
                _ref(record), "VolumeLost", f"host {host} does not find its data any more", warning=True, source=host
            )
    if strange := sorted(here - known - earlier):
        draft.event(
            ObjectRef("Host", host),
            "UnknownVolumes",
            f"the host has data of volumes that nobody knows, and keeps it: {', '.join(map(shown, strange[:8]))}",
            warning=True,
            source=host,
        )


def _ref(record: VolumeRecord) -> ObjectRef:
    meta = record.volume.meta
    return ObjectRef("Volume", meta.name, meta.tenant, meta.uid)


def facts_of(observed: Observed, record: VolumeRecord) -> tuple[bool, VolumeFacts | None]:
    """(whether its host's word is known, what it said of this volume)."""
    report = observed.host(record.host).report
    if report is None or report.volumes is None:
        return False, None
    uid = record.volume.meta.uid
    return True, next((facts for facts in report.volumes if facts.uid == uid), None)
