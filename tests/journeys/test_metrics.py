"""Metrics of a whole fleet by HTTP: every declared family is met in a story, keeps the rules of names, and is written down."""

import asyncio
import json
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from casemate_agent.actions import Start
from casemate_agent.domain.stats import parse_stats
from casemate_agent.drivers.deadline import DeadlineExecutor
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.drivers.simulated import SimulatedHost
from casemate_agent.gpu.health import judge
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.metrics import gpu_values
from casemate_agent.gpu.readings import GpuReading
from casemate_agent.ledger.files import MeasuredFiles
from casemate_agent.metrics import families as of_agents
from casemate_agent.metrics.scrape import domain_values
from casemate_agent.plan.converge import ActionOutcome
from casemate_core.errors import MachineError, Unavailable
from casemate_core.metrics import (
    Distribution,
    Family,
    Kind,
    Meter,
    Rows,
    counter,
    drift_kind,
    gauge,
    histogram,
    joined,
    problems,
)
from casemate_core.spec.environment import Cpu
from casemate_manager import metrics as of_managers
from casemate_manager.app import make_rules
from casemate_manager.fleet.commands import ApplyResources, HostHello, HostNote
from casemate_manager.store.ports import StoreFailed, Transaction
from casemate_manager.store.sqlite import SqliteStore
from casemate_manager.writer import Writer
from casemate_wire.exposition import rendered, served
from casemate_wire.stream import Hello, Outcome
from casemate_wire.v1 import operators_pb2 as pb
from casemate_wire.v1.operators_pb2_grpc import FleetStub
from support.small_fleet import image
from support.whole_fleet import WholeFleet, environment, until, whole_fleet

ROOT = Path(__file__).resolve().parents[2]
LINE = "1s 4k/c 1t 16G disk=1T"
#: Whoever has all CPUs here strands the rest.
RICH = "1s 3k/c 1t hk=1 16G 2M=512 gpu=2xH200 vf=1x4@dc dev=1xfec disk=1T"


class FailingStore(SqliteStore):
    """Fails the next commit when it is told to."""

    fail = False

    def commit(self, epoch: int, transactions: list[Transaction]) -> None:  # type: ignore[override]
        if self.fail:
            self.fail = False
            raise StoreFailed("the disk, as it was asked to")
        super().commit(epoch, transactions)


def met(rows: Iterable[Rows]) -> set[str]:
    """Families that have a value; counters and histograms one that counted something."""
    found = set()
    for each in rows:
        for value in each.values.values():
            number = value.cumulated[-1] if isinstance(value, Distribution) else value
            if each.family.kind is Kind.GAUGE or number:
                found.add(each.family.name)
    return found


def names(families: Iterable[Family]) -> set[str]:
    return {family.name for family in families}


async def scraped(url: str) -> dict[str, Any]:
    """What Prometheus would see, parsed by its own client: sample name and labels -> value."""
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        text = await answer.text()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_names_keep_the_rules() -> None:
    assert problems(of_managers.FAMILIES) == []
    assert problems(of_agents.FAMILIES) == []


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        (counter("casemate_placements", "Placements."), "_total is for counters"),
        (gauge("casemate_hosts_total", "Hosts."), "_total is for counters"),
        (gauge("casemate_memory_mib", "Memory."), "not a base unit"),
        (histogram("casemate_commit_ms", "Commits."), "not a base unit"),
        (gauge("hosts", "Hosts."), "begins with none of"),
        (gauge("casemate_Hosts", "Hosts."), "lower_snake_case"),
        (gauge("casemate_hosts", "Hosts"), "no sentence"),
        (gauge("casemate_hosts", ""), "no sentence"),
        (gauge("casemate_hosts_count", "Hosts."), "parts of a histogram"),
        (gauge("casemate_hosts_gauge", "Hosts."), "no part of a name"),
        (gauge("casemate_hosts", "Hosts.", "le"), "Prometheus' own"),
        (gauge("casemate_hosts", "Hosts.", "a", "a"), "there twice"),
        (replace(histogram("casemate_x_seconds", "X."), buckets=(2.0, 1.0)), "do not ascend"),
    ],
)
def test_a_name_that_breaks_a_rule_is_found(family: Family, problem: str) -> None:
    assert any(problem in found for found in problems([family]))
    assert problems([gauge("casemate_a", "A."), gauge("casemate_a", "A.")]) == ["casemate_a: is declared twice"]


def test_a_meter_takes_only_what_its_families_say() -> None:
    up, level = counter("casemate_a_total", "A.", "x"), gauge("casemate_b", "B.")
    meter = Meter.of([up, level])
    for wrong in (lambda: meter.add(up, by=1), lambda: meter.add(up, "a", by=-1), lambda: meter.add(level)):
        with pytest.raises(ValueError, match="is not counted"):
            wrong()
    with pytest.raises(ValueError, match="does not take"):
        meter.observe(up, 1.0, "a")
    assert meter.rows() == []


def test_a_histogram_is_cumulated_and_its_text_is_what_prometheus_reads() -> None:
    family = histogram("casemate_x_seconds", "X.", buckets=(0.1, 1.0))
    meter = Meter()
    for value in (0.05, 0.1, 0.5, 7.0):
        meter.observe(family, value)
    text = rendered(meter.rows()).decode()
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'casemate_x_seconds_bucket{le="0.1"} 2.0',
        'casemate_x_seconds_bucket{le="1.0"} 3.0',
        'casemate_x_seconds_bucket{le="+Inf"} 4.0',
        "casemate_x_seconds_count 4.0",
        "casemate_x_seconds_sum 7.65",
    ]


def unreadable_domain(host: SimulatedHost) -> None:
    """A domain that carries our mark and a record that is none: drift for as long as it is there."""
    domain = host.domains[host.add_foreign("marked")]
    domain.facts = replace(domain.facts, owned=True, record="{")
    host.tell(domain.facts.uuid, "defined")


async def failing_commit(folder: Path) -> list[Rows]:
    """A writer whose store fails once."""
    store = FailingStore(folder / "failing.db")
    writer = Writer(store, make_rules(), lambda: 1.0, lambda: "seed", retry_s=0.01)
    await writer.open()
    work = asyncio.create_task(writer.run())
    store.fail = True
    with pytest.raises(Unavailable):
        await writer.submit(ApplyResources("k", (image(),), "seed"))
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await writer.close()
    return writer.meter.rows()


async def story_of_a_manager(fleet: WholeFleet) -> list[Rows]:
    """Everything else that a manager counts happens once."""
    manager, writer = fleet.manager, fleet.manager.writer
    await fleet.apply(environment("all", cpus=2, memory_mib=16300))
    await fleet.until_ready(1)
    await fleet.apply(environment("huge", cpus=64))
    await until(lambda: "Pending" in fleet.phases())
    uid = next(uid for uid in writer.state.instances if writer.state.placement_of(uid))
    placement = writer.state.placement_of(uid)
    assert placement is not None
    session = writer.observed.host(placement.host).session
    refusal = Outcome("", uid, "Failed", "PlacementRefused", "no such thread", placement_refused=True)
    await writer.submit(HostNote(placement.host, session, refusal))
    await writer.submit(HostHello(Hello("BAD NAME", "b", 0, 0, "", 1), "s"))
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        await FleetStub(channel).List(pb.ListRequest(kind="Host"), timeout=60)
    watch = manager.core.feed.subscribe("Host")
    rows = await manager.metrics.rows()
    manager.core.feed.unsubscribe(watch)
    return rows


async def test_every_family_of_a_manager_is_met(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path / "rich", {"a": RICH}) as fleet:
        every = environment("whole")
        await fleet.apply(replace(every, spec=replace(every.spec, cpu=Cpu(2, policy="dedicated"))))
        await fleet.until_ready(1)
        rows = await fleet.manager.metrics.rows()
    async with whole_fleet(tmp_path / "plain", {"a": LINE}) as fleet:
        unreadable_domain(fleet.hosts["a"].host)
        await until(lambda: bool((r := fleet.manager.writer.observed.host("a").report) and r.drift))
        rows += await fleet.manager.metrics.rows()
        rows += await story_of_a_manager(fleet)
    rows += await failing_commit(tmp_path)
    assert names(of_managers.FAMILIES) - met(rows) == set()


async def test_figures_of_a_manager_are_those_of_its_fleet(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE, "b": LINE}, metrics_listen="127.0.0.1:0") as fleet:
        await fleet.apply(environment("web", replicas=3), environment("huge", cpus=64))
        await until(lambda: sorted(fleet.phases()) == ["Pending", "Ready", "Ready", "Ready"])
        seen = await scraped(fleet.manager.metrics_url)
        assert seen["casemate_placements_total", ()] == 3
        assert seen["casemate_placements_refused_total", ()] == 0
        assert seen["casemate_placement_failures_total", ()] >= 1
        assert seen["casemate_hosts", (("phase", "Ready"),)] == 2
        assert seen["casemate_sessions", ()] == 2
        assert seen["casemate_environments", (("phase", "Ready"),)] == 1
        assert seen["casemate_instances", (("phase", "Ready"),)] == 3
        assert seen["casemate_instances", (("phase", "Pending"),)] == 1
        assert seen["casemate_hellos_total", (("answer", "whole"),)] == 2
        assert seen["casemate_commands_total", (("command", "ApplyResources"), ("outcome", "taken"))] == 2
        assert seen["casemate_commit_duration_seconds_count", ()] > 0
        assert seen["casemate_leading", ()] == 1
        async with grpc.aio.insecure_channel(fleet.address) as channel:
            stub = FleetStub(channel)
            await stub.List(pb.ListRequest(kind="Environment"), timeout=60)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Get(pb.GetRequest(kind="Environment", tenant="default", name="nobody"), timeout=60)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Apply(pb.ApplyRequest(), timeout=60)
            assert [event async for event in stub.Events(pb.EventsRequest(), timeout=60)]
            watch = stub.Watch(pb.WatchRequest(kind="Host"), timeout=60)
            await watch.read()
            watch.cancel()
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/casemate.v1.Fleet/Nonsense")(b"", timeout=60)
        kept = {
            ("Fleet/List", "OK"): 1,
            ("Fleet/Get", "NOT_FOUND"): 1,
            ("Fleet/Apply", "INVALID_ARGUMENT"): 1,
            ("Fleet/Events", "OK"): 1,
            ("Fleet/Watch", "CANCELLED"): 1,
            ("other", "UNIMPLEMENTED"): 1,
        }
        counted: dict[tuple[str, str], float] = {}
        give_up_s = time.monotonic() + 60
        while counted != kept:  # a call is counted when it has ended here, which its caller does not wait for
            assert time.monotonic() < give_up_s, counted
            await asyncio.sleep(0.05)
            seen = await scraped(fleet.manager.metrics_url)
            found = {dict(labels)["method"]: dict(labels) for name, labels in seen if name == "casemate_rpcs_total"}
            counted = {
                (each["method"], each["code"]): seen["casemate_rpcs_total", tuple(sorted(each.items()))]
                for each in found.values()
                if each["method"] != "HostLink/Session"
            }
        timed = {dict(labels)["method"] for name, labels in seen if name == "casemate_rpc_duration_seconds_count"}
        assert timed == {"Fleet/List", "Fleet/Get", "Fleet/Apply"}, "what streams lasts as long as somebody listens"
        assert seen["process_open_fds", ()] > 0
        threads = [seen["casemate_capacity_threads", (("state", word),)] for word in ("used", "free")]
        assert sum(threads) == 8
        assert not [key for key in seen if key[0].startswith("casemate_stranded")], (
            "nothing is stranded, nothing is told"
        )


RECORD: dict[str, Any] = {
    "state.state": 1, "cpu.time": 2_500_000_000, "vcpu.current": 1, "vcpu.maximum": 2, "vcpu.0.time": 10**9,
    "vcpu.0.wait": 2 * 10**9, "vcpu.0.delay": 3 * 10**9, "balloon.current": 1024, "balloon.maximum": 2048,
    "balloon.rss": 1, "balloon.unused": 2, "balloon.available": 3, "balloon.usable": 4, "balloon.swap_in": 5,
    "balloon.swap_out": 6, "block.count": 1, "block.0.name": "vda", "block.0.path": "/d.qcow2", "block.0.rd.bytes": 7,
    "block.0.rd.reqs": 8, "block.0.wr.bytes": 9, "block.0.wr.reqs": 10, "block.0.backingIndex": 2, "net.count": 1, "net.0.name": "cm0", "net.0.rx.bytes": 11,
    "net.0.rx.pkts": 12, "net.0.rx.errs": 13, "net.0.rx.drop": 14, "net.0.tx.bytes": 15, "net.0.tx.pkts": 16,
    "net.0.tx.errs": 17, "net.0.tx.drop": 18,
}  # fmt: skip


def values_of(record: dict[str, Any]) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[Family, dict[tuple[str, ...], float]] = {}
    domain_values(found, parse_stats("u", "web-0", DomainPhase.RUNNING, record), {"cm0": "cmbr-1"})
    return {family.name: values for family, values in found.items()}


def test_a_domain_is_told_by_the_names_and_units_of_the_libvirt_exporters() -> None:
    seen = values_of(RECORD)
    assert seen["libvirt_domain_info_cpu_time_seconds_total"] == {("web-0",): 2.5}
    assert seen["libvirt_domain_info_virtual_cpus"] == {("web-0",): 1}
    assert seen["libvirt_domain_info_memory_usage_bytes"] == {("web-0",): 1024 * 1024}
    assert seen["libvirt_domain_info_maximum_memory_bytes"] == {("web-0",): 2048 * 1024}
    assert seen["libvirt_domain_info_state"] == {("web-0", "the domain is running"): 1}
    assert seen["libvirt_domain_vcpu_delay_seconds_total"] == {("web-0", "0"): 3.0}
    assert seen["libvirt_domain_memory_stats_usable_bytes"] == {("web-0",): 4 * 1024}
    assert seen["libvirt_domain_block_stats_read_bytes_total"] == {("web-0", "/d.qcow2", "vda"): 7}
    assert seen["libvirt_domain_interface_stats_transmit_drops_total"] == {("web-0", "cmbr-1", "cm0"): 18}


def test_what_libvirt_does_not_tell_is_absent_and_never_0() -> None:
    assert set(values_of({"state.state": 5})) == {"libvirt_domain_info_state"}
    for gone in [key for key in RECORD if key not in ("state.state", "vcpu.maximum")]:
        seen = values_of({key: value for key, value in RECORD.items() if key != gone})
        assert 0 not in [value for values in seen.values() for value in values.values()], gone
    assert "libvirt_domain_info_virtual_cpus" not in values_of(RECORD | {"vcpu.current": "two"})


async def test_every_family_of_an_agent_is_met(tmp_path: Path) -> None:
    meter = Meter.of(of_agents.FAMILIES)
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        host = fleet.hosts["a"]
        host.host.add_foreign("neighbour")
        await fleet.apply(environment("web", nics=()))
        await fleet.until_ready(1)
        unreadable_domain(host.host)
        await until(lambda: bool(host.agent.feed.report.drift))
        rows = await host.metrics.rows()
    by_name = {each.family.name: each.values for each in rows}
    assert by_name["casemate_drift"] == {("UnknownDomain",): 1}
    assert by_name["casemate_actions_total"]["Start", "done"] == 1
    assert by_name["casemate_host_instances"] == {("Ready",): 1}
    assert [labels[2:] for labels in by_name["casemate_domain_info"]] == [("default", "web", "web-0")]
    # What only a real machine does, by the same hooks.
    files = MeasuredFiles(
        tmp_path / "l",
        lambda s, bad: meter.add(of_agents.LEDGER_FAILED) if bad else meter.observe(of_agents.LEDGER_S, s),
    )
    files.write("a", b"x")
    files.sync("a")
    with pytest.raises(FileNotFoundError):
        files.sync("b")
    calls = DeadlineExecutor(
        "x",
        observe=lambda w, s, e: (
            meter.add(of_agents.LIBVIRT_FAILED, w, e) if e else meter.observe(of_agents.LIBVIRT_S, s, w)
        ),
    )
    await calls.run("good", lambda: None, 5)
    with pytest.raises(MachineError):
        await calls.run("bad", _fail, 5)
    calls.close()
    for outcome in (
        ActionOutcome("u", Start("u", "r"), 0.0, reason="X"),
        ActionOutcome("u", Start("u", "r"), 0.0, reason="X", permanent=True),
        ActionOutcome("u", Start("u", "r"), 0.0, interrupted=True),
    ):
        of_agents.count_outcome(meter, outcome)
    meter.add(of_agents.REFUSALS)
    assert meter.value(of_agents.LIBVIRT_FAILED, "bad", "MachineError") == 1
    assert {word for word in ("failed", "refused", "interrupted") if meter.value(of_agents.ACTIONS, "Start", word)} == {
        "failed", "refused", "interrupted",
    }  # fmt: skip
    domain: dict[Family, dict[tuple[str, ...], float]] = {}
    domain_values(domain, parse_stats("u", "web-0", DomainPhase.RUNNING, RECORD), {})
    board = GpuReading("G", "a", "X", None, 100, 4, 31, 1, 1, 1, 0, 0, 0, 0, False, False, 5, 5, 16, 16, 0, 1, False)
    link = LinkReading("a", "nvidia", 32.0, 32.0, 16, 16, 1, 1, 1)
    told = domain | gpu_values("a", [judge("G", board, link)], {"G": 13})
    rows += [*meter.rows(), *(Rows(family, values) for family, values in told.items())]
    assert names(of_agents.FAMILIES) - met(rows) == set()


def _fail() -> None:
    raise MachineError("as it was asked to")


async def test_an_agent_whose_libvirt_hangs_still_tells_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casemate_agent.metrics.scrape.LIBVIRT_DEADLINE_S", 0.05)
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        await fleet.apply(environment("web"))
        await fleet.until_ready(1)
        fleet.hosts["a"].host.faults.hung.add("hypervisor")
        by_name = {each.family.name: each.values for each in await fleet.hosts["a"].metrics.rows()}
        fleet.hosts["a"].host.faults.hung.clear()
    assert by_name["libvirt_up"] == {(): 0}
    assert not [name for name in by_name if name.startswith("libvirt_") and name != "libvirt_up"]
    assert by_name["casemate_manager_connected"] == {(): 1}


async def test_metrics_are_served_on_loopback_alone_and_a_taken_port_is_named() -> None:
    async def rows() -> list[Rows]:
        return [Rows(gauge("casemate_x", "X.", "y"), {('quoted "\\ text',): 1})]

    from casemate_core.errors import InvalidSpec

    for wrong in ("0.0.0.0:9470", "example.org:9470", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", ""):
        with pytest.raises(InvalidSpec, match="metrics_listen"):
            async with served(wrong, rows):
                pass
    async with served("127.0.0.1:0", rows) as url:
        assert await scraped(url) == {("casemate_x", (("y", 'quoted "\\ text'),)): 1}
        taken = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(Unavailable, match="cannot serve metrics on"):
            async with served(taken, rows):
                pass
        async with aiohttp.ClientSession() as session:
            async with session.get(url.replace("/metrics", "/")) as answer:
                assert answer.status == 404
            async with session.post(url) as answer:
                assert answer.status == 405


# --- what is written down ---------------------------------------------------------------------------------------------


def table() -> str:
    """docs/metrics.md, made from the declarations."""
    lines = [
        "# Metrics",
        "",
        "Made from the code by `pytest tests/journeys/test_metrics.py --regenerate`; do not edit.",
        "",
        "`casemate-manager serve --metrics-listen 127.0.0.1:9470` and `casemate-agent run --metrics-listen 127.0.0.1:9471` serve",
        "Prometheus' format below `/metrics`, on loopback only; without the flag nothing is served. `casemate dev up` turns both on and says",
        "where. What is not known is absent, never 0. Metrics that begin with `libvirt_` have the names, labels and meaning of the common",
        "libvirt exporters, so that dashboards made for those work. Both processes also tell `process_cpu_seconds_total`,",
        "`process_resident_memory_bytes`, `process_open_fds` and the like. An agent that plays several simulated hosts adds the label `host`.",
        "A dashboard for Grafana is [grafana/casemate.json](grafana/casemate.json).",
    ]
    for title, families in (("Manager", of_managers.FAMILIES), ("Agent", of_agents.FAMILIES)):
        lines += ["", f"## {title}", "", "| name | kind | labels | meaning |", "|---|---|---|---|"]
        for family in sorted(families, key=lambda family: family.name):
            labels = ", ".join(f"`{label}`" for label in family.labels)
            lines.append(f"| `{family.name}` | {family.kind} | {labels} | {family.help} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_that_of_the_code(request: pytest.FixtureRequest) -> None:
    path = ROOT / "docs/metrics.md"
    if request.config.getoption("--regenerate"):
        path.write_text(table())
    assert path.read_text() == table(), "pytest tests/journeys/test_metrics.py --regenerate"


def test_the_dashboard_uses_metrics_and_labels_that_there_are() -> None:
    dashboard = json.loads((ROOT / "docs/grafana/casemate.json").read_text())
    families = {family.name: family for family in (*of_managers.FAMILIES, *of_agents.FAMILIES)}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 12
    used = set()
    for expression in expressions:
        for name in re.findall(r"\b((?:casemate|libvirt|process)_[a-z0-9_]+)\b", expression):
            if name.startswith("process_"):
                continue
            family = families.get(name) or families.get(re.sub(r"_(bucket|sum|count)\Z", "", name))
            assert family is not None, f"{expression}: no metric {name}"
            assert name == family.name or family.kind is Kind.HISTOGRAM, expression
            if family.kind is Kind.COUNTER:
                assert re.search(rf"(rate|increase)\({name}", expression), (
                    f"{expression}: a counter is read by its rate"
                )
            used.add(family.name)
        labels = {label for name in families if name in expression for label in families[name].labels}
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= labels | {"le", "instance", "job"}, expression
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert "casemate_placements_refused_total" in used


def test_drift_is_told_by_its_kind() -> None:
    assert [drift_kind(line) for line in ("A2 ClaimMismatch: x", "GuardMissing: y", "<script>", "")] == [
        "ClaimMismatch", "GuardMissing", "Other", "Other",
    ]  # fmt: skip


def test_rows_of_one_family_are_joined() -> None:
    family = gauge("casemate_x", "X.", "y")
    assert joined([Rows(family, {("a",): 1}), Rows(family, {("b",): 2})]) == [Rows(family, {("a",): 1, ("b",): 2})]
