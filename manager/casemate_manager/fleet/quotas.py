"""PURE. What a tenant has asked for and holds, against its quotas.

Theory of operation. Two kinds of amounts. What is *asked for* (CPUs, memory, environments, volumes) follows from the specs
alone, growth room counted; it is judged when an environment or a volume is applied, in the batch that would write it. What is
*held* (GPUs by model, VFs) is known when a placement names the devices; it is judged in the batch that would write the
placement, and an instance over it waits. An amount that is over its quota already (the quota was lowered) may shrink or stay;
it may not grow.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from casemate_core.claims import Claim
from casemate_core.errors import CallerError, InvalidSpec, Violation
from casemate_core.quantity import format_mib, format_millicpus
from casemate_core.spec.access import SIZES, Tenant
from casemate_core.spec.environment import Environment, EnvironmentSpec
from casemate_core.spec.volume import Volume
from casemate_manager.fleet.records import PlacementRecord, tenant_key
from casemate_manager.fleet.state import State

_HELD: Final = ("gpus", "vfs")


class QuotaExceeded(CallerError):
    """A tenant would have more than it may: name of the quota, what it would have, and the quota."""

    reason = "QuotaExceeded"

    def __init__(self, tenant: str, name: str, would: int, quota: int) -> None:
        self.tenant, self.name, self.would, self.quota = tenant, name, would, quota
        super().__init__(f"tenant {tenant} {exceeding(name, would, quota)}: ask for less, or delete what is not needed")


def exceeding(name: str, would: int, quota: int) -> str:
    """The clause that tells of one amount over its quota."""
    return f"would have {_text(name, would)} of {name}, and its quota is {_text(name, quota)}"


def _text(name: str, amount: int) -> str:
    if name == "cpus":
        return format_millicpus(amount)
    return format_mib(amount) if name in SIZES else str(amount)


def asked(spec: EnvironmentSpec) -> dict[str, int]:
    """What one environment asks for."""
    return {
        "cpus": spec.replicas * max(spec.cpu.count, spec.cpu.max) * 1000,
        "memory": spec.replicas * max(spec.memory.size_mib, spec.memory.max_mib),
        "environments": 1,
    }


def asked_of_volume(volume: Volume) -> dict[str, int]:
    """What one volume asks for, whether or not anybody uses it."""
    return {"volumes": 1, "storage": volume.spec.size_mib}


def held(state: State, host: str, claim: Claim) -> Counter[str]:
    """GPUs by model and VFs of one claim; a part of a GPU counts as one."""
    found: Counter[str] = Counter()
    gpus = {*claim.gpus, *(share.gpu for share in claim.shares)}
    if gpus:
        inventory = state.inventories.get(host)
        models = {gpu.uuid: gpu.model for gpu in inventory.topology.gpus} if inventory else {}
        for gpu in gpus:
            found["gpus"] += 1
            if model := models.get(gpu):
                found[f"gpus/{model}"] += 1
    if claim.vfs:
        found["vfs"] = len(claim.vfs)
    return found


def placements_of(state: State, tenant: str) -> Iterator[PlacementRecord]:
    """Placements of a tenant's instances."""
    for key in state.tenant_environments.get(tenant, {}):
        for instance in state.instances_of(state.environments[key].environment.meta.uid):
            yield from state.instance_placements.get(instance.meta.uid, {}).values()


def used(state: State, tenant: str, names: Iterable[str] = ()) -> dict[str, int]:
    """What a tenant has asked for, and what it holds of the devices among ``names``."""
    total: Counter[str] = Counter(cpus=0, memory=0, environments=0, volumes=0, storage=0)
    for key in state.tenant_environments.get(tenant, {}):
        total.update(asked(state.environments[key].environment.spec))
    for key in state.tenant_volumes.get(tenant, {}):
        total.update(asked_of_volume(state.volumes[key].volume))
    devices = [name for name in names if name.partition("/")[0] in _HELD]
    if devices:
        holding: Counter[str] = Counter()
        for placement in placements_of(state, tenant):
            holding.update(held(state, placement.host, placement.claim))
        total.update({name: holding[name] for name in devices})
    return dict(total)


def check(state: State, objects: Iterable[object], tenants: Mapping[str, Tenant]) -> None:
    """Whether these environments and volumes may be written. Raises QuotaExceeded; InvalidSpec where a priority is too high."""
    given: dict[str, list[Environment | Volume]] = {}
    for one in objects:
        if isinstance(one, Environment | Volume):
            given.setdefault(one.meta.tenant, []).append(one)
    for tenant, asking in given.items():
        quotas = tenants[tenant].quotas if tenant in tenants else {}
        if not quotas:
            continue
        _check_priority([one for one in asking if isinstance(one, Environment)], quotas)
        before = used(state, tenant)
        after = Counter(before)
        for one in asking:
            key = tenant_key(tenant, one.meta.name)
            if isinstance(one, Volume):
                if (there := state.volumes.get(key)) is not None:
                    after.subtract(asked_of_volume(there.volume))
                after.update(asked_of_volume(one))
                continue
            known = state.environments.get(key)
            if known is not None:
                after.subtract(asked(known.environment.spec))
            after.update(asked(one.spec))
        for name, would in sorted(after.items()):
            quota = quotas.get(name)
            if quota is not None and would > quota and would > before.get(name, 0):
                raise QuotaExceeded(tenant, name, would, quota)


def _check_priority(environments: Iterable[Environment], quotas: Mapping[str, int]) -> None:
    highest = quotas.get("priority")
    for one in environments:
        if highest is not None and one.spec.priority > highest:
            raise InvalidSpec(
                (
                    Violation(
                        "spec.priority",
                        str(one.spec.priority),
                        f"is above what tenant {one.meta.tenant} may ask for",
                        f"write {highest} or less",
                    ),
                ),
                f"environment/{one.meta.name}",
            )


class Devices:
    """What tenants hold of devices, decisions of the batch in the making included."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._held: dict[str, Counter[str]] = {}

    def exceeded(self, tenant: str, placed: Iterable[tuple[str, Claim]]) -> str:
        """The clause about the first quota that these placements would exceed; empty where there is none.

        They are counted where there is none: call it once for what is then written.
        """
        record = self._state.tenants.get(tenant)
        quotas = {n: q for n, q in record.quotas.items() if n.partition("/")[0] in _HELD} if record else {}
        if not quotas:
            return ""
        if tenant not in self._held:
            self._held[tenant] = Counter()
            for placement in placements_of(self._state, tenant):
                self._held[tenant].update(held(self._state, placement.host, placement.claim))
        more: Counter[str] = Counter()
        for host, claim in placed:
            more.update(held(self._state, host, claim))
        after = self._held[tenant] + more
        for name, quota in sorted(quotas.items()):
            if more[name] and after[name] > quota:
                return f"tenant {tenant} {exceeding(name, after[name], quota)}"
        self._held[tenant] = after
        return ""
