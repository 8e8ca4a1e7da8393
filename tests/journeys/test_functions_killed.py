"""An agent killed at any moment of giving and taking back, its host rebooted with cards moved or missing: 1,000 seeds.

Never: a function with two owners, a running VM with a function that is not in its state, another's release touching it. In
the end: what is wanted runs with its functions, and nobody's functions are clean.
"""

import asyncio
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from random import Random

import pytest

from casemate_agent.drivers.simulated_domain import ACTIVE
from casemate_agent.hardware.functions import grant_of
from casemate_core.spec.instance import Run
from casemate_core.topology import Topology
from support.agents import Rig, uid
from support.functions import DEVICES, HOST, with_functions
from support.virtual import VirtualLoop, run_virtual

SEEDS = 1000


def moved(random: Random) -> Topology:
    """The same cards at other addresses."""
    bus = random.randrange(16, 250)
    pfs = tuple(
        replace(
            pf,
            place=replace(pf.place, address=f"0000:{bus + i:02x}:00.0"),
            vfs=tuple(replace(vf, address=f"0000:{bus + i:02x}:10.{vf.index}") for vf in pf.vfs),
        )
        for i, pf in enumerate(HOST.pfs)
    )
    return replace(HOST, pfs=pfs)


async def story(seed: int, figures: Counter[str], loop: VirtualLoop) -> None:
    random = Random(seed)
    rig = Rig(loop, HOST)
    foreign = rig.host.add_foreign("neighbour")
    await rig.start()
    generation, live = 1, [1, 2]
    for _ in range(random.randrange(2, 5)):
        generation += 1
        places = [(0, 0), (0, 1), (1, 0), (1, 1)]
        random.shuffle(places)
        devices = list(DEVICES)
        random.shuffle(devices)
        for slot in (0, 1):
            number = live[slot]
            old = rig.wanted.get(uid(number))
            if random.random() < 0.25:
                await rig.unwant(uid(number))
            elif old is None:
                # What it takes may still be another's, who is on the way out.
                free = [p for p in places if f"{HOST.pfs[p[0]].mac}/{p[1]}" not in _taken(rig)]
                spare = [d for d in devices if d not in _taken(rig)]
                live[slot] = number = number + 2
                await rig.want(with_functions(number, free[0], devices=tuple(spare[:1]), generation=generation))
            elif random.random() < 0.5:
                await rig.want(replace(old, run=random.choice((Run.STARTED, Run.STOPPED))))
        await asyncio.sleep(random.choice((0.0, 0.002, 0.01, 0.05, 0.3, 1.0, 5.0)) * random.random())
        fault = random.random()
        if fault < 0.75:
            figures["killed"] += 1
            await rig.kill()
            if fault < 0.2:
                figures["rebooted with cards moved"] += 1
                figures["rebooted with a card missing"] += fault < 0.05
                rig.host.reboot()
                rig.disk.power_cut()
                rig.host.topology = moved(random)
                if fault < 0.05:
                    rig.host.topology = replace(rig.host.topology, pfs=rig.host.topology.pfs[:1])
            await rig.start()
        elif fault < 0.85:
            figures["libvirtd hung"] += 1
            rig.host.faults.hung.add("hypervisor")
            await asyncio.sleep(random.random() * 15)
            rig.host.faults.hung.clear()
    rig.host.topology = moved(random) if len(rig.host.topology.pfs) < 2 else rig.host.topology
    await rig.settle(600)
    assert rig.broken == [] and rig.host.check() == [], (seed, rig.broken[:3], rig.host.check())
    wanted = {key: uid_ for uid_, d in rig.wanted.items() for key in grant_of(d).keys}
    held = {key: stamp.owner for key, stamp in rig.host.cards.stamps.items()}
    figures["wrongly attached"] += len({key for key in held.keys() & wanted.keys() if held[key] != wanted[key]})
    figures["leaked"] += len(held.keys() - wanted.keys())
    figures["leaked"] += len((set(rig.host.cards.states) | rig.host.cards.bound) - held.keys())
    given = Counter(key for d in rig.host.domains.values() if d.facts.phase in ACTIVE for key in d.functions)
    figures["doubled"] += sum(count > 1 for count in given.values())
    assert not figures["leaked"] + figures["doubled"] + figures["wrongly attached"], (seed, figures, held, wanted)
    assert {k for k, u in wanted.items() if rig.wanted[u].run is Run.STARTED} <= held.keys(), (seed, "not given")
    assert foreign in rig.host.domains
    await rig.kill()


def _taken(rig: Rig) -> set[str]:
    return {key for d in rig.wanted.values() for key in grant_of(d).keys}


@pytest.mark.timeout(1200)
def test_a_thousand_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Counter({"leaked": 0, "doubled": 0, "wrongly attached": 0})
    for seed in range(SEEDS):
        run_virtual(partial(story, seed, figures))
    with capsys.disabled():
        told = ", ".join(f"{what} {count}" for what, count in figures.items())
        sys.stdout.write(f"\nfunctions, {SEEDS} seeds: {told}\n")
    assert figures["killed"] > SEEDS and figures["rebooted with a card missing"] > SEEDS // 20
