"""Which threads of one cell: the choice among cores, caches and siblings for dedicated vCPUs.

What may live here: choices within one mask of free threads. Which cell, and what else the instance asks, is decided
elsewhere (``cells``, ``solve``).

Theory of operation. Choosing has two stages, so that many cells and caches can be compared cheaply. A *plan* is counted
only: how many cores of which class, with the two numbers by which plans compare. *Taking* then reads the lowest threads
out of the masks of the one plan that won. Both stages see cores through ``CoreClass`` (see ``topology.index``).

A plan compares by ``(a, b)``, smaller is better::

    REQUIRE, WHOLE   a = threads taken, b = cores used          (an odd count holds one sibling idle)
    ISOLATE          a = threads taken, b = cores used          (cores with fewer siblings waste less)
    PREFER           a = cores used, b = wholly free cores broken into
    ANY              a = wholly free cores broken into, b = cores used

Each is minimal for cores of one or two threads; for wider ones the greedy choice is taken (largest first).
"""

from enum import Enum
from typing import NamedTuple

from casemate_core.cpuset import bits, lowest
from casemate_core.topology import CellIndex, CoreClass


class Mode(Enum):
    """A thread policy as it acts on cores."""

    REQUIRE = "require"
    """Whole cores of full width."""
    WHOLE = "whole"
    """Whole cores of any width: real time without a word on siblings."""
    ISOLATE = "isolate"
    PREFER = "prefer"
    ANY = "any"

    @property
    def takes_whole_cores(self) -> bool:
        """No sibling is left to others."""
        return self not in (Mode.PREFER, Mode.ANY)


class Step(NamedTuple):
    """Take ``vcpus`` threads off the ``cores`` lowest cores of ``firsts``, ``per_core`` at most from each.

    ``shape`` None: ``firsts`` are single threads. ``hold``: what is not used of those cores is held idle.
    """

    shape: CoreClass | None
    firsts: int
    cores: int
    vcpus: int
    per_core: int
    hold: bool


class Plan(NamedTuple):
    """A counted choice; ``taken`` threads leave the free mask."""

    a: int
    b: int
    taken: int
    steps: tuple[Step, ...]
    caches: int = 1
    """Last-level caches used."""


def plan(classes: tuple[CoreClass, ...], free: int, count: int, mode: Mode, width: int) -> Plan | None:
    """How ``count`` vCPUs would lie on the free threads; None if they cannot. ``width`` is the host's SMT width."""
    if free.bit_count() < count:
        return None
    if mode is Mode.ANY:
        return _plan_any(classes, free, count)
    if mode is Mode.PREFER:
        return _plan_prefer(classes, free, count)
    if mode is Mode.ISOLATE:
        return _plan_isolate(classes, free, count)
    return _plan_whole(classes, free, count, max(width, 2) if mode is Mode.REQUIRE else 1)


def capacity(classes: tuple[CoreClass, ...], free: int, mode: Mode, width: int, limit: int) -> int:
    """The most vCPUs that ``plan`` finds room for while it takes at most ``limit`` threads."""
    if limit <= 0:
        return 0
    if not mode.takes_whole_cores:
        return min(free.bit_count(), limit)
    found = 0
    least = max(width, 2) if mode is Mode.REQUIRE else 1
    # ISOLATE carries one vCPU a core, so narrow cores go furthest within the limit; the others carry one a thread
    for shape in reversed(classes) if mode is Mode.ISOLATE else classes:
        if shape.width < least:
            continue
        cores = min(shape.whole(free).bit_count(), limit // shape.width)
        limit -= cores * shape.width
        found += cores if mode is Mode.ISOLATE else cores * shape.width
    return found


def plan_cell(cell: CellIndex, free: int, count: int, mode: Mode, width: int, limit: int) -> Plan | None:
    """A plan within one cell that takes at most ``limit`` threads, on the fewest last-level caches.

    One cache: the one with the best plan, of equal ones the fullest. Several: the emptiest are filled, and the rest goes
    to the fullest that holds it.
    """
    free &= cell.mask
    if len(cell.l3) == 1:
        found = plan(cell.classes, free, count, mode, width)
        return found if found is not None and found.taken <= limit else None
    best: Plan | None = None
    # fullest first: of plans alike the first one found is the tightest, and none can be better than the ideal
    for room, number in sorted([((free & cache.mask).bit_count(), i) for i, cache in enumerate(cell.l3)]):
        if room < count:
            continue
        cache = cell.l3[number]
        found = plan(cache.classes, free & cache.mask, count, mode, width)
        if found is None or found.taken > limit:
            continue
        if best is None or (found.a, found.b) < (best.a, best.b):
            best = found
            if _is_ideal(found, cell.classes, count, mode):
                break
    if best is not None:
        return best
    if free.bit_count() < count:
        return None
    found = _plan_caches(cell, free, count, mode, width)
    if found is not None and found.taken <= limit:
        return found
    # the cores that waste least may lie over more caches than the fewest
    found = plan(cell.classes, free, count, mode, width)
    if found is None or found.taken > limit:
        return None
    return Plan(found.a, found.b, found.taken, found.steps, len(cell.l3))


def _is_ideal(found: Plan, classes: tuple[CoreClass, ...], count: int, mode: Mode) -> bool:
    """No plan for so many vCPUs on cores of one or two threads has a smaller (a, b)."""
    if classes[0].width > 2:
        return False
    if mode is Mode.ANY:
        return found.a == 0  # then each vCPU is alone on its core
    if mode is Mode.PREFER:
        return (found.a, found.b) == (-(-count // 2), count // 2)
    if mode is Mode.ISOLATE:
        return found.a == count * classes[-1].width
    return (found.a, found.b) == (count, -(-count // classes[0].width))


def _plan_caches(cell: CellIndex, free: int, count: int, mode: Mode, width: int) -> Plan | None:
    rooms = sorted(
        ((capacity(cache.classes, free & cache.mask, mode, width, 1 << 30), cache) for cache in cell.l3),
        key=lambda item: (-item[0], item[1].id),
    )
    parts: list[Plan] = []
    left = count
    for i, (room, cache) in enumerate(rooms):
        if room == 0:
            break
        if room >= left:  # the fullest cache that still holds the rest
            room, cache = min((item for item in rooms[i:] if item[0] >= left), key=lambda item: (item[0], item[1].id))
        found = plan(cache.classes, free & cache.mask, min(left, room), mode, width)
        if found is None:
            return None
        parts.append(found)
        left -= min(left, room)
        if left == 0:
            return Plan(
                sum(p.a for p in parts),
                sum(p.b for p in parts),
                sum(p.taken for p in parts),
                tuple(step for p in parts for step in p.steps),
                len(parts),
            )
    return None


def take(plan: Plan) -> tuple[list[int], int]:
    """The threads of a plan: one per vCPU, siblings side by side, and the mask of those held idle."""
    vcpus: list[int] = []
    held = 0
    for step in plan.steps:
        chosen = lowest(step.firsts, step.cores)
        if step.shape is None:
            vcpus.extend(bits(chosen))
            continue
        left = step.vcpus
        offsets = step.shape.offsets
        for first in bits(chosen):
            threads = [first, *[first + offset for offset in offsets]]
            used = min(left, step.per_core, len(threads))
            vcpus.extend(threads[:used])
            left -= used
            if step.hold:
                for thread in threads[used:]:
                    held |= 1 << thread
    return vcpus, held


def _plan_whole(classes: tuple[CoreClass, ...], free: int, count: int, least: int) -> Plan | None:
    if least > 1:
        classes = tuple(shape for shape in classes if shape.width >= least)
    steps: list[Step] = []
    left, taken, cores = count, 0, 0
    spare: tuple[CoreClass, int, int] | None = (
        None  # the narrowest class with a whole core left, its firsts, how many used
    )
    for shape in classes:
        firsts = shape.whole(free)
        there = firsts.bit_count()
        used = min(there, left // shape.width)
        if used:
            steps.append(Step(shape, firsts, used, used * shape.width, shape.width, True))
            left -= used * shape.width
            taken += used * shape.width
            cores += used
        if used < there:
            spare = (shape, firsts, used)
    if left:
        if spare is None:
            return None
        shape, firsts, used = spare
        steps = [step for step in steps if step.shape is not shape]
        steps.append(Step(shape, firsts, used + 1, used * shape.width + left, shape.width, True))
        taken += shape.width
        cores += 1
    return Plan(taken, cores, taken, tuple(steps))


def _plan_isolate(classes: tuple[CoreClass, ...], free: int, count: int) -> Plan | None:
    steps: list[Step] = []
    left, taken = count, 0
    for shape in reversed(classes):
        firsts = shape.whole(free)
        used = min(left, firsts.bit_count())
        if used:
            steps.append(Step(shape, firsts, used, used, 1, True))
            left -= used
            taken += used * shape.width
        if not left:
            return Plan(taken, count, taken, tuple(steps))
    return None


def _plan_prefer(classes: tuple[CoreClass, ...], free: int, count: int) -> Plan:
    if classes and classes[0].width > 2:
        return _plan_greedy(classes, free, count, whole_first=True)
    steps: list[Step] = []
    left, partial, cores, broken = count, free, 0, 0
    spare: tuple[CoreClass, int, int] | None = None
    singles = 0
    for shape in classes:
        firsts = shape.whole(free)
        partial &= ~shape.threads(firsts)
        if shape.width == 1:
            singles |= firsts
            continue
        there = firsts.bit_count()
        used = min(there, left // 2)
        if used:
            steps.append(Step(shape, firsts, used, 2 * used, 2, False))
            left -= 2 * used
            cores += used
            broken += used
        if used < there:
            spare = (shape, firsts, used)
    # one thread a core from here on: threads beside a stranger's first, then cores of one thread, then half a core
    for firsts, is_whole in ((partial, 0), (singles, 1)):
        used = min(left, firsts.bit_count())
        if used:
            steps.append(Step(None, firsts, used, used, 1, False))
            left -= used
            cores += used
            broken += used * is_whole
    if left and spare is not None:
        shape, firsts, used = spare
        steps = [step for step in steps if step.shape is not shape]
        steps.append(Step(shape, firsts, used + 1, 2 * used + 1, 2, False))
        cores += 1
        broken += 1
    return Plan(cores, broken, count, tuple(steps))


def _plan_any(classes: tuple[CoreClass, ...], free: int, count: int) -> Plan:
    if classes and classes[0].width > 2:
        return _plan_greedy(classes, free, count, whole_first=False)
    wholes = [(shape, shape.whole(free)) for shape in classes]
    partial = free
    for shape, firsts in wholes:
        partial &= ~shape.threads(firsts)
    left = max(0, count - partial.bit_count())  # what partial cores cannot carry
    steps: list[Step] = []
    in_wholes, broken = 0, 0
    for shape, firsts in wholes:  # widest first: the fewest are broken
        used = min(firsts.bit_count(), -(-left // shape.width))
        if used:
            carried = min(used * shape.width, count - in_wholes)
            steps.append(Step(shape, firsts, used, carried, shape.width, False))
            in_wholes += carried
            left = max(0, left - used * shape.width)
            broken += used
    rest = count - in_wholes
    if rest:
        steps.append(Step(None, partial, rest, rest, 1, False))
    return Plan(broken, broken + rest, count, tuple(steps))


def _plan_greedy(classes: tuple[CoreClass, ...], free: int, count: int, *, whole_first: bool) -> Plan:
    """Cores of more than two threads: one by one, by the number of their free threads."""
    cores: list[tuple[bool, int, int]] = []
    for shape in classes:
        for first in bits(shape.first):
            threads = shape.threads(1 << first)
            mine = threads & free
            if mine:
                cores.append((mine == threads, mine.bit_count(), mine))
    # PREFER: fullest first, of equal ones those already shared. ANY: those already shared first, fullest of them first
    cores.sort(key=lambda c: (-c[1], c[0], c[2]) if whole_first else (c[0], -c[1], c[2]))
    steps: list[Step] = []
    left, broken = count, 0
    for is_whole, room, mine in cores:
        used = min(left, room)
        steps.append(Step(None, mine, used, used, 1, False))
        broken += is_whole
        left -= used
        if not left:
            break
    a, b = (len(steps), broken) if whole_first else (broken, len(steps))
    return Plan(a, b, count, tuple(steps))
