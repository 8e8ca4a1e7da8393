"""What is fuzzed: each parser of what comes from outside, as a function of bytes, and the inputs that it begins with.

A target returns where its input was taken or refused, and raises where the parser fails. Two programs call them: pytest, on the
seeds, on small changes of them and on what was found before (``test_targets.py``), and a coverage-guided fuzzer (``run.py``,
``make fuzz``). A new parser of foreign bytes gets a target here.
"""

import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from casemate_agent.domain import parse_domain
from casemate_agent.drivers import guestwire
from casemate_agent.drivers.imageformat import HEAD_BYTES, read_header, read_qcow2
from casemate_agent.drivers.ports import DomainPhase
from casemate_agent.guest.casemate_guest.frames import Decoder, encode
from casemate_agent.ledger.desired import from_metadata
from casemate_core.checkpoint import witnessed_from_json
from casemate_core.cpuset import CpuSet
from casemate_core.errors import CasemateError, InternalError
from casemate_core.quantity import parse_bytes
from casemate_core.spec.pod import check_pods
from casemate_core.spec.secret import references
from casemate_core.topology.rules import check
from casemate_core.topology_loaders import HostFacts, from_capabilities, from_line, from_sysfs
from casemate_manager.policy.cel import Cel
from casemate_wire import manifest, token
from casemate_wire.codec import resources
from casemate_wire.codec.channels import frame_from_wire
from casemate_wire.codec.hosts import from_host_from_wire, to_host_from_wire
from casemate_wire.codec.signed import sealed_in_session
from casemate_wire.signed import NotSigned, Opener, Purpose, signer_of
from casemate_wire.v1 import hosts_pb2
from casemate_wire.v1 import operators_pb2 as pb
from support.hosts import host
from support.rendered import capabilities_of, facts_of, files_of, with_real_addresses

TESTS: Final = Path(__file__).parent.parent
EXAMPLES: Final = sorted((TESTS.parent / "examples").rglob("*.yaml"))
REAL: Final = with_real_addresses(host("ran-edge"))
SYSFS: Final = files_of(REAL)
RECORDED: Final = TESTS / "hosts/recorded/libvirt-test.xml"
NAMES: Final = sorted(SYSFS)
FACTS: Final = facts_of(REAL)
NOW_S: Final = 1_800_000_000.0


def as_manifest(data: bytes) -> None:
    for resource in manifest.load(data, "fuzz"):
        resources.from_message(resource)


def as_resource(data: bytes) -> None:
    resources.from_message(pb.Resource.FromString(data))


def as_pods(data: bytes) -> None:
    value = json.loads(data)
    pods = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(pod, dict) for pod in pods):
        return
    if not list(check_pods("spec.pods", pods)):
        list(references(pods))


def as_message_of_a_host(data: bytes) -> None:
    from_host_from_wire(hosts_pb2.FromHost.FromString(data))


def as_message_of_a_manager(data: bytes) -> None:
    to_host_from_wire(hosts_pb2.ToHost.FromString(data))


def as_frame_of_a_channel(data: bytes) -> None:
    frame_from_wire(hosts_pb2.ChannelFrame.FromString(data))


def as_signed_message(data: bytes) -> None:
    sealed = sealed_in_session(data)
    if sealed is not None:
        Opener(Purpose("session", "h7", "", bytes(32)), ("0" * 64,)).open(sealed, NOW_S)


def as_certificate(data: bytes) -> None:
    signer_of((data, data), ("0" * 64,), NOW_S)


def as_expression(data: bytes) -> None:
    Cel().compile(data.decode()).evaluate({"host": {"name": "h", "labels": {"a": "b"}, "gpus": 4}})


def as_qcow2(data: bytes) -> None:
    read_qcow2(data[:HEAD_BYTES], max(len(data), 1 << 24))
    read_header(data[:HEAD_BYTES], 1 << 24, "qcow2")


def as_raw_disk(data: bytes) -> None:
    read_header(data[:HEAD_BYTES], len(data) // 512 * 512, "raw")


def as_sysfs(data: bytes) -> None:
    """Two bytes name a file; up to the next zero byte its text."""
    files = dict(SYSFS)
    for piece in data.split(b"\0")[:8]:
        if len(piece) >= 2:
            files[NAMES[int.from_bytes(piece[:2], "big") % len(NAMES)]] = piece[2:].decode("utf-8", "replace")
    check(from_sysfs(files, FACTS))


def as_words_of_a_guest(data: bytes) -> None:
    for header, payload in Decoder().feed(data):
        message = guestwire.parse(header, payload)
        if isinstance(message, guestwire.LogChunk):
            guestwire.log_lines(message)


def as_message_of_a_guest(data: bytes) -> None:
    """Past the frame, whose checksum a fuzzer does not find: JSON, a zero byte, the payload."""
    text, _, payload = data.partition(b"\0")
    header = json.loads(text)
    if isinstance(header, dict):
        message = guestwire.parse(header, payload)
        if isinstance(message, guestwire.LogChunk):
            guestwire.log_lines(message)


def as_domain(data: bytes) -> None:
    try:
        _, owner = parse_domain(data.decode(), DomainPhase.RUNNING)
    except InternalError:
        return  # libvirt's own XML: what is none is our defect, and told as one
    if owner is not None:
        from_metadata(owner.record)


def as_capabilities(data: bytes) -> None:
    from_capabilities(data.decode(), facts=HostFacts(name="h"))


def as_line(data: bytes) -> None:
    text = data.decode()
    # It may ask for a host of any size that fits memory: that is a flag of whoever simulates one.
    if all(len(number) < 3 for number in re.findall(r"\d+", text)):
        from_line(text)


def as_words(data: bytes) -> None:
    text = data.decode()
    for parse in (token.parse, CpuSet.parse, parse_bytes):
        try:
            parse(text)
        except (CasemateError, ValueError):
            pass
    witnessed_from_json(data)


def _frames() -> Iterator[bytes]:
    hello: dict[str, Any] = {"t": "hello", "v": 1, "boot": "b", "os": "debian", "kernel": "6.1", "addresses": []}
    yield encode(hello, b"")
    yield encode({"t": "data", "s": 1}, b"abc") + encode({"t": "eof", "s": 1}, b"")
    yield encode({"t": "credit", "s": 1, "n": 4}, b"")


MESSAGES: Final = (
    {"t": "hello", "v": 1, "boot": "b", "kernel": "6.1", "cloud_init": {"status": "done"}},
    {"t": "pods", "pods": [{"name": "p", "phase": "Running", "containers": [{"name": "c", "state": "running"}]}]},
    {"t": "note", "reason": "x", "message": "y", "pod": "p"},
    {"t": "log", "s": 1, "pod": "p", "container": "c", "seq": 1},
    {"t": "end", "s": 1, "code": 0},
    {"t": "done", "id": 1},
    {"t": "opened", "s": 1},
    {"t": "gap", "s": 1, "n": 3},
)


def _qcow2() -> bytes:
    fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, 1 << 30, 0, 2, 3 << 16, 1 << 16, 1, 0, 0)
    return fixed + struct.pack(">QQQII", 0, 0, 0, 4, 112) + bytes(8) + bytes(8)


def _backed(extension: int) -> bytes:
    name = b"/etc/shadow"
    more = struct.pack(">II", extension, len(name)) + name.ljust(16, b"\0") + bytes(8)
    whole = bytearray(_qcow2()[:112] + more + name)
    struct.pack_into(">QI", whole, 8, 112 + len(more), len(name))
    return bytes(whole)


def _certificates() -> list[bytes]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from casemate_manager import pki

    authority = pki.make_authority("a", NOW_S)
    leaf = pki.sign_signer(authority, Ed25519PrivateKey.generate().public_key(), NOW_S)
    return [pki.der(leaf), pki.der(authority.certificate)]


def _signed() -> list[bytes]:
    message = hosts_pb2.ToHost(
        signed=hosts_pb2.Signed(message=b"m", number=1, signature=bytes(64), chain=_certificates())
    )
    return [message.SerializeToString()]


def _messages_of_hosts() -> list[bytes]:
    from casemate_wire.codec.hosts import from_host_to_wire
    from casemate_wire.stream import Facts, Hello, HostEvent, HostReport, Inventory

    values = (
        Hello("h7", "boot", 1, 1, "d", 1),
        Inventory("d", host("laptop")),
        Facts(1, snapshot=True, host=HostReport()),
        HostEvent("1", "", "", "R", "m"),
    )
    return [from_host_to_wire(value).SerializeToString() for value in values]


def _messages_of_managers() -> list[bytes]:
    from casemate_wire.codec.hosts import to_host_to_wire
    from casemate_wire.stream import Desired, FactsAck, Welcome
    from support.instances import instance, nic

    desired = Desired(1, 1, snapshot=True, instances=(instance(nics=(nic(),), user_data="x"),), removed=("u",))
    return [to_host_to_wire(v).SerializeToString() for v in (desired, Welcome(1, 0, True, 1.0, 8), FactsAck(1))]


def _objects() -> list[bytes]:
    found = [resource for path in EXAMPLES for resource in manifest.load(path.read_bytes(), path.name)]
    return [resource.SerializeToString() for resource in found]


def _pods() -> list[bytes]:
    env = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    container = {"name": "c", "image": "x", "env": env, "ports": [{"containerPort": 80}], "command": ["a"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    volume = {"name": "v", "secret": {"secretName": "s", "items": [{"key": "k", "path": "a/b"}]}}
    other = {**pod, "spec": {"containers": [container], "volumes": [volume], "restartPolicy": "Never"}}
    return [json.dumps(p).encode() for p in (pod, [pod, other], other)]


#: By name: the target, and a function that makes what it begins with.
TARGETS: Final[dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]]] = {
    "manifest": (as_manifest, lambda: [path.read_bytes() for path in EXAMPLES]),
    "resource": (as_resource, _objects),
    "pods": (as_pods, _pods),
    "from-host": (as_message_of_a_host, _messages_of_hosts),
    "to-host": (as_message_of_a_manager, _messages_of_managers),
    "channel": (
        as_frame_of_a_channel,
        lambda: [
            hosts_pb2.ChannelFrame(ticket="t").SerializeToString(),
            hosts_pb2.ChannelFrame(stdin=b"x").SerializeToString(),
        ],
    ),
    "signed": (as_signed_message, _signed),
    "certificate": (as_certificate, _certificates),
    "cel": (as_expression, lambda: [b"host.gpus >= 4 && host.labels['a'] == 'b'", b"size(host.name) > 1 ? true : false"]),
    "qcow2": (as_qcow2, lambda: [_qcow2(), _backed(0xE2792ACA), _backed(0x44415441), _backed(0x6803F857)]),
    "raw": (as_raw_disk, lambda: [bytes(512), _qcow2().ljust(512, b"\0"), b"conectix".ljust(512, b"\0")]),
    "sysfs": (as_sysfs, lambda: [b"", b"\x00\x010-3\x00\x00\x02x", b"\x01\x000-1,4\n\0\x02\x00-1"]),
    "guest-frames": (as_words_of_a_guest, lambda: [b"".join(_frames()), *_frames()]),
    "guest-message": (as_message_of_a_guest, lambda: [json.dumps(m).encode() + b"\0payload\n" for m in MESSAGES]),
    "domain": (as_domain, lambda: [p.read_bytes() for p in sorted((TESTS / "golden/domain").glob("*.xml"))]),
    "capabilities": (as_capabilities, lambda: [capabilities_of(REAL).encode(), RECORDED.read_bytes()]),
    "line": (as_line, lambda: [b"2s 16k/c 2t 256G disk=4T", b"1s 4k/c 2t 16G name=a"]),
    "words": (as_words, lambda: [b"cmt1.a.h7.b.c", b"0-3,5", b"16Gi", b'{"key": "", "kept": [], "breaks": []}']),
}  # fmt: skip


def tried(name: str, data: bytes) -> None:
    """Run a target. Raises what a parser must not: everything but a refusal of ours, and of JSON, UTF-8 and protobuf."""
    try:
        TARGETS[name][0](data)
    except InternalError:
        raise
    except (CasemateError, NotSigned, guestwire.Rejected, DecodeError, json.JSONDecodeError, UnicodeDecodeError):
        pass


def changed(data: bytes, random_: random.Random) -> bytes:
    """A small change, as a fuzzer makes them."""
    at = random_.randint(0, len(data))
    end = min(len(data), at + random_.choice((0, 1, 1, 2, 4, 16)))
    new = random_.choice(
        (b"", b"\0", b"\xff" * 4, b"\x7f", b"-1", b"9" * 20, b"}", b"\n", random_.randbytes(4), data[at:end] * 3)
    )
    return data[:at] + new + data[end:]
