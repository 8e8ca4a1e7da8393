"""The hosts' stream at the border: values come back from messages, and messages without shape are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_core.checkpoint import Checkpoint
from casemate_core.claims import Claim
from casemate_core.spec import instance as i
from casemate_core.spec.operation import Order, OrderPhase, OrderState, Verb
from casemate_core.spec.realtime import Bucket, Certificate, Latency, LineState, ProfileLine
from casemate_core.spec.secret import SecretText
from casemate_core.spec.views import Condition
from casemate_core.topology_loaders import from_line
from casemate_wire import schema, stream
from casemate_wire.codec import hosts, volume
from casemate_wire.codec.basics import BadMessage
from casemate_wire.codec.views import boot_word
from casemate_wire.v1 import hosts_pb2
from casemate_wire.v1.environment_pb2 import InstanceStatus

UID = "0c1d2e3f-0000-4000-8000-000000000001"
words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
times = st.integers(0, 2**31).map(float)
counts = st.integers(0, 2**31 - 1)
uids = st.uuids().map(str)
files = st.builds(i.File, words, st.binary(min_size=32, max_size=32).map(lambda b: f"sha256:{b.hex()}"))
images = st.builds(
    i.ImageRef, words, st.sampled_from(["disk", "oci-archive"]), files, st.sampled_from(["raw", "qcow2"]),
    st.none() | files, st.none() | files, words.filter(str.isprintable),
)  # fmt: skip
addresses = st.ip_addresses(v=4).map(str)
nics = st.builds(
    i.Nic, words, st.binary(min_size=6, max_size=6).map(lambda b: b.hex(":")), addresses, st.integers(1, 32), addresses,
    st.lists(addresses, max_size=2).map(tuple), st.integers(576, 9000), words,
)  # fmt: skip
orders = st.builds(
    Order, uids, st.sampled_from(Verb), times, st.none() | times, counts, words, st.booleans(), times
)  # fmt: skip
lines = st.builds(ProfileLine, words, st.sampled_from(LineState), words, words, words, words)
certificates = st.builds(
    Certificate, uids, times, times, words, counts, counts, counts, counts, counts, counts,
    st.lists(st.builds(Latency, counts, counts, counts, counts, counts), max_size=2).map(tuple),
    st.lists(st.builds(Bucket, counts, counts), max_size=2).map(tuple),
    words, words, words, words, counts, counts, st.lists(lines, max_size=2).map(tuple), words, words,
)  # fmt: skip
order_states = st.builds(
    OrderState, uids, st.sampled_from(OrderPhase), words, words, times, times, st.none() | certificates
)
claims = st.builds(Claim, uids, st.integers(0, 9), st.integers(0, 9), disk_mib=st.integers(0, 10**6))
volumes = st.builds(
    i.VolumeRef, uids, st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True), st.integers(1, 2**40),
    st.just("raw"), st.booleans(), st.booleans(),
)  # fmt: skip
desired = st.builds(
    i.DesiredInstance, uid=uids, tenant=words, environment=words, name=words, ordinal=counts, generation=counts, run=st.sampled_from(i.Run),
    cpus=counts, memory_mib=counts, disk_mib=counts, image=images,
    placement=st.builds(i.Placement, claims, counts, counts, words), archives=st.lists(images, max_size=2).map(tuple),
    nics=st.lists(nics, max_size=2).map(tuple), pods=st.just(({"metadata": {"name": "web"}, "spec": {"n": 1}},)),
    ssh_keys=st.lists(words, max_size=2).map(tuple), user_data=words, virtualisation=st.sampled_from(i.Virtualisation),
    cpu_policy=words, page_kib=counts, peers=st.lists(st.builds(i.Peer, words, addresses), max_size=2).map(tuple), order=st.none() | orders, disk=counts,
    on_crash=st.sampled_from(["restart", "leave"]), crash_limit=counts, stop_grace_s=st.none() | times,
    secrets=st.dictionaries(words, st.builds(SecretText, words, words), max_size=2),
    volumes=st.lists(volumes, max_size=2, unique_by=(lambda v: v.uid, lambda v: v.name)).map(tuple),
)  # fmt: skip
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
checkpoints = st.builds(
    Checkpoint, st.integers(1, 2**53), hexes, counts, hexes, st.text("0123456789abcdef", min_size=128, max_size=128)
)
networks = st.builds(
    i.HostNetwork, words, words, st.ip_addresses(v=4).map(lambda a: f"{a}/32"), addresses, st.integers(576, 9000)
)
parameters = st.dictionaries(words, words, max_size=2)
to_host = st.one_of(
    st.builds(stream.Welcome, counts, counts, st.booleans(), times, counts),
    st.builds(
        stream.Desired, counts, counts, st.booleans(), st.lists(desired, max_size=2).map(tuple), st.lists(uids, max_size=2).map(tuple),
        st.lists(networks, max_size=2).map(tuple), st.lists(words, max_size=2).map(tuple), st.booleans(),
        st.lists(uids, max_size=2).map(tuple),
    ),
    st.builds(stream.Operate, words, words, uids, parameters, times),
    st.builds(stream.OpenChannel, ticket=words, kind=words, instance=uids, parameters=parameters),
    st.builds(stream.Credit, counts),
    st.builds(stream.Rejected, words, words, times),
    st.builds(stream.FactsAck, counts),
    checkpoints,
)  # fmt: skip
containers = st.builds(
    i.ContainerState, words, words, words, st.booleans(), counts, st.integers(-1, 255), words, words, times, times
)
pods = st.builds(
    i.PodState, words, words, st.booleans(), words, words, times, st.lists(containers, max_size=2).map(tuple)
)
states = st.builds(
    i.InstanceState, uids, counts, st.sampled_from(i.Phase), words, words, st.sampled_from(["", "kvm", "tcg"]), words, counts, counts, times,
    st.booleans(), words, st.lists(pods, max_size=2).map(tuple), counts, counts, st.none() | claims, st.none() | order_states, words,
    st.booleans(), st.lists(lines, max_size=2).map(tuple), st.none() | certificates,
)  # fmt: skip
reports = st.builds(
    stream.HostReport, counts, st.lists(claims, max_size=2).map(tuple), st.lists(words, max_size=2).map(tuple),
    st.lists(st.builds(Condition, words, st.just("True"), words, words, times), max_size=2).map(tuple), counts,
    st.lists(lines, max_size=2).map(tuple),
    st.none() | st.lists(st.builds(stream.VolumeFacts, uids, counts, counts), max_size=2).map(tuple),
)  # fmt: skip
from_host = st.one_of(
    st.builds(stream.Hello, words, words, counts, counts, words, counts, words, words, st.sampled_from(["kvm", "tcg", "simulated"])),
    st.builds(stream.Inventory, words, st.just(from_line("1s 1c/s 4k/c 2t 16G"))),
    st.builds(
        stream.Facts, counts, st.booleans(), st.lists(states, max_size=2).map(tuple), st.lists(uids, max_size=2).map(tuple),
        st.none() | reports, st.booleans(),
    ),
    st.builds(stream.Outcome, words, words, st.just("Done"), words, words, st.booleans()),
    st.builds(stream.HostEvent, words, words, words, words, words, st.sampled_from(["Normal", "Warning"]), times, words),
    st.builds(stream.Measurement, times, times, counts, st.lists(st.builds(stream.InstanceMeasurement, uids, counts, counts), max_size=2).map(tuple)),
    st.builds(stream.Ack, counts, counts),
    st.builds(stream.Credit, counts),
    st.builds(stream.Bye, words),
)  # fmt: skip


@settings(max_examples=60)
@given(to_host)
def test_what_the_manager_says_comes_back(value: stream.ToHost) -> None:
    message = hosts_pb2.ToHost.FromString(hosts.to_host_to_wire(value).SerializeToString())
    assert hosts.to_host_from_wire(message) == value


@settings(max_examples=60)
@given(from_host)
def test_what_a_host_says_comes_back(value: stream.FromHost) -> None:
    message = hosts_pb2.FromHost.FromString(hosts.from_host_to_wire(value).SerializeToString())
    assert hosts.from_host_from_wire(message) == value


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for kind, decode in ((hosts_pb2.FromHost, hosts.from_host_from_wire), (hosts_pb2.ToHost, hosts.to_host_from_wire)):
        try:
            message = kind.FromString(data)
        except Exception:
            continue
        try:
            decode(message)
        except BadMessage:
            pass


@pytest.mark.parametrize(
    ("field", "value"),
    [("uid", "../../etc"), ("claim", None), ("run", "sometimes"), ("virtualisation", "maybe")],
)
def test_an_instance_without_shape_is_refused(field: str, value: str | None) -> None:
    good = i.DesiredInstance(
        UID, "t", "e", "n", 0, 1, i.Run.STARTED, 1, 64, 0, i.ImageRef("x", "disk", i.File("file:///x", "sha256:" + "0" * 64), "raw"),
        i.Placement(Claim(UID), 1, 1),
    )  # fmt: skip
    message = hosts.to_host_to_wire(stream.Desired(1, 1, instances=(good,)))
    assert hosts.to_host_from_wire(message) == stream.Desired(1, 1, instances=(good,))
    if value is None:
        message.desired.instances[0].ClearField(field)
    else:
        setattr(message.desired.instances[0], field, value)
    with pytest.raises(BadMessage):
        hosts.to_host_from_wire(message)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (i.InstanceState("u", 1, i.Phase.PREPARING), "off"),
        (i.InstanceState("u", 1, i.Phase.STOPPED), "off"),
        (i.InstanceState("u", 1, i.Phase.STARTING, pid=7), "firmware"),
        (i.InstanceState("u", 1, i.Phase.STARTING, pid=7, kernel=True), "kernel"),
        (i.InstanceState("u", 1, i.Phase.RUNNING, pid=7, guest_boot_id="b"), "userland"),
        (
            i.InstanceState("u", 1, i.Phase.RUNNING, pid=7, guest_boot_id="b", guest_ready=True, cloud_init="running"),
            "cloud-init",
        ),
        (
            i.InstanceState("u", 1, i.Phase.RUNNING, pid=7, guest_boot_id="b", guest_ready=True, cloud_init="done"),
            "pods",
        ),
        (i.InstanceState("u", 1, i.Phase.READY, pid=7, guest_boot_id="b", guest_ready=True), "up"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.phase.value,
)
def test_how_far_a_guest_has_booted(state: i.InstanceState, word: str) -> None:
    assert boot_word(state) == word
    assert word in schema.words(InstanceStatus.DESCRIPTOR.fields_by_name["boot"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"uid": "../../etc/passwd"}, "named"),
        ({"name": "a/b"}, "named"),
        ({"name": ""}, "named"),
        ({"format": "qcow2"}, "format"),
        ({"size_mib": 0}, "0 MiB"),
    ],
)
def test_a_volume_that_names_no_file_and_no_folder_is_refused(change: dict[str, object], why: str) -> None:
    good = {"uid": UID, "name": "data", "size_mib": 16, "format": "raw"}
    volume.refs_from_message([hosts_pb2.HostVolume(**good)])
    with pytest.raises(BadMessage, match=why):
        volume.refs_from_message([hosts_pb2.HostVolume(**(good | change))])


def test_a_volume_twice_is_refused() -> None:
    one = hosts_pb2.HostVolume(uid=UID, name="data", size_mib=16, format="raw")
    with pytest.raises(BadMessage, match="2 volumes"):
        volume.refs_from_message([one, one])


def test_what_a_host_does_not_know_of_volumes_is_not_none_of_them() -> None:
    assert volume.facts_from_message(hosts_pb2.HostFacts()) is None
    assert volume.facts_from_message(hosts_pb2.HostFacts(volumes_known=True)) == ()
    bad = hosts_pb2.HostFacts(volumes_known=True, volumes=[hosts_pb2.VolumeFacts(uid="x")])
    with pytest.raises(BadMessage, match="facts of volume"):
        volume.facts_from_message(bad)
