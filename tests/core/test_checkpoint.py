"""A witness keeps what goes on, and writes down what does not; a chain that was changed contradicts what was signed of it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.audit import AuditRecord, Link, chained
from casemate_core.checkpoint import (
    BREAKS,
    KEPT,
    BadWitness,
    Checkpoint,
    Witnessed,
    contradictions,
    is_formed,
    witnessed,
    witnessed_from_json,
    witnessed_to_json,
)
from casemate_wire.codec.checkpoints import checkpoint_from_message, checkpoint_to_message
from casemate_wire.signing import Notary, is_genuine

NOTARY = Notary(b"n" * 32)


def chain(count: int, word: str = "act") -> list[AuditRecord]:
    records, at = [], Link()
    for number in range(count):
        records.append(chained(AuditRecord(0, float(number), "ann", "key", f"{word}-{number}", "done"), at))
        at = records[-1].link
    return records


def signed(record: AuditRecord, notary: Notary = NOTARY) -> Checkpoint:
    return notary.sign(record.link, record.time_s + 0.7)


def keep(found: Witnessed, *seen: Checkpoint) -> tuple[Witnessed, list[str]]:
    told = []
    for checkpoint in seen:
        found, wrong = witnessed(found, checkpoint, 5.0, genuine=is_genuine(checkpoint))
        told.append(wrong)
    return found, told


def test_a_signature_is_of_all_that_is_said() -> None:
    good = signed(chain(3)[-1])
    assert is_genuine(good) and is_formed(good)
    other = "0" if good.digest[0] != "0" else "1"
    for bad in (
        replace(good, sequence=4),
        replace(good, digest=other + good.digest[1:]),
        replace(good, time_s=good.time_s + 1),
        replace(good, key=Notary(b"o" * 32).public),
        replace(good, key="00" * 32),
        replace(good, signature="ab"),
        replace(good, signature="Z" * 128),
        replace(good, digest="é" * 64),
    ):
        assert not is_genuine(bad)


def test_a_checkpoint_crosses_the_wire_as_it_is() -> None:
    good = signed(chain(2)[-1])
    assert checkpoint_from_message(checkpoint_to_message(good)) == good


def test_what_goes_on_is_kept_and_told_again_is_nothing_new() -> None:
    records = chain(4)
    first, last = signed(records[1]), signed(records[3])
    found, told = keep(Witnessed(), first, last, last, replace(NOTARY.sign(last.link, 99.0)))
    assert told == ["", "", "", ""]
    assert found == Witnessed(NOTARY.public, (first, last))


@pytest.mark.parametrize(
    "bad, word",
    [
        (signed(chain(6)[2]), "went back from record 5 to 3"),
        (signed(chain(5, "other")[4]), "has become another"),
        (signed(chain(6)[5], Notary(b"o" * 32)), "another key"),
        (replace(signed(chain(6)[5]), signature="0" * 128), "not signed"),
    ],
)
def test_what_does_not_go_on_is_refused_and_written_down_once(bad: Checkpoint, word: str) -> None:
    good = signed(chain(5)[4])
    found, told = keep(Witnessed(), good, bad, bad)
    assert word in told[1] and told[2] == told[1]
    assert found.kept == (good,) and found.key == NOTARY.public
    assert [b.seen for b in found.breaks] == [bad]


def test_a_witness_keeps_no_more_than_it_may_and_the_first_stays() -> None:
    records = chain(KEPT + 50)
    found, told = keep(Witnessed(), *map(signed, records))
    assert not any(told) and len(found.kept) == KEPT
    assert found.kept[0].sequence == 1 and found.kept[-1].sequence == len(records)
    found, _ = keep(found, *(signed(r) for r in records[: BREAKS * 3]))
    assert len(found.breaks) == BREAKS and found.breaks[0].seen.sequence == 1
    assert len(witnessed_to_json(found)) < 512 * 1024
    assert witnessed_from_json(witnessed_to_json(found)) == found


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"key": 7}',
        json.dumps(
            {"key": "", "kept": [{"sequence": 1, "digest": "x", "time_s": 1, "key": "", "signature": ""}]}
        ).encode(),
        b" " * (512 * 1024 + 1),
    ],
)
def test_what_is_no_witness_is_refused(data: bytes) -> None:
    with pytest.raises(BadWitness):
        witnessed_from_json(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["key", "kept", "breaks", "seen", "digest", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_of_a_host_is_a_witness_or_refused(value: object) -> None:
    try:
        found = witnessed_from_json(json.dumps(value).encode())
    except BadWitness:
        return
    assert all(map(is_formed, found.kept))


@given(st.binary(max_size=200))
def test_any_bytes_of_a_host_are_a_witness_or_refused(data: bytes) -> None:
    try:
        witnessed_from_json(data)
    except BadWitness:
        return


@given(st.data())
def test_whatever_is_done_to_a_chain_that_was_signed_is_found(data: st.DataObject) -> None:
    """Altered, dropped, put in another order or cut off, with all digests made anew: the checkpoint at the end contradicts it."""
    records = chain(data.draw(st.integers(2, 12), "length"))
    said = [("h1", signed(records[-1]))]
    end = records[-1].link
    assert not list(contradictions({r.sequence: r.digest for r in records}, Link(), end, said))
    at = data.draw(st.integers(0, len(records) - 2), "at")
    forged = list(records)
    match data.draw(st.sampled_from(["alter", "drop", "swap", "cut", "add"])):
        case "alter":
            forged[at] = replace(forged[at], actor="nobody")
        case "drop":
            del forged[at]
        case "swap":
            forged[at], forged[at + 1] = forged[at + 1], forged[at]
        case "cut":
            del forged[at + 1 :]
        case "add":
            forged.insert(at, replace(forged[at], act="planted"))
    at_link, again = Link(), {}
    for record in forged:
        record = chained(record, at_link)
        at_link = record.link
        again[record.sequence] = record.digest
    assert list(contradictions(again, Link(), at_link, said))


def test_what_retention_forgot_is_not_judged() -> None:
    records = chain(6)
    said = [("h1", signed(records[1])), ("h1", signed(records[3])), ("h2", signed(records[5]))]
    left = {r.sequence: r.digest for r in records[4:]}
    assert not list(contradictions(left, records[3].link, records[5].link, said))
    assert len(list(contradictions(left, Link(4, "0" * 64), records[5].link, said))) == 1
