"""Frames and messages between host and guest, under bytes that nobody sent."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from casemate_agent.drivers import guestwire as wire
from casemate_agent.guest.casemate_guest.frames import MAX_CONTENT, MAX_PAYLOAD, Decoder, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FRAMES = st.lists(
    st.tuples(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=4), st.binary()),
    max_size=6,
).map(lambda found: [({**header, "t": "x"}, payload) for header, payload in found])


@given(FRAMES, st.data())
def test_frames_arrive_whole_however_they_are_cut(
    frames: list[tuple[dict[str, Any], bytes]], data: st.DataObject
) -> None:
    raw = b"".join(encode(header, payload) for header, payload in frames)
    decoder = Decoder()
    got = []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        got += decoder.feed(raw[:size])
        raw = raw[size:]
    assert got == frames
    assert decoder.dropped == 0


@given(st.binary(max_size=400), st.binary(max_size=400), st.binary(max_size=200))
def test_a_good_frame_is_found_after_any_garbage(garbage: bytes, more: bytes, payload: bytes) -> None:
    decoder = Decoder()
    frame = encode({"t": "x"}, payload)
    decoder.feed(garbage)
    assert ({"t": "x"}, payload) in decoder.feed(frame)
    assert decoder.feed(more + frame)[-1] == ({"t": "x"}, payload)


@given(st.binary(max_size=300), st.integers(0, 400))
@example(payload=b"\xfe", cut=21)
def test_a_frame_cut_off_by_a_reconnect_is_dropped_and_the_next_one_read(payload: bytes, cut: int) -> None:
    first, second = encode({"t": "first"}, payload), encode({"t": "second"}, payload)
    cut = min(cut, len(first) - 2)  # all but the closing FF is the whole frame
    decoder = Decoder()
    assert decoder.feed(first[:cut]) == []
    assert decoder.feed(second) == [({"t": "second"}, payload)]
    assert decoder.dropped == (1 if cut > 1 else 0)


@given(st.binary(max_size=300), st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_never_gives_another_frame(payload: bytes, at: int, flip: int) -> None:
    frame = bytearray(encode({"t": "x"}, payload))
    frame[at % len(frame)] ^= flip
    for header, got in Decoder().feed(bytes(frame) + b"\xff"):
        assert (header, got) == ({"t": "x"}, payload)


def test_an_endless_frame_holds_no_more_than_one_frame_of_memory() -> None:
    decoder = Decoder()
    decoder.feed(b"\xff")
    for _ in range(200):
        assert decoder.feed(b"a" * 65536) == []
        assert decoder._held_bytes <= 2 * MAX_CONTENT
    assert decoder.feed(b"\xff" + encode({"t": "x"})) == [({"t": "x"}, b"")]
    assert decoder.dropped == 1


def test_frames_that_are_too_large_are_not_sent() -> None:
    with pytest.raises(ValueError, match="too large"):
        encode({"t": "x" * 70_000})
    with pytest.raises(ValueError, match="too large"):
        encode({"t": "x"}, bytes(MAX_PAYLOAD + 1))


def test_a_length_that_points_outside_of_the_frame_is_no_frame() -> None:
    from binascii import crc32

    body = (9999).to_bytes(2, "big") + b'{"t":"x"}'
    stuffed = (crc32(body).to_bytes(4, "big") + body).replace(b"\xfe", b"\xfe\x01").replace(b"\xff", b"\xfe\x02")
    decoder = Decoder()
    assert decoder.feed(b"\xff" + stuffed + b"\xff") == []
    assert decoder.dropped == 1


KINDS = sorted(wire._PARSERS)


@given(st.sampled_from([*KINDS, "nothing"]), st.dictionaries(st.sampled_from(
    ["v", "session", "boot_id", "helper", "revision", "cloud_init", "addresses", "network_error", "status", "errors",
     "id", "ok", "error", "s", "pos", "next", "from", "to", "lines", "ch", "n", "code", "starts", "severity", "time"]
), JSON), st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_whatever_a_guest_says_is_parsed_or_rejected(kind: str, fields: dict[str, Any], payload: bytes) -> None:
    try:
        wire.parse({**fields, "t": kind}, payload)
    except wire.Rejected:
        pass


POD = {"name": "web", "phase": "Running", "ready": True, "started": 5.5, "reason": "", "message": ""}
CONTAINER = {
    "name": "app",
    "image": "a",
    "state": "running",
    "ready": True,
    "restarts": 1,
    "exit_code": 0,
    "started": 5,
}


def pods(**changes: Any) -> wire.GuestMessage:
    pod = {**POD, "containers": [{**CONTAINER, **changes}]}
    return wire.parse({"t": "pods", "revision": "7"}, json.dumps([pod]).encode())


def test_pods_become_typed() -> None:
    got = pods()
    assert isinstance(got, wire.Pods)
    assert got.revision == "7"
    assert got.pods[0].containers[0].restarts == 1
    assert got.pods[0].started_s == 5.5


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "exploded"},
        {"ready": 1},
        {"restarts": -1},
        {"restarts": 10**30},
        {"restarts": True},
        {"exit_code": "0"},
        {"started": float("nan")},
        {"started": -5},
        {"started": 1e300},
        {"name": ["app"]},
    ],
)
def test_a_container_state_that_is_none_is_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(wire.Rejected):
        pods(**changes)


def test_text_of_a_guest_cannot_steer_a_terminal_or_a_page() -> None:
    got = pods(message="\x1b]0;owned\x07 \u202eevil\r\n\x9b31m ok\t.", reason="x" * 1000)
    assert isinstance(got, wire.Pods)
    container = got.pods[0].containers[0]
    assert container.message == "\\x1b]0;owned\\x07 \\u202eevil\\x0d\\x0a\\x9b31m ok\t."
    assert len(container.reason) == 128


@given(st.text())
def test_cleaned_text_is_printable_or_tab(text: str) -> None:
    assert all((ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F) or c == "\t" for c in wire.clean(text, 100))
    assert len(wire.clean(text, 100)) <= 100


def test_a_log_chunk_must_match_its_positions() -> None:
    line = b"2026-11-23T22:10:00.123456789+00:00 stderr F hello \xff world\n"
    chunk = wire.parse({"t": "log", "s": 1, "pos": 100, "next": 100 + len(line)}, line)
    assert isinstance(chunk, wire.LogChunk)
    (got,) = wire.log_lines(chunk)
    assert (got.stream, got.partial, got.text, got.end) == ("stderr", False, b"hello \xff world", 100 + len(line))
    assert got.time_s == pytest.approx(1795471800.123456)
    for bad in ({"next": 5}, {"pos": 99}, {"pos": -1}):
        with pytest.raises(wire.Rejected):
            wire.parse({"t": "log", "s": 1, "pos": 100, "next": 100 + len(line), **bad}, line)


@given(st.binary(max_size=300), st.integers(0, 1 << 40))
def test_every_byte_of_a_log_is_in_exactly_one_line(data: bytes, position: int) -> None:
    data += b"\n"
    lines = wire.log_lines(wire.LogChunk(1, position, position + len(data), data))
    assert len(lines) == data.count(b"\n")
    assert lines[-1].end == position + len(data)
    assert [line.end for line in lines] == sorted({line.end for line in lines})
