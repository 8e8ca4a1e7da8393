"""The stream's protocol: both ends joined by a wire that delays, cuts and supersedes at any point."""

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from casemate_core.claims import Claim
from casemate_core.spec.instance import (
    DesiredInstance,
    File,
    HostNetwork,
    ImageRef,
    InstanceState,
    Phase,
    Placement,
    Run,
)
from casemate_wire.session import (
    COUNTED,
    ONCE_LIMIT,
    PART_RECORDS,
    Admission,
    Busy,
    HostEnd,
    ManagerEnd,
    Outbox,
    ProtocolError,
    Refused,
    admit,
    next_counter,
    resumable,
)
from casemate_wire.stream import (
    Ack,
    Bye,
    Credit,
    Desired,
    Facts,
    FactsAck,
    Hello,
    HostEvent,
    HostReport,
    Measurement,
    Operate,
    Outcome,
    Rejected,
    Welcome,
)

IMAGE = ImageRef("debian", "disk", File("file:///d", "sha256:" + "0" * 64), "qcow2")


def uid(number: int) -> str:
    return f"00000000-0000-8000-8000-{number:012x}"


def instance(number: int, generation: int = 1, user_data: str = "") -> DesiredInstance:
    return DesiredInstance(
        uid(number),
        "t",
        "e",
        f"e-{number}",
        number,
        generation,
        Run.STARTED,
        1,
        512,
        0,
        IMAGE,
        Placement(Claim(uid(number)), 1, 1),
        user_data=user_data,
    )


def state(number: int, generation: int = 1) -> InstanceState:
    return InstanceState(uid(number), generation, Phase.RUNNING)


def hello(session: int = 1, epoch: int = 0, revision: int = 0) -> Hello:
    return Hello("h", "boot", epoch, revision, "", session)


def event(name: str) -> HostEvent:
    return HostEvent(name, "", "", "Test", name)


def opened(window: int = 64, epoch: int = 1) -> tuple[HostEnd, ManagerEnd]:
    """Two ends, just past Welcome."""
    host, manager = HostEnd(hello(), Outbox(), window=window), ManagerEnd(epoch, window=window)
    (first,) = host.take()
    manager.receive(first)
    manager.welcome(resume=False, send_inventory=False)
    for message in manager.take():
        host.receive(message)
    for up in host.take():
        manager.receive(up)
    return host, manager


def test_counter_grows_by_one_and_begins_at_the_clock() -> None:
    assert next_counter(None, 1_700_000_000.9) == 1_700_000_000
    assert next_counter(7, 1_700_000_000.0) == 8


@pytest.mark.parametrize(
    ("last", "connected", "counter", "verdict"),
    [
        (0, False, 5, Admission.WELCOME),
        (5, False, 6, Admission.WELCOME),
        (5, True, 6, Admission.SUPERSEDE),
        (5, True, 5, Admission.CLONE),
        (5, False, 5, Admission.CLONE),
        (5, True, 4, Admission.STALE),
        (5, False, 4, Admission.STALE),
    ],
)
def test_admission(last: int, connected: bool, counter: int, verdict: Admission) -> None:
    assert admit(last, connected, counter) is verdict


def test_resume_only_within_one_epoch_and_not_from_the_future() -> None:
    assert resumable(hello(epoch=3, revision=10), 3, 12)
    assert not resumable(hello(epoch=2, revision=10), 3, 12)
    assert not resumable(hello(epoch=3, revision=13), 3, 12)
    assert not resumable(hello(epoch=3, revision=0), 3, 12)


def test_an_older_manager_is_refused_and_nothing_of_it_is_obeyed() -> None:
    host = HostEnd(hello(epoch=5, revision=9), Outbox())
    got = host.receive(Welcome(4, 0, False, 5.0, 64))
    assert isinstance(got, Refused) and got.reason == "StaleManager"
    assert host.receive(Desired(4, 10, True)) is None
    assert all(isinstance(m, Hello) for m in host.take())


def test_a_new_term_may_begin_at_a_lower_revision() -> None:
    """A store that was restored from an older copy: the whole state of the new term counts, not its number."""
    host = HostEnd(hello(epoch=1, revision=50), Outbox())
    assert isinstance(host.receive(Welcome(2, 0, False, 5.0, 64)), Welcome)
    told = Desired(2, 10, True, (instance(1),))
    assert host.receive(told) == told
    assert host.receive(Desired(2, 9, False, (instance(2),))) is None


def test_a_large_state_is_cut_into_parts_and_delivered_whole() -> None:
    host, manager = opened()
    many = [instance(n) for n in range(3 * PART_RECORDS + 1)]
    network = HostNetwork("default", "nat", "10.0.0.0/16", "10.0.0.1")
    manager.desire(7, many, [uid(9999)], [network], snapshot=True)
    parts = manager.take()
    assert len(parts) == 4
    got = [host.receive(part) for part in parts]
    assert got[:-1] == [None, None, None]
    whole = got[-1]
    assert isinstance(whole, Desired) and whole.snapshot and not whole.more
    assert (whole.instances, whole.removed, whole.networks) == (tuple(many), (uid(9999),), (network,))


def test_parts_are_cut_by_size_as_well() -> None:
    _, manager = opened()
    manager.desire(7, [instance(n, user_data="x" * 65536) for n in range(32)], snapshot=True)
    assert len(manager.take()) == 5


def test_without_credit_records_merge_and_the_last_one_wins() -> None:
    host, manager = opened(window=1)
    manager.desire(1, [instance(1)], snapshot=True)
    assert len(manager.take()) == 1
    for generation in range(2, 50):
        manager.desire(generation, [instance(1, generation)])
    manager.desire(50, [instance(2)], [uid(1)])
    assert manager.take() == ()
    manager.receive(Credit(1))
    (message,) = manager.take()
    assert isinstance(message, Desired)
    assert [i.uid for i in message.instances] == [uid(2)] and message.removed == (uid(1),) and message.revision == 50
    assert host.closed is False


@pytest.mark.parametrize(
    "message",
    [Desired(1, 1), Credit(1), FactsAck(0), Operate("o", "v", "i")],
    ids=lambda m: type(m).__name__,
)
def test_nothing_comes_before_welcome(message: object) -> None:
    with pytest.raises(ProtocolError):
        HostEnd(hello(), Outbox()).receive(message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        hello(),
        Credit(0),
        Credit(-5),
        Ack(1, 99),
        Ack(2, 0),
        Facts(1),
        Facts(2, True),
        Facts(0, True),
    ],
    ids=repr,
)
def test_the_manager_ends_what_breaks_the_rules(message: object) -> None:
    _, manager = opened()
    with pytest.raises(ProtocolError):
        manager.receive(message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [Welcome(1, 0, False, 5.0, 1), Desired(2, 1), Credit(0), FactsAck(1)],
    ids=lambda m: type(m).__name__,
)
def test_the_host_ends_what_breaks_the_rules(message: object) -> None:
    host, _ = opened()
    with pytest.raises(ProtocolError):
        host.receive(message)  # type: ignore[arg-type]


def test_more_than_the_credit_is_a_violation() -> None:
    _, manager = opened(window=4)
    for n in range(4):
        manager.receive(Outcome(str(n), "", "Done"))
    with pytest.raises(ProtocolError, match="credit"):
        manager.receive(Outcome("5", "", "Done"))


def test_one_acknowledgement_is_of_all_facts_that_were_taken() -> None:
    _, manager = opened()
    manager.take()
    for number in range(3):
        manager.receive(Facts(number + 1, number == 0))
        manager.facts_taken(number + 1)
    assert manager.ack_due
    assert not manager.pressing  # it may wait for more to acknowledge
    assert manager.take() == (FactsAck(3),)
    assert not manager.ack_due
    assert manager.take() == ()


def test_an_acknowledgement_waits_for_no_one_where_more_is_to_be_said() -> None:
    _, manager = opened()
    manager.take()
    manager.receive(Credit(8))
    manager.receive(Facts(1, snapshot=True))
    manager.facts_taken(1)
    manager.desire(1)
    assert manager.pressing
    assert [type(m).__name__ for m in manager.take()] == ["FactsAck", "Desired"]
    assert not manager.pressing


def test_events_survive_cuts_until_a_barrier_behind_them_is_acknowledged() -> None:
    outbox = Outbox()
    outbox.add(event("a"))
    first = HostEnd(hello(1), outbox)
    first.receive(Welcome(1, 0, False, 5.0, 8))
    first.whole([], HostReport())
    sent = first.take()
    assert event("a") in sent
    # The stream is cut before anything is acknowledged: the next session says it again.
    second = HostEnd(hello(2), outbox)
    second.receive(Welcome(1, 0, False, 5.0, 8))
    second.whole([], HostReport())
    sent = second.take()
    assert event("a") in sent
    barrier = next(m for m in sent if isinstance(m, Facts))
    second.receive(FactsAck(barrier.sequence))
    assert len(outbox) == 0


def test_with_a_window_of_one_events_and_facts_take_turns() -> None:
    outbox = Outbox()
    for name in "ab":
        outbox.add(event(name))
    host = HostEnd(hello(), outbox)
    host.receive(Welcome(1, 0, False, 5.0, 1))
    host.whole([], HostReport())
    sent = [m for m in host.take() if isinstance(m, COUNTED)]
    for number in range(6):
        host.changed([state(1, number)])
        host.receive(Credit(1))
        sent += [m for m in host.take() if isinstance(m, COUNTED)]
    kinds = [type(m).__name__ for m in sent]
    assert kinds == ["HostEvent", "Facts", "HostEvent", "Facts", "Facts", "Facts", "Facts"]


def test_an_event_after_the_barrier_is_not_forgotten_with_it() -> None:
    outbox = Outbox()
    host = HostEnd(hello(), outbox)
    host.receive(Welcome(1, 0, False, 5.0, 8))
    host.whole([], HostReport())
    (facts,) = [m for m in host.take() if isinstance(m, Facts)]
    outbox.add(event("late"))
    host.take()
    host.receive(FactsAck(facts.sequence))
    assert len(outbox) == 1


def test_a_full_outbox_drops_the_oldest_event_and_keeps_outcomes() -> None:
    outbox = Outbox(limit=2)
    outbox.add(Outcome("o", "", "Done"))
    outbox.add(event("a"))
    outbox.add(event("b"))
    assert [note for _, note in outbox.after(-1)] == [Outcome("o", "", "Done"), event("b")]
    assert outbox.lost == 1


def test_requests_that_happen_once_are_bounded() -> None:
    _, manager = opened(window=1)
    manager.desire(1, [], snapshot=True)
    manager.take()
    for n in range(ONCE_LIMIT):
        manager.operate(Operate(str(n), "restart", ""))
    with pytest.raises(Busy):
        manager.operate(Operate("more", "restart", ""))


def test_measurements_yield_to_everything_else() -> None:
    host, _ = opened(window=4)
    host.whole([], HostReport())
    host.take()
    host.measured(Measurement(1.0, 0.5, 100))
    host.measured(Measurement(2.0, 0.5, 100))
    (told,) = host.take()
    assert told == Measurement(2.0, 0.5, 100)
    host.measured(Measurement(3.0, 0.5, 100))
    assert host.take() == ()


def test_bye_and_rejection_end_a_session() -> None:
    host, manager = opened()
    host.bye("stopping")
    (bye,) = host.take()
    assert manager.receive(bye) == Bye("stopping") and manager.closed
    assert manager.take() == ()
    host, manager = opened()
    manager.reject("Superseded", "newer", 0.0)
    (message,) = manager.take()
    assert host.receive(message) == Refused("Superseded", "newer", 0.0) and host.closed
    assert host.take() == ()


@given(st.lists(st.one_of(st.builds(Credit, st.integers()), st.builds(Ack, st.integers(), st.integers()),
                          st.builds(Facts, st.integers(), st.booleans()), st.just(hello(3)),
                          st.just(Outcome("o", "", "Done"))), max_size=30))  # fmt: skip
def test_a_hostile_host_gets_an_error_or_stays_within_its_credit(messages: list[object]) -> None:
    _, manager = opened(window=4)
    taken = 0
    for message in messages:
        try:
            manager.receive(message)  # type: ignore[arg-type]
        except ProtocolError:
            return
        taken += isinstance(message, COUNTED)
    assert taken <= 4


class Link(RuleBasedStateMachine):
    """A manager with a changing desired state and a host that carries it out, joined by a wire that may break.

    Never: a half-told snapshot, a step back in revision, an acknowledgement of what was not persisted, more in flight than
    granted. In the end: with a quiet wire the host has what the manager wants, and the manager knows what the host is.
    """

    @initialize(window=st.integers(1, 5))
    def begin(self, window: int) -> None:
        self.window = window
        self.outbox = Outbox()
        # The manager's truth: records with the revision of their change.
        self.epoch, self.revision = 1, 1
        self.wanted: dict[str, DesiredInstance] = {}
        self.changed: dict[str, int] = {}
        self.ending: set[str] = set()
        # The manager's picture of the host.
        self.seen: dict[str, InstanceState] = {}
        self.events: list[str] = []
        self.emitted: list[str] = []
        self.acked = 0
        # The host: on disk, and alive.
        self.disk: dict[str, DesiredInstance] = {}
        self.disk_at = (0, 0)
        self.confirmed: set[str] = set()
        self.counter = 0
        self.real: dict[str, InstanceState] = {}
        self.dial()

    def dial(self) -> None:
        self.counter += 1
        self.host = HostEnd(hello(self.counter, *self.disk_at), self.outbox, window=self.window)
        self.manager = ManagerEnd(self.epoch, window=self.window)
        self.up: deque[object] = deque()
        self.down: deque[object] = deque()

    # --- what happens ---

    @rule(number=st.integers(0, 5))
    def want(self, number: int) -> None:
        if uid(number) in self.ending:
            return  # it comes back only when it is gone
        self.revision += 1
        record = instance(number, self.revision)
        self.wanted[record.uid] = record
        self.changed[record.uid] = self.revision
        self.tell([record], [])

    @rule(number=st.integers(0, 5))
    def unwant(self, number: int) -> None:
        if uid(number) not in self.wanted:
            return
        self.revision += 1
        del self.wanted[uid(number)]
        self.ending.add(uid(number))
        self.tell([], [uid(number)])

    def tell(self, records: list[DesiredInstance], removed: list[str]) -> None:
        if self.manager.open and not self.manager.closed:
            self.manager.desire(self.revision, records, removed)

    @rule(number=st.integers(0, 5))
    def observe(self, number: int) -> None:
        if uid(number) in self.real:
            changed = replace(self.real[uid(number)], starts=self.real[uid(number)].starts + 1)
            self.real[uid(number)] = changed
            self.host.changed([changed])

    @rule()
    def happen(self) -> None:
        name = f"event-{len(self.emitted)}"
        self.emitted.append(name)
        self.outbox.add(event(name))

    # --- the wire ---

    @rule()
    def send(self) -> None:
        self.up.extend(self.host.take())
        self.down.extend(self.manager.take())

    @precondition(lambda self: self.down)
    @rule()
    def arrive_down(self) -> None:
        got = self.host.receive(self.down.popleft())  # type: ignore[arg-type]
        match got:
            case Welcome():
                self.host.whole(self.real.values(), HostReport(), self.confirmed)
            case Desired():
                self.persist(got)
            case None:
                pass
            case _:
                raise AssertionError(got)

    def persist(self, got: Desired) -> None:
        if got.epoch == self.disk_at[0]:
            assert got.revision >= self.disk_at[1], "never a step back"
        records = {i.uid: i for i in got.instances}
        self.disk = records if got.snapshot else {**self.disk, **records}
        for name in got.removed:
            self.disk.pop(name, None)
        self.disk_at = (got.epoch, got.revision)
        gone = [*got.removed, *(name for name in self.real if name not in self.disk)]
        self.confirmed.update(gone)
        self.real = {name: self.real.get(name, state(int(name[-4:], 16))) for name in self.disk}
        self.confirmed -= set(self.real)
        self.host.persisted(got.revision)
        self.host.changed(self.real.values(), gone)
        self.host.consumed()

    @precondition(lambda self: self.up)
    @rule()
    def arrive_up(self) -> None:
        got = self.manager.receive(self.up.popleft())  # type: ignore[arg-type]
        match got:
            case Hello():
                self.greet(got)
            case Facts():
                if got.snapshot:
                    self.seen = {}
                self.seen |= {s.uid: s for s in got.instances}
                for name in got.gone:
                    self.seen.pop(name, None)
                    self.ending.discard(name)
                self.manager.facts_taken(got.sequence)
                self.manager.consumed()
            case HostEvent():
                if got.id not in self.events:
                    self.events.append(got.id)
                self.manager.consumed()
            case Ack(epoch, revision):
                assert (epoch, revision) <= self.disk_at, "never acknowledged before it is on disk"
                self.acked = revision
            case None:
                pass
            case _:
                raise AssertionError(got)

    def greet(self, got: Hello) -> None:
        resume = resumable(got, self.epoch, self.revision)
        self.manager.welcome(resume=resume, send_inventory=False)
        since = got.revision if resume else -1
        records = [r for name, r in self.wanted.items() if self.changed[name] > since]
        self.manager.desire(self.revision, records, self.ending, snapshot=not resume)

    @rule()
    def cut(self) -> None:
        """The stream breaks; what was in flight is lost."""
        self.dial()

    @rule()
    def crash_host(self) -> None:
        """The agent dies: what is not on disk is lost, the machines run on."""
        self.outbox = Outbox()
        self.emitted = list(self.events)
        self.dial()

    @rule()
    def new_term(self) -> None:
        """Another manager takes over: a new epoch, nothing observed."""
        self.epoch += 1
        self.seen = {}
        self.dial()

    @rule()
    def quiet(self) -> None:
        """In the end: no faults for a while, and both sides agree."""
        for _ in range(1000):
            self.send()
            if not self.up and not self.down:
                break
            while self.down:
                self.arrive_down()
            while self.up:
                self.arrive_up()
        assert not self.up and not self.down, "the wire never comes to rest"
        assert self.disk == self.wanted
        assert self.acked == self.revision or self.disk_at == (self.epoch, self.revision) or self.resumed()
        assert self.seen == self.real
        assert not self.ending
        assert self.events == self.emitted
        assert len(self.outbox) == 0

    def resumed(self) -> bool:
        return self.manager.hello is not None and self.manager.hello.revision > 0

    @invariant()
    def within_the_window(self) -> None:
        if hasattr(self, "up"):
            assert sum(isinstance(m, COUNTED) for m in self.up) <= self.window
            assert sum(isinstance(m, COUNTED) for m in self.down) <= self.window
            assert not any(isinstance(m, Rejected) for m in self.down)


TestLink = Link.TestCase
TestLink.settings = settings(max_examples=25, stateful_step_count=50)
