"""Quantities: what Kubernetes takes is taken, everything else is refused with what to write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core import quantity as q


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1048576", 2**20), ("16Gi", 16 * 2**30), ("1.5Gi", 3 * 2**29), ("500M", 500_000_000), ("1k", 1000)],
)
def test_bytes(text: str, size: int) -> None:
    assert q.parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("16GB", "write 16G"),
        ("16GiB", "write 16Gi"),
        ("16gb", "write 16G"),
        ("512mb", "write 512M"),
        ("-1Gi", "positive"),
        ("", "number and a unit"),
        ("Gi", "number and a unit"),
        ("1e3", "number and a unit"),
        ("0.1", "smaller unit"),
        ("99999999Pi", "at most"),
        ("１Gi", "number and a unit"),
        ("1Gi\n", "number and a unit"),
    ],
)
def test_bad_bytes_say_what_to_write(text: str, remedy: str) -> None:
    with pytest.raises(q.BadQuantity) as bad:
        q.parse_bytes(text)
    assert remedy in str(bad.value)


@given(st.integers(0, q.MAX_BYTES))
def test_bytes_come_back(size: int) -> None:
    assert q.parse_bytes(q.format_bytes(size)) == size


@given(st.integers(0, 10**9))
def test_cpus_and_spans_come_back(number: int) -> None:
    assert q.parse_millicpus(q.format_millicpus(number)) == number
    assert q.parse_seconds(q.format_seconds(number)) == number


@given(st.text(max_size=30))
def test_any_text_is_a_quantity_or_refused(text: str) -> None:
    for parse in (q.parse_bytes, q.parse_mib, q.parse_millicpus, q.parse_seconds, q.parse_bits_per_second):
        try:
            assert parse(text) >= 0
        except q.BadQuantity as bad:
            assert bad.problem
            assert bad.remedy


def test_fractions_of_units_are_refused() -> None:
    for parse, text in ((q.parse_mib, "1500k"), (q.parse_millicpus, "0.0001"), (q.parse_seconds, "0.5s")):
        with pytest.raises(q.BadQuantity):
            parse(text)
