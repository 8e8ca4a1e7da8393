"""Capacity for operators: the sums of a fleet, or one host down to its threads (``picture``).

Theory of operation. What is asked about is copied on the loop (references to frozen records); the numbers are made in a
worker thread, which lets go of the interpreter after every few hosts, so that the loop goes on. Numbers of hosts that have not
changed since they were last asked for are kept.
"""

import asyncio
import time
from dataclasses import dataclass

from casemate_core import selector as selectors
from casemate_core.claims import HostClaims
from casemate_core.errors import InvalidSpec, NotFound, Violation
from casemate_core.topology import Topology
from casemate_manager.api import picture
from casemate_manager.api.picture import named_amounts
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import HostRecord
from casemate_manager.fleet.state import State
from casemate_manager.scheduler.headroom import CELL_KINDS, COUNT, Group, Summaries, Summary
from casemate_wire.v1 import top_pb2 as messages

DEFAULT_HOSTS = 10
MAX_HOSTS = 1000
MAX_GROUPS = 1000
#: Hosts between two moments at which the worker lets go of the interpreter: about a millisecond of new ones.
HOSTS_AT_A_TIME = 4
#: Hosts that are copied before the loop may do something else. Each is copied at one moment, not all at the same.
ASKED_AT_A_TIME = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of one host at the time of the question."""

    name: str
    group: str
    closed: str
    instances: int
    topology: Topology | None
    claims: HostClaims


class Top:
    """Answers ``Top``. ``summaries`` are kept from one question to the next, and used by one at a time."""

    def __init__(self) -> None:
        self._summaries = Summaries()
        self._one_at_a_time = asyncio.Lock()

    async def top(self, state: State, observed: Observed, request: messages.TopRequest) -> messages.TopResponse:
        """Raises NotFound, InvalidSpec."""
        if request.host:
            return messages.TopResponse(host=await _host(state, observed, request.host))
        selector = selectors.parse(request.selector)
        every = list(state.hosts)
        asked = []
        for number, name in enumerate(every):
            if number % ASKED_AT_A_TIME == ASKED_AT_A_TIME - 1:
                await asyncio.sleep(0)
            record = state.hosts.get(name)
            if record is not None and selector.matches(record.host.meta.labels):
                asked.append(_asked(state, observed, name, record.host.meta.labels.get(request.group_by, "")))
        count = min(request.hosts if request.hosts > 0 else DEFAULT_HOSTS, MAX_HOSTS)
        async with self._one_at_a_time:
            fleet = await asyncio.to_thread(self._fleet, asked, request.group_by, count, every)
        return messages.TopResponse(fleet=fleet)

    def _fleet(self, asked: list[Asked], group_by: str, count: int, every: list[str]) -> messages.FleetCapacity:
        """The sums; runs in a worker thread."""
        self._summaries.keep(every)
        whole = Group()
        groups: dict[str, Group] = {}
        worst: list[tuple[int, str, Asked, Summary]] = []
        for number, host in enumerate(asked):
            if number % HOSTS_AT_A_TIME == 0:
                time.sleep(0)  # lets the loop have the interpreter
            summary = None
            if host.topology is not None:
                summary = self._summaries.of(host.name, host.topology, host.claims)
                worst.append((-summary.stranded_milli, host.name, host, summary))
            whole.add(summary, closed=bool(host.closed))
            if group_by:
                if len(groups) >= MAX_GROUPS and host.group not in groups:
                    raise InvalidSpec(
                        (
                            Violation(
                                "group_by", group_by, f"has more than {MAX_GROUPS} values", "name a label with fewer"
                            ),
                        )
                    )
                groups.setdefault(host.group, Group()).add(summary, closed=bool(host.closed))
        worst.sort(key=lambda item: item[:2])
        return messages.FleetCapacity(
            groups=[_group("", whole, is_all=True), *(_group(value, groups[value]) for value in sorted(groups))],
            hosts=[_headroom(host, summary) for _, _, host, summary in worst[:count]],
            group_by=group_by,
        )


async def _host(state: State, observed: Observed, name: str) -> messages.HostCapacity:
    """One host down to its threads. Raises NotFound, InvalidSpec."""
    if name not in state.hosts:
        raise NotFound("Host", name)
    asked = _asked(state, observed, name)
    if asked.topology is None:
        raise InvalidSpec((Violation("host", name, "has not told what it is made of", "wait until it is Ready"),))
    names = {
        claim.owner: (instance.meta.tenant, instance.meta.name)
        for claim in asked.claims
        if (instance := state.instances.get(claim.owner)) is not None
    }
    found = await asyncio.to_thread(picture.of_host, asked.topology, asked.claims, names)
    found.name, found.closed = name, asked.closed
    return found


def _asked(state: State, observed: Observed, name: str, group: str = "") -> Asked:
    inventory = state.inventories.get(name)
    return Asked(
        name,
        group,
        _closed(state, observed, state.hosts[name]),
        len(state.host_placements.get(name, {})),
        inventory.topology if inventory else None,
        state.host_claims(name, observed),
    )


def _closed(state: State, observed: Observed, record: HostRecord) -> str:
    """Why nothing new is placed on a host; empty where something is."""
    seen = observed.host(record.host.meta.name)
    if record.held:
        return f"held: {record.held}"
    if not seen.connected:
        return "not heard from"
    if not seen.whole:
        return "has not told what runs on it"
    return "cordoned" if record.host.spec.cordoned else ""


# --- a fleet ----------------------------------------------------------------------------------------------------------


def _group(value: str, group: Group, *, is_all: bool = False) -> messages.CapacityGroup:
    amounts = group.amounts()
    return messages.CapacityGroup(
        value=value,
        all=is_all,
        hosts=group.hosts,
        unknown=group.unknown,
        closed=group.closed,
        amounts=named_amounts(amounts.get("", {})),
        stranded=[
            messages.StrandedAmount(name=name, cause=cause.value, amount=amount, hosts=hosts, cell=-1)
            for (name, cause), (amount, hosts) in sorted(group.stranded.items())
        ],
        cells=[
            messages.CellKind(
                kind=kind,
                cells=amounts[kind][COUNT].total,
                amounts=named_amounts({name: a for name, a in amounts[kind].items() if name != COUNT}),
            )
            for kind in CELL_KINDS
            if kind in amounts
        ],
    )


def _headroom(host: Asked, summary: Summary) -> messages.HostHeadroom:
    return messages.HostHeadroom(
        name=host.name,
        closed=host.closed,
        instances=host.instances,
        stranded_milli=summary.stranded_milli,
        amounts=named_amounts(summary.amounts()),
        stranded=[
            messages.StrandedAmount(name=name, cause=cause.value, amount=amount, hosts=1, cell=-1)
            for name, cause, amount in sorted(summary.stranded)
        ],
    )
