"""Whole fleets on virtual time: no host ever refuses a placement, whatever goes wrong around it; and the far end is no pushover."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from casemate_core.claims import Claim, SharedCpu
from casemate_core.plain import to_plain
from casemate_core.topology import Topology
from casemate_core.topology_loaders import from_line
from casemate_manager.__main__ import main
from casemate_manager.fleet import desired
from casemate_manager.fleet.placing import Overlay, Placed, Stamp, Unplaced
from casemate_manager.simulation import fleet as simulation
from casemate_manager.simulation.demand import SHAPES, ShapePlacer, shapes_for
from casemate_manager.simulation.far_end import Link, PlayedHost
from casemate_manager.simulation.fleet import Result, simulate_fleet
from casemate_manager.simulation.machines import FleetUnreadable, read_fleet
from casemate_manager.simulation.memory import MemoryStore
from casemate_manager.store.ports import Fenced, StoreFailed, Transaction
from casemate_manager.store.sqlite import SqliteStore
from casemate_wire.session import ManagerEnd
from casemate_wire.stream import FromHost, Outcome
from support.hosts import FOLDER, host, names
from support.rendered import capabilities_of, facts_of, files_of, with_real_addresses
from support.small_fleet import SmallFleet, environment, image, network

LINE = "2s 8k/c 2t 64G 1G=16 hk=1 iso=2 gpu=4xH200:141G@fabric/10m vf=2x8@fronthaul dev=2xfec disk=4T"


def run(seed: int, *, hosts: int = 4, placements: int = 120, trouble: float = 6.0) -> Result:
    return simulate_fleet(read_fleet(LINE, hosts), MemoryStore(), placements=placements, seed=seed, trouble=trouble)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_host_refuses_and_every_ledger_agrees_whatever_goes_wrong(seed: int) -> None:
    result = run(seed)
    assert (result.refusals, result.violations) == ((), ())
    assert result.placed >= 120 and result.taken and result.checks >= 10
    assert sum(result.trouble.values()) > 20


def test_one_seed_is_one_story() -> None:
    first, again, other = run(5, placements=60), run(5, placements=60), run(6, placements=60)
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.digest != other.digest


def test_a_file_gives_the_same_story_as_memory(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "fleet.db")
    filed = simulate_fleet(read_fleet(LINE, 3), store, placements=40, seed=2, trouble=6.0)
    store.close()
    kept = run(2, hosts=3, placements=40)
    assert filed.is_good and filed.digest == kept.digest


def test_a_double_booking_is_refused_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A placer that gives one host's threads twice must not get away with it: else nothing above means anything."""
    honest = ShapePlacer.place
    given: dict[str, Claim] = {}

    def twice(self: ShapePlacer, fleet: Overlay, environment: object, spec: object, stamp: Stamp) -> Placed | Unplaced:
        found = honest(self, fleet, environment, spec, stamp)  # type: ignore[arg-type]
        if isinstance(found, Placed) and found.claim.shared and len(given) < 2:
            # beyond what the pool of its cell has, which no sum in the manager's ledger stops
            over = replace(found.claim, shared=tuple(SharedCpu(s.cell, 10**6) for s in found.claim.shared))
            given[stamp.owner] = over
            return replace(found, claim=over)
        return found

    monkeypatch.setattr(ShapePlacer, "place", twice)
    monkeypatch.setattr(simulation, "STUCK_S", 60.0)
    host_says: list[str] = []
    take = PlayedHost._take

    def heard(self: PlayedHost, uid: str, old: Claim | None) -> None:
        take(self, uid, old)
        host_says.extend(self.refusals[-1:])

    monkeypatch.setattr(PlayedHost, "_take", heard)
    try:
        result = run(1, placements=60, trouble=0.0)
    except simulation.Stuck:
        pass  # the host waits for room that never comes
    else:
        assert result.placements_refused and result.violations and not result.is_good
    assert given and any("the charges on a cell's pool" in text for text in host_says)


# --- the played host alone --------------------------------------------------------------------------------------------


class Stage:
    """A world in which nothing happens by itself."""

    def __init__(self) -> None:
        self.timers: list[tuple[Callable[..., None], tuple[object, ...]]] = []
        self.links: list[Link] = []

    def later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
        self.timers.append((call, args))

    def dial(self, link: Link) -> None:
        self.links.append(link)

    def play(self) -> None:
        """All timers but those that wait for a welcome, in the order in which they were set."""
        for _ in range(100):
            timers, self.timers = self.timers, []
            for call, args in timers:
                if getattr(call, "__name__", "") != "_unwelcome":
                    call(*args)
            if not self.timers:
                return


def up(link: Link, end: ManagerEnd) -> list[FromHost]:
    told: list[FromHost] = []
    while not link.up.empty():
        message = link.up.get_nowait()
        assert message is not None
        got = end.receive(message)
        if got is not None:
            told.append(got)
    return told


def test_a_played_host_takes_what_fits_and_refuses_what_does_not() -> None:
    topology: Topology = from_line("1s 4k/c 1t 8G disk=100G")
    stage = Stage()
    host = PlayedHost("h1", topology, random.Random("x"), stage)
    fleet = SmallFleet()
    fleet.apply(image(), network())
    fleet.join("h1", line="1s 4k/c 1t 8G disk=100G")
    fleet.apply(environment("a", cpus=3), environment("b", cpus=1))
    small, big = sorted(desired.whole(fleet.state, "h1")[0], key=lambda instance: instance.cpus)
    over = replace(small.placement.claim, shared=(SharedCpu(0, 2000),))  # 3 + 2 threads of 4
    host.dial(0)
    stage.play()
    end = ManagerEnd(1)
    up(stage.links[0], end)
    end.welcome(resume=False, send_inventory=True)

    def down() -> list[FromHost]:
        told: list[FromHost] = []
        while messages := end.take():  # the host's answer brings the credit for more
            for message in messages:
                host.hear(stage.links[0], message)
            stage.play()
            told += up(stage.links[0], end)
        return told

    end.desire(1, (replace(small, placement=replace(small.placement, claim=over)), big), snapshot=True)
    told = down()
    assert (len(host.refusals), host.taken, len(host.claims)) == (1, 1, 1)
    assert [o.placement_refused for o in told if isinstance(o, Outcome)] == [True]
    # Once what was in the way is gone, the refused one is taken without being told again.
    (held,) = host.claims
    end.desire(2, (), (held.owner,))
    down()
    assert [c.owner for c in host.claims] == [u for u in (small.uid, big.uid) if u != held.owner]
    assert host.settled


# --- where a fleet comes from -----------------------------------------------------------------------------------------


def test_fleets_from_a_line_a_folder_and_a_trace(tmp_path: Path) -> None:
    assert [name for name, _ in read_fleet(LINE, 3)] == ["h-0", "h-1", "h-2"]
    folder = read_fleet(str(FOLDER), 0)
    assert len(folder) == len(names())
    assert len(read_fleet(str(FOLDER), 20)) == 20
    nodes = tmp_path / "nodes.csv"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\nn1,32000,65536,2,T4\nn2,16000,32768,0,\n")
    (_, first), (_, second) = read_fleet(str(nodes), 0)
    assert (len(first.gpus), first.gpus[0].model, first.index.online.bit_count()) == (2, "T4", 32)
    assert (len(second.gpus), second.memory_mib) == (0, 32768)


def put_recording(folder: Path, name: str) -> Topology:
    """A machine as ``cp -a`` would have copied its files; returns it as it is."""
    machine = with_real_addresses(host(name))
    for path, text in files_of(machine).items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.startswith("sys/bus/pci/devices/") and path.count("/") == 4:
            # the link, and the folder that it leads to, in which the function's own files are
            (place.parent / text).mkdir(parents=True, exist_ok=True)
            place.symlink_to(text)
        elif text.startswith(".."):
            place.symlink_to(text)
        else:
            place.write_text(text)
    (folder / "facts.json").write_text(json.dumps(to_plain(facts_of(machine))))
    return machine


def test_a_fleet_from_copies_of_the_files_of_its_machines(tmp_path: Path) -> None:
    for name in ("hgx-h200", "offlined"):
        put_recording(tmp_path / name, name)
    (tmp_path / "offlined" / "capabilities.xml").write_text(capabilities_of(with_real_addresses(host("offlined"))))
    (tmp_path / "vm.json").write_text((FOLDER / "recorded" / "small-vm.json").read_text())
    machines = dict(read_fleet(str(tmp_path), 0))
    assert list(machines) == ["hgx-h200-0", "offlined-1", "vm-2"]
    hgx = machines["hgx-h200-0"]
    assert [g.uuid for g in hgx.gpus] == [g.uuid for g in host("hgx-h200").gpus]
    assert hgx.functions.shape == host("hgx-h200").functions.shape
    assert sum(len(pf.vfs) for pf in hgx.pfs) == 128
    assert machines["offlined-1"].offline == host("offlined").offline
    assert len(machines["vm-2"].cores) == 2
    ((name, alone),) = read_fleet(str(tmp_path / "hgx-h200"), 1)
    assert (name, alone) == ("h-0", hgx)


def test_what_is_wrong_with_a_recording_is_named(tmp_path: Path) -> None:
    put_recording(tmp_path / "a", "offlined")
    facts = tmp_path / "a" / "facts.json"
    facts.write_text('{"colour": "red"}')
    with pytest.raises(FleetUnreadable, match="colour"):
        read_fleet(str(tmp_path), 0)
    facts.unlink()
    secret = tmp_path / "secret"
    secret.write_text("0-7\n")
    online = tmp_path / "a" / "sys/devices/system/cpu/online"
    online.unlink()
    online.symlink_to(secret)  # leads out of the recording
    with pytest.raises(FleetUnreadable, match="cpu/online: is missing"):
        read_fleet(str(tmp_path), 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "b.json").write_text("{}")
    with pytest.raises(FleetUnreadable, match="neither the key topology"):
        read_fleet(str(tmp_path / "empty"), 0)


@pytest.mark.parametrize("source", ["no such host", "missing.csv", ""])
def test_what_is_no_fleet_is_said(source: str) -> None:
    with pytest.raises(FleetUnreadable):
        read_fleet(source, 0)


def test_every_shape_has_a_machine_and_small_machines_get_what_they_can() -> None:
    rich = from_line("2s 16k/c 2t 512G 1G=64 2M=8192 hk=1 iso=4 gpu=8xH200:141G@fabric/10m vf=4x8@a dev=2xfec disk=8T")
    assert shapes_for([rich], ("a",)) == SHAPES
    poor = shapes_for([from_line("1s 4k/c 1t 8G disk=100G")], ())
    assert {s.name for s in poor} >= {"small", "shared"} and not any(s.gpus for s in poor)


def test_named_machines_serve_as_a_fleet() -> None:
    result = simulate_fleet(read_fleet(str(FOLDER), 0), MemoryStore(), placements=60, seed=4, trouble=3.0)
    assert (result.refusals, result.violations) == ((), ())


# --- the store in memory, and the command -----------------------------------------------------------------------------


def test_the_store_in_memory_fences_and_keeps_the_order() -> None:
    store = MemoryStore()
    assert store.lead().epoch == 1
    store.commit(1, [Transaction(1, ())])
    with pytest.raises(StoreFailed):
        store.commit(1, [Transaction(3, ())])
    assert store.lead().epoch == 2 and store.load().revision == 1
    with pytest.raises(Fenced):
        store.commit(1, [Transaction(2, ())])


def test_the_command_prints_one_json_object() -> None:
    done = CliRunner().invoke(
        main, ["simulate", "--fleet", LINE, "--hosts", "2", "--placements", "15", "--seed", "1", "-o", "json"]
    )
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["placed"] >= 15 and values["placements_refused_by_hosts"] == values["invariants_broken"] == 0


def test_the_command_wants_a_trace_or_a_fleet_and_not_both() -> None:
    for arguments in ([], ["--fleet", LINE, "--trace", "openb"]):
        assert CliRunner().invoke(main, ["simulate", *arguments]).exit_code == 2
    assert CliRunner().invoke(main, ["simulate", "--fleet", "no fleet"]).exit_code == 1
