"""The chain of audit records: whatever is altered, dropped, put in another order or cut off is found."""

from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from casemate_core.audit import AuditRecord, Link, chained, digest_of, verify
from casemate_core.plain import from_plain, to_plain

text = st.text(max_size=8)
raw = st.builds(
    AuditRecord,
    sequence=st.just(0),
    time_s=st.floats(0, 2e9),
    actor=text,
    how=text,
    act=text,
    outcome=text,
    targets=st.lists(text, max_size=3).map(tuple),
    tenants=st.lists(text, max_size=3).map(tuple),
    detail=text,
    address=text,
    client=text,
    request=text,
    revision=st.integers(0, 2**40),
)
begins = st.just(Link()) | st.builds(Link, st.integers(1, 10**6), text)


@st.composite
def chains(draw: st.DrawFn, least: int = 1) -> tuple[Link, list[AuditRecord]]:
    begin = at = draw(begins)
    records = []
    for one in draw(st.lists(raw, min_size=least, max_size=8)):
        record = chained(one, at)
        records.append(record)
        at = record.link
    return begin, records


@given(chains())
def test_a_chain_as_it_was_written_is_whole_also_from_disk(chain: tuple[Link, list[AuditRecord]]) -> None:
    begin, records = chain
    assert verify(records, begin, records[-1].link) == []
    again = [from_plain(AuditRecord, to_plain(record)) for record in records]
    assert again == records and verify(again, begin, records[-1].link) == []


@given(chains(), st.data())
def test_an_altered_field_is_found_with_a_new_digest_too(
    chain: tuple[Link, list[AuditRecord]], data: st.DataObject
) -> None:
    begin, records = chain
    i = data.draw(st.integers(0, len(records) - 1))
    name = data.draw(st.sampled_from([f.name for f in fields(AuditRecord) if f.name != "digest"]))
    value = getattr(records[i], name)
    other = (*value, "x") if isinstance(value, tuple) else value + "x" if isinstance(value, str) else value + 1
    altered = replace(records[i], **{name: other})
    for forged in (altered, replace(altered, digest=digest_of(altered))):
        assert verify([*records[:i], forged, *records[i + 1 :]], begin, records[-1].link)


@given(chains(least=2), st.data())
def test_a_dropped_record_is_found(chain: tuple[Link, list[AuditRecord]], data: st.DataObject) -> None:
    begin, records = chain
    i = data.draw(st.integers(0, len(records) - 1))
    assert verify([*records[:i], *records[i + 1 :]], begin, records[-1].link)


@given(chains(least=2), st.data())
def test_another_order_is_found(chain: tuple[Link, list[AuditRecord]], data: st.DataObject) -> None:
    begin, records = chain
    mixed = data.draw(st.permutations(records).filter(lambda order: order != records))
    assert verify(mixed, begin, records[-1].link)


@given(chains(), st.data())
def test_an_end_that_is_cut_off_is_found(chain: tuple[Link, list[AuditRecord]], data: st.DataObject) -> None:
    begin, records = chain
    kept = records[: data.draw(st.integers(0, len(records) - 1))]
    found = verify(kept, begin, records[-1].link)
    assert found == [
        f"the end is cut off: the last record is {kept[-1].sequence if kept else begin.sequence}, and {records[-1].sequence} were written"
    ]


@given(chains(least=2), st.data())
def test_a_beginning_that_is_cut_off_is_found(chain: tuple[Link, list[AuditRecord]], data: st.DataObject) -> None:
    begin, records = chain
    assert verify(records[data.draw(st.integers(1, len(records) - 1)) :], begin, records[-1].link)


@given(chains(), chains())
def test_a_chain_forged_anew_does_not_have_the_head_that_was_noted(
    chain: tuple[Link, list[AuditRecord]], other: tuple[Link, list[AuditRecord]]
) -> None:
    begin, records = other
    head = chain[1][-1].link
    if head not in [r.link for r in records]:
        assert verify(records, begin, head)
