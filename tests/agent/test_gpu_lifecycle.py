"""A GPU is never given on with somebody's traces on it, whatever dies when."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.gpu.lifecycle import DIRTY, TABLE, Event, GpuRecord, NoSuchMove, State, diagram, move


def test_the_way_of_a_gpu_from_one_tenant_to_the_next() -> None:
    gpu = move(GpuRecord("GPU-1"), Event.PREPARE, owner="i-1", tenant="a")
    assert (gpu.owner, gpu.tenant, gpu.generation, gpu.dirty) == ("i-1", "a", 1, False)
    for event in (Event.ATTACH, Event.RETURN, Event.SANITISE, Event.PASS):
        gpu = move(gpu, event)
        assert gpu.dirty and not gpu.assignable
    gpu = move(gpu, Event.RELEASE)
    assert (gpu.state, gpu.owner, gpu.assignable) == (State.FREE, "", True)
    assert move(gpu, Event.PREPARE, owner="i-2", tenant="b").generation == 2


@given(st.sampled_from(State), st.sampled_from(Event))
def test_what_the_table_does_not_have_is_refused_and_changes_nothing(state: State, event: Event) -> None:
    record = GpuRecord("GPU-1", state, owner="i", tenant="a", story=(State.HOST_OWNED, state))
    if (state, event) in TABLE:
        assert move(record, event, owner="j", tenant="b").state is TABLE[state, event]
        return
    with pytest.raises(NoSuchMove, match=f"is {state} and cannot {event}; it went HostOwned → {state}"):
        move(record, event)


def test_from_dirty_there_is_one_way_to_free() -> None:
    ways = {(state, event) for (state, event), to in TABLE.items() if state in DIRTY and to not in DIRTY}
    assert ways == {(State.CHECKED, Event.RELEASE)} | {(state, Event.QUARANTINE) for state in DIRTY - {State.ATTACHED}}
    assert {event for (state, event), to in TABLE.items() if to is State.CHECKED} == {Event.PASS}


def test_every_state_survives_a_crash_and_a_step_under_way_is_begun_again() -> None:
    for state in State:
        after = move(GpuRecord("GPU-1", state), Event.CRASH).state
        assert (after in DIRTY) == (state in DIRTY)
        assert after is (State.RETURNED if state in (State.SANITISING, State.CHECKED) else state)


def test_a_quarantined_gpu_leaves_by_an_operator_and_through_the_ladder() -> None:
    gpu = move(GpuRecord("GPU-1", State.SANITISING, tenant="a"), Event.QUARANTINE, reason="XID 79")
    assert (gpu.reason, gpu.assignable) == ("XID 79", False)
    gpu = move(gpu, Event.CLEAR)
    assert (gpu.state, gpu.reason, gpu.dirty) == (State.RETURNED, "", True)


def test_the_end_of_a_step_of_an_older_hand_over_has_no_effect() -> None:
    gpu = GpuRecord("GPU-1", State.SANITISING, generation=7)
    with pytest.raises(NoSuchMove):
        move(gpu, Event.PASS, generation=6)
    assert move(gpu, Event.PASS, generation=7).state is State.CHECKED


def test_the_diagram_has_every_state() -> None:
    drawn = diagram()
    assert all(f"{state}" in drawn for state in State)


@dataclass
class Board:
    """The machine's side: whose traces are on it, who has it, and the record as it is on disk."""

    disk: GpuRecord = field(default_factory=lambda: GpuRecord("GPU-1"))
    traces: set[str] = field(default_factory=set)
    held_by: str = ""
    reset: bool = False
    scrubbed: bool = False


class Killed(Exception):
    """The agent died here."""


def test_a_thousand_agents_die_and_no_tenant_meets_another(kills: int = 1000) -> None:
    """Each act is preceded by its record on disk; the agent dies before, between and after them, at random."""
    met = 0
    for seed in range(kills):
        dice, board, hand_overs = random.Random(seed), Board(), 0

        def step(event: Event, board: Board = board, dice: random.Random = dice, **words: str) -> None:
            if dice.random() < 0.12:
                raise Killed
            board.disk = move(board.disk, event, **words)  # type: ignore[arg-type]
            if dice.random() < 0.12:
                raise Killed

        def live(board: Board = board, dice: random.Random = dice) -> None:
            """One life of an agent: from what is on disk to wherever it gets."""
            nonlocal hand_overs
            if board.disk.state is not State.HOST_OWNED:
                board.disk = move(board.disk, Event.CRASH)
            while hand_overs < 6:
                match board.disk.state:
                    case State.HOST_OWNED | State.FREE:
                        tenant = dice.choice("ab")
                        step(Event.PREPARE, owner=f"i{hand_overs}", tenant=tenant)
                    case State.PREPARED:
                        step(Event.ATTACH)
                    case State.ATTACHED if not board.held_by and dice.random() < 0.8:
                        assert board.traces <= {board.disk.tenant}, f"{board.traces} meet {board.disk}"
                        board.held_by = board.disk.tenant
                        board.traces.add(board.disk.tenant)
                        board.reset = board.scrubbed = False
                    case State.ATTACHED:
                        board.held_by = ""  # the domain ended; then it is seen to have
                        step(Event.RETURN)
                    case State.RETURNED:
                        step(Event.SANITISE)
                    case State.SANITISING:
                        board.reset = True
                        if dice.random() < 0.12:
                            raise Killed
                        if dice.random() < 0.1:
                            step(Event.QUARANTINE, reason="the scrubber failed")
                            continue
                        board.scrubbed = True
                        board.traces.clear()
                        step(Event.PASS)
                    case State.CHECKED:
                        assert board.reset and board.scrubbed and not board.traces
                        step(Event.RELEASE)
                        hand_overs += 1
                    case State.QUARANTINED:
                        assert not board.disk.assignable
                        step(Event.CLEAR)

        for _ in range(500):
            try:
                live()
                break
            except Killed:
                met += 1
        assert hand_overs == 6, f"seed {seed}: it never came to an end: {board.disk}"
    assert met > kills


def test_the_diagram_of_the_docs_is_drawn_from_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/gpus.md").read_text()
    assert f"```mermaid\n{diagram()}\n```" in page, (
        "docs/gpus.md: draw it again with casemate_agent.gpu.lifecycle.diagram()"
    )
