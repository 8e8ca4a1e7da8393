"""Volumes of an instance and of the host: what is to be made, to grow, and to be deleted. PURE.

What may live here: decisions about volumes. When an instance comes up or is kept is decided in
:mod:`casemate_agent.plan.converge`.

Theory of operation. A volume whose data the manager knows to be here (`VolumeRef.made`) is never made anew: where it is
missing, its instance does not start, and that is said. So an empty disk never stands where somebody's data was. Data is
deleted for one reason alone: the manager names the volume as deleted. Volumes that nobody names are left as they are.
"""

from collections.abc import Iterator

from casemate_agent import actions as act
from casemate_agent.ledger.records import Book, Observation
from casemate_agent.plan.drafting import ACTIVE, Draft
from casemate_core.quantity import format_mib
from casemate_core.spec.instance import DesiredInstance, Phase, VolumeRef


def prepare(d: Draft) -> bool:
    """Plan to have the volumes of an instance that is about to start. False where it cannot start, which is said."""
    stored = d.observed.volumes
    if not d.record.desired.volumes:
        return True
    if stored is None:
        d.says(Phase.PREPARING, "Waiting", f"volumes: {d.observed.silent.get('volumes', 'no answer')}")
        return False
    for volume in d.record.desired.volumes:
        there = stored.get(volume.uid)
        if there is None and volume.made:
            message = f"the data of volume {volume.name} ({volume.uid}) is not on this host; it is not made anew"
            d.says(Phase.FAILED, "VolumeLost", message)
            return False
        if there is not None and (other := _user(d.observed, there.path, d.record.uid)):
            d.says(Phase.PREPARING, "VolumeInUse", f"volume {volume.name} is still in use by domain {other}")
            return False
    for volume in d.record.desired.volumes:
        there = stored.get(volume.uid)
        if there is None:
            d.actions.append(act.CreateVolume(volume, f"volume {volume.name} was never made"))
        elif there.size_mib < volume.size_mib:
            d.actions.append(act.GrowVolume(d.record.uid, volume, False, _grown(volume, there.size_mib)))
    return True


def keep(d: Draft, applied: DesiredInstance) -> None:
    """Volumes of a running instance: those that are to be larger grow, those that are gone are named."""
    stored = d.observed.volumes
    if stored is None:
        return
    wanted = {volume.uid: volume for volume in d.record.desired.volumes}
    for used in applied.volumes:
        there, volume = stored.get(used.uid), wanted.get(used.uid)
        if there is None:
            d.drift.append(
                f"VolumeLost: volume {used.name} ({used.uid}): its file is gone while {d.record.uid} runs on it"
            )
        elif volume is not None and there.size_mib < volume.size_mib and not used.read_only:
            # One that is attached for reading alone grows when its instance starts next: QEMU does not write to it.
            d.actions.append(act.GrowVolume(d.record.uid, volume, True, _grown(volume, there.size_mib)))


def _grown(volume: VolumeRef, size_mib: int) -> str:
    return f"volume {volume.name} grows from {format_mib(size_mib)} to {format_mib(volume.size_mib)}"


def _user(observed: Observation, path: str, uid: str) -> str:
    """Another domain that runs on this file."""
    domains = [*(observed.domains or {}).values(), *observed.foreign]
    return next((d.name for d in domains if d.uuid != uid and d.phase in ACTIVE and path in d.files), "")


def removals(book: Book, observed: Observation) -> Iterator[tuple[str, tuple[act.Action, ...]]]:
    """(uid, actions) of the volumes that were deleted, and whose data nobody uses any more."""
    if observed.volumes is None or observed.domains is None:
        return
    wanted = {volume.uid for record in book.instances.values() for volume in record.desired.volumes}
    for uid in book.host.volumes_removed:
        there = observed.volumes.get(uid)
        if there is None or uid in wanted or uid in observed.busy or _user(observed, there.path, ""):
            continue
        yield uid, (act.RemoveVolume(uid, "the volume was deleted"),)
