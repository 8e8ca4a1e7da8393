"""Manifests: good ones come back the same, bad ones are refused with path, value and remedy, and nothing crashes."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_core.errors import InvalidSpec
from casemate_core.spec.environment import Environment
from casemate_wire import manifest, schema, yamldoc
from casemate_wire.codec import resources
from casemate_wire.diff import changes

GOOD: dict[str, Any] = {
    "apiVersion": "casemate/v1",
    "kind": "Environment",
    "metadata": {"name": "hello", "labels": {"tier": "demo"}},
    "spec": {
        "replicas": 2,
        "cpu": {"count": 2, "policy": "dedicated", "threads": "isolate", "emulator": "isolate", "realtime": True},
        "memory": {"size": "1Gi", "hugepages": "2Mi"},
        "image": "debian-13",
        "disk": {"size": "8Gi"},
        "nics": [{"network": "default", "type": "bridge"}],
        "archives": ["hello-image"],
        "placement": {"nodeSelector": {"rack": "a"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        "pods": [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "web"},
                "spec": {"containers": [{"name": "c", "image": "localhost/hello:1", "ports": [{"containerPort": 80}]}]},
            }
        ],
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one field set (or removed, for None); ``path`` has dots and list indexes."""
    document: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    node: Any = document
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    if value is None:
        del node[last]
    else:
        node[int(last) if last.isdigit() else last] = value
    return document


def violations(document: Any) -> list[str]:
    """Every violation that parsing or decoding finds, as sentences."""
    try:
        resources.from_message(manifest.parse(document))
    except InvalidSpec as invalid:
        return [str(v) for v in invalid.violations]
    return []


def test_a_good_manifest_comes_back_with_its_defaults() -> None:
    value = resources.from_message(manifest.parse(GOOD))
    again = manifest.to_plain(resources.to_message(value))
    assert resources.from_message(manifest.parse(again)) == value
    assert again["spec"]["cpu"]["count"] == 2
    assert again["spec"]["memory"]["size"] == "1Gi"
    assert again["spec"]["run"] == "started"
    assert again["spec"]["pods"][0]["spec"]["containers"][0]["ports"] == [{"containerPort": 80}]


def test_an_environment_without_an_interface_comes_back_without_one() -> None:
    for nics in ([], None):
        document = changed("spec.nics", nics)
        document["spec"]["isolated"] = True
        value = resources.from_message(manifest.parse(document))
        assert isinstance(value, Environment) and value.spec.isolated and value.spec.nics == ()
        again = manifest.to_plain(resources.to_message(value))
        assert "nics" not in again["spec"]
        assert resources.from_message(manifest.parse(again)) == value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.cpus", 4, "spec.cpus: is no field of the schema; did you mean cpu?"),
        ("spec.cpu.count", "four", "spec.cpu.count: 'four' is not a whole number"),
        ("spec.cpu.count", True, "spec.cpu.count: 'True' is not a whole number"),
        ("spec.cpu.count", -1, "spec.cpu.count: '-1' is out of range; write 1 to 512"),
        ("spec.cpu.count", 10**6, "spec.cpu.count: '1000000' is out of range"),
        ("spec.cpu.policy", "turbo", "spec.cpu.policy: 'turbo' is not one of the words"),
        ("spec.cpu.max", 4, "spec.cpu.max: is not served by this release"),
        ("spec.memory.size", "16GB", "spec.memory.size: '16GB' has the unknown unit 'GB'; write 16G"),
        ("spec.memory.size", "-1Gi", "spec.memory.size: '-1Gi' is negative"),
        ("spec.memory.size", "3Mi", "spec.memory.size: '3Mi' is out of range"),
        ("spec.memory.size", "1025Mi", "is not a multiple of the page size"),
        ("spec.memory", None, "spec.memory: is missing"),
        ("spec.image", "../etc/passwd", "spec.image: '../etc/passwd' is not a valid name"),
        ("metadata.name", "]]>", "metadata.name: ']]>' is not a valid name"),
        ("metadata.name", "../x", "metadata.name: '../x' is not a valid name"),
        ("metadata.labels.tier", 3, "metadata.labels.tier: '3' is not text; write \"3\" in quotes"),
        ("spec.gpus", [{"count": 0, "link": "wire"}], "spec.gpus[0].link: 'wire' is not one of the words"),
        ("spec.gpus", [{"count": 65}], "spec.gpus[0].count: '65' is out of range"),
        ("spec.nics", {}, "spec.nics: '{}' is not a list"),
        ("spec.nics", [], "spec.nics: '[]' is empty; write isolated: true for no interface"),
        ("spec.isolated", True, "spec.isolated: 'true' excludes interfaces, and spec.nics names some"),
        ("spec.nics.0.vlan", 100, "spec.nics[0].vlan: '100' is for virtual functions"),
        ("spec.pods.0.spec.hostPID", True, "spec.pods[0].spec.hostPID: is not a supported Pod field"),
        ("spec.pods.0.spec.containers.0.image", None, "spec.pods[0].spec.containers[0].image: is missing"),
        ("spec.pods.0.spec.containers.0.lifecycle", {}, "containers[0].lifecycle: is not a supported Pod field"),
        ("spec.pods.0.spec.containers.0.ports.0.containerPort", 70000, "is not a port number"),
        (
            "spec.pods.0.spec.terminationGracePeriodSeconds",
            float("inf"),
            "terminationGracePeriodSeconds: 'inf' is not a number",
        ),
        ("spec.pods.0.kind", "Job", "spec.pods[0].kind: 'Job' is not one of the words"),
        ("spec.userData", "rm -rf", "spec.userData: 'rm -rf' is neither #cloud-config nor a script"),
        ("spec.sshKeys", ["nonsense"], "spec.sshKeys[0]: 'nonsense' is not a public SSH key"),
        ("kind", "Pod", "kind: 'Pod' is written by the manager only"),
        ("kind", "Deployment", "kind: 'Deployment' is unknown"),
        ("apiVersion", "v2", "apiVersion: 'v2' is not a version that is served; write casemate/v1"),
    ],
)
def test_bad_fields_are_named(path: str, value: Any, said: str) -> None:
    found = violations(changed(path, value))
    assert any(said in sentence for sentence in found), found


def test_kinds_that_are_not_served_yet_are_refused() -> None:
    document = {"apiVersion": "casemate/v1", "kind": "Reservation", "metadata": {"name": "ran"}, "spec": {}}
    assert violations(document) == [
        "kind: 'Reservation' is not served by this release; apply one of "
        "Environment, Image, Network, Host, Policy, Tenant, User, Secret, Volume, RoleBinding"
    ]


def test_all_violations_are_told_at_once() -> None:
    document = changed("spec.cpu.policy", "turbo")
    document["spec"]["memory"]["size"] = "16GB"
    assert len(violations(document)) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a" * (yamldoc.MAX_BYTES + 1), "bytes of YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a: 1\na: 2\n", "has the key 'a' twice"),
        (b"1: a\n", "which is not text"),
        (b"a: !!python/object/apply:os.system [id]\n", "has the tag"),
        (b"a: [\n", "is not YAML"),
        (b"[" * 5000, "is n"),
        (b"a: " + b"[" * 40 + b"]" * 40, "is nested deeper"),
        (
            b"a: &a ["
            + b"x," * 100
            + b"]\n"
            + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)),
            "expands to more than",
        ),
    ],
)
def test_bad_yaml_is_refused_with_its_line(text: bytes, said: str) -> None:
    with pytest.raises(InvalidSpec) as invalid:
        manifest.load(text, "x.yaml")
    assert said in str(invalid.value)


def test_yaml_words_are_text_where_1_1_would_change_them() -> None:
    [(_, value)] = yamldoc.load(b"{a: no, b: 22:22, c: 2026-11-23, d: 010, e: 1_000}", "x")
    assert value == {"a": "no", "b": "22:22", "c": "2026-11-23", "d": 10, "e": "1_000"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60)
@given(json_values)
def test_any_document_is_an_object_or_refused(document: Any) -> None:
    try:
        manifest.parse(document)
    except InvalidSpec as invalid:
        assert invalid.violations


PATHS = [
    "metadata.name", "metadata.labels", "metadata.tenant", "spec.cpu", "spec.cpu.count", "spec.memory.size", "spec.disk", "spec.nics",
    "spec.nics.0", "spec.pods", "spec.pods.0", "spec.pods.0.spec", "spec.pods.0.spec.containers.0", "spec.placement.nodeSelector",
    "spec.placement.tolerations", "spec.image", "spec.replicas", "spec.sshKeys", "spec.userData", "spec",
]  # fmt: skip


@settings(max_examples=60)
@given(st.sampled_from(PATHS), json_values.filter(lambda v: v is not None))
def test_any_value_anywhere_is_taken_or_refused_with_a_path(path: str, value: Any) -> None:
    try:
        taken = resources.from_message(manifest.parse(changed(path, value)))
    except InvalidSpec as invalid:
        assert all(v.path for v in invalid.violations)
    else:
        assert resources.from_message(manifest.parse(manifest.to_plain(resources.to_message(taken)))) == taken


def test_changes_speak_the_schemas_words_and_effects() -> None:
    before = resources.from_message(manifest.parse(GOOD))
    after = resources.from_message(manifest.parse(changed("spec.memory.size", "2Gi")))
    [change] = changes(before, after)
    assert (change.path, change.before, change.after, change.effect) == ("spec.memory.size", "1Gi", "2Gi", "restart")
    image = resources.from_message(manifest.parse(changed("spec.image", "other")))
    assert [c.effect for c in changes(before, image)] == ["replace"]
    assert changes(before, before) == ()


def test_every_spec_field_of_a_served_kind_says_how_it_changes() -> None:
    for kind in schema.SERVED_KINDS:
        spec = schema.kind_descriptor(kind).fields_by_name["spec"].message_type
        for field in schema.fields_of(spec):
            below = [] if field.message_type is None else schema.fields_of(field.message_type)
            assert schema.effect(field) or all(schema.effect(f) for f in below), f"{kind}.spec.{field.json_name}"


def test_every_field_of_the_schema_has_a_comment_in_specs() -> None:
    for kind in schema.SERVED_KINDS:
        spec = schema.kind_descriptor(kind).fields_by_name["spec"].message_type
        assert spec is not None
        missing = [f.full_name for f in schema.fields_of(spec) if not schema.comment(f.full_name)]
        assert not missing


def test_numbers_that_json_lacks_are_refused_from_any_client() -> None:
    resource = manifest.parse(GOOD)
    resource.environment.spec.pods[0].update({"spec": {"terminationGracePeriodSeconds": float("nan")}})
    with pytest.raises(InvalidSpec) as invalid:
        resources.from_message(resource)
    assert invalid.value.violations[0].path == "spec.pods[0]"
