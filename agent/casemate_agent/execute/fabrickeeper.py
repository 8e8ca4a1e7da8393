"""Has exactly those fabric partitions active that are wanted: one look, one plan, its acts in order.

What may live here: the carrying out of :func:`casemate_agent.hardware.fabric.plan`, and whose partitions those are. It
remembers nothing, so that it may be ended between any two acts, and the next one comes to the same end.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from casemate_agent.drivers.fabricports import Fabric
from casemate_agent.drivers.ports import DomainFacts
from casemate_agent.hardware import fabric
from casemate_agent.ledger.records import InstanceRecord
from casemate_core.errors import CasemateError, MachineError
from casemate_core.spec.instance import Run

DEADLINE_S = 10.0


class FabricNotReady(MachineError):
    """An instance is not started without the links between its GPUs that it was promised."""

    reason = "FabricNotReady"


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of it: partitions that are active now, and what is not as wanted, by partition."""

    active: frozenset[int]
    problems: Mapping[int, str]


async def keep(driver: Fabric, wanted: Collection[int], held: Collection[int], deadline_s: float) -> Kept:
    """Bring the fabric to what is wanted, as far as it goes. Raises what ``observe`` raises; an act that fails is a problem
    of its partition, and keeps no other from being done."""
    facts = await driver.observe(deadline_s)
    todo = fabric.plan(facts, wanted, held)
    problems = dict(todo.waits)
    for act, numbers in ((driver.deactivate, todo.end), (driver.activate, todo.begin)):
        for number in numbers:
            try:
                await act(number, deadline_s)
            except CasemateError as error:
                problems[number] = str(error)
    after = await driver.observe(deadline_s) if todo else facts
    return Kept(frozenset(p.id for p in after.partitions if p.active), problems)


async def withheld(
    driver: Fabric, records: Iterable[InstanceRecord], domains: Mapping[str, DomainFacts]
) -> dict[str, str]:
    """Keep the partitions of a host's instances; which of them are not to be started now, each with the reason."""
    wanted: dict[int, str] = {}
    held: set[int] = set()
    for record in records:
        # A claim that has just come is not admitted yet, and is by the time of the start: one that was refused is nobody's.
        claim = record.claim or (record.desired.placement.claim if record.refusal is None else None)
        partition = claim.partition if claim is not None else None
        if partition is None:
            continue
        domain = domains.get(record.uid)
        if domain is not None and domain.pid:
            held.add(partition)
        if not record.removed and record.desired.run is not Run.STOPPED:
            wanted[partition] = record.uid
    try:
        kept = await keep(driver, wanted, held, DEADLINE_S)
    except CasemateError as error:
        return {uid: f"partition {number}: {error}" for number, uid in wanted.items()}
    return {
        uid: f"partition {number}: {kept.problems.get(number, 'is not active')}"
        for number, uid in wanted.items()
        if number not in kept.active
    }
