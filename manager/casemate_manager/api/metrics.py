"""The manager's metrics at one moment: what was counted, and gauges read off the committed state.

What may live here: reading. Theory of operation: a fleet is walked a few objects at a time, so that a scrape of a large
one never holds up the loop; phases are those that users see (:mod:`casemate_manager.views`), capacity is what ``casemate
top`` shows, made in its worker thread.
"""

import asyncio
from collections import Counter
from typing import Final

from casemate_core.errors import CasemateError
from casemate_core.metrics import Family, Rows, drift_kind
from casemate_core.quantity import MIB
from casemate_manager import metrics as m
from casemate_manager import views
from casemate_manager.api.feed import Feed
from casemate_manager.api.top import Top
from casemate_manager.sessions import Sessions
from casemate_manager.writer import Writer
from casemate_wire.exposition import process_rows
from casemate_wire.v1 import top_pb2

#: Objects between two moments at which the loop may do something else: about a millisecond of them.
AT_A_TIME: Final = 64
KIB: Final = 1024


class ManagerMetrics:
    """Reads everything when it is asked."""

    def __init__(self, writer: Writer, sessions: Sessions, feed: Feed, version: str) -> None:
        self._writer = writer
        self._sessions = sessions
        self._feed = feed
        self._version = version
        self._top = Top()

    async def rows(self) -> list[Rows]:
        """What was counted and what is now."""
        writer = self._writer
        found = [
            Rows(m.BUILD, {("manager", self._version): 1}),
            Rows(m.QUEUE, {(): writer.waiting}),
            Rows(m.EPOCH, {(): writer.epoch}),
            Rows(m.REVISION, {(): writer.state.revision}),
            Rows(m.LEADING, {(): writer.leading}),
            Rows(m.SESSIONS, {(): len(self._sessions)}),
            _by(m.WATCHERS, self._feed.watchers()),
            *writer.meter.rows(),
            *process_rows(),
        ]
        found += await self._phases()
        found += await self._capacity()
        return found

    async def _phases(self) -> list[Rows]:
        state, observed = self._writer.state, self._writer.observed
        hosts, environments, instances, drift = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        looked = 0
        for name in list(state.hosts):
            if (record := state.hosts.get(name)) is not None:
                status = views.host_status(state, observed, record)
                hosts[status.phase] += 1
                drift.update(map(drift_kind, status.drift))
            looked += 1
            if looked % AT_A_TIME == 0:
                await asyncio.sleep(0)
        for key in list(state.environments):
            environment = state.environments.get(key)
            if environment is None:
                continue  # gone meanwhile
            environments[views.environment_status(state, observed, environment).phase] += 1
            for instance in state.instances_of(environment.environment.meta.uid):
                instances[views.instance_phase(state, observed, instance)] += 1
                looked += 1
            looked += 1
            if looked % AT_A_TIME < 2:
                await asyncio.sleep(0)
        return [
            _by(m.HOSTS, hosts),
            _by(m.ENVIRONMENTS, environments),
            _by(m.INSTANCES, instances),
            _by(m.HOST_DRIFT, drift),
        ]

    async def _capacity(self) -> list[Rows]:
        try:
            answer = await self._top.top(self._writer.state, self._writer.observed, top_pb2.TopRequest(hosts=1))
        except CasemateError:
            return []  # what is not known is absent
        whole = answer.fleet.groups[0]
        amounts = {amount.name: amount.amount for amount in whole.amounts}
        found = []
        for family, name, unit in (
            (m.THREADS, "threads", 1), (m.MEMORY, "memory_mib", MIB), (m.GPUS, "gpus", 1), (m.VFS, "vfs", 1),
        ):  # fmt: skip
            if name in amounts:
                found.append(Rows(family, {("used",): amounts[name].used * unit, ("free",): amounts[name].free * unit}))
        stranded: dict[Family, dict[tuple[str, ...], float]] = {}
        units = {
            "threads": (m.STRANDED_THREADS, 1), "memory_mib": (m.STRANDED_MEMORY, MIB), "gpus": (m.STRANDED_GPUS, 1),
            "vfs": (m.STRANDED_VFS, 1), "devices": (m.STRANDED_DEVICES, 1),
        }  # fmt: skip
        for entry in whole.stranded:
            name, _, page_kib = entry.name.partition(":")
            if name == "pages":
                stranded.setdefault(m.STRANDED_PAGES, {})[entry.cause, str(int(page_kib) * KIB)] = entry.amount
            elif name in units:
                family, unit = units[name]
                stranded.setdefault(family, {})[(entry.cause,)] = entry.amount * unit
        return found + [Rows(family, values) for family, values in stranded.items()]


def _by(family: Family, counts: "Counter[str]") -> Rows:
    return Rows(family, {(word,): number for word, number in counts.items()})
