"""Has exactly those fabric partitions active that are wanted: one look, one plan, its acts in order.

What may live here: the carrying out of :func:`casemate_agent.fabric.plan`. It remembers nothing, so that it may be ended between
any two acts, and the next one comes to the same end.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from casemate_agent import fabric
from casemate_agent.drivers.fabricports import Fabric
from casemate_core.errors import CasemateError


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
