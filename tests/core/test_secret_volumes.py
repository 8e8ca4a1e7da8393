"""Volumes of secrets: what a manifest may say, and what becomes of it."""

from typing import Any

import pytest

from casemate_core.spec.pod import check_pod
from casemate_core.spec.secret import SecretText, lacks_text, references, resolved


def manifest(volume: Any = None, mount: Any = None, **secret: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "x", "volumeMounts": [mount or {"name": "v", "mountPath": "/v"}]}
    volumes = [volume or {"name": "v", "secret": {"secretName": "s", **secret}}]
    spec = {"containers": [container], "volumes": volumes}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": spec}


def told(pod: dict[str, Any]) -> list[tuple[str, str]]:
    return [(v.path.removeprefix("p.spec."), v.problem) for v in check_pod("p", pod)]


@pytest.mark.parametrize(
    "secret",
    [
        {},
        {"defaultMode": 0o400},
        {"items": [{"key": "a", "path": "x/y"}, {"key": "b", "path": "x/z", "mode": 0}]},
        {"items": [{"key": "a", "path": "..data"}]},
    ],
)
def test_what_kubernetes_takes_is_taken(secret: dict[str, Any]) -> None:
    assert told(manifest(**secret)) == []


@pytest.mark.parametrize(
    "pod, path, problem",
    [
        (manifest({"name": "v", "secret": {}}), "volumes[0].secret.secretName", "is missing"),
        (manifest({"name": "v", "secret": "s"}), "volumes[0].secret", "is not an object"),
        (manifest({"name": "v", "secret": None}), "volumes[0].secret", "is not an object"),
        (
            manifest({"name": "v", "secret": {"secretName": "s"}, "hostPath": {"path": "/"}}),
            "volumes[0].secret",
            "goes with no hostPath",
        ),
        (manifest(defaultMode=0o1000), "volumes[0].secret.defaultMode", "is no mode of a file"),
        (manifest(defaultMode="0400"), "volumes[0].secret.defaultMode", "is not a whole number from 0 up"),
        (manifest(optional=True), "volumes[0].secret.optional", "is not a supported Pod field"),
        (manifest(items=[{"path": "x"}]), "volumes[0].secret.items[0].key", "is missing"),
        *(
            (manifest(items=[{"key": "a", "path": p}]), "volumes[0].secret.items[0].path", "is no place in the volume")
            for p in ("", "/x", "x/", "../x", "x/../y", "x//y", ".", "x" * 2000)
        ),
        *(
            (
                manifest(items=[{"key": "a", "path": "x/y"}, {"key": "b", "path": p}]),
                "volumes[0].secret.items[1].path",
                "is taken by another key",
            )
            for p in ("x/y", "x", "x/y/z")
        ),
        (
            manifest(mount={"name": "v", "mountPath": "/v", "subPath": "x"}),
            "containers[0].volumeMounts[0].subPath",
            "is not served for a secret",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_path(pod: dict[str, Any], path: str, problem: str) -> None:
    assert (path, problem) in told(pod)


TEXTS = {"s/a": SecretText("fa", "A"), "s/b": SecretText("fb", ""), "other/c": SecretText("fc", "C")}


def test_without_items_all_keys_are_files() -> None:
    pod = manifest()
    assert list(references((pod,))) == [("spec.pods[0].spec.volumes[0].secret", "s", "")]
    volume = resolved(pod, TEXTS)["spec"]["volumes"][0]["secret"]
    assert volume["files"] == [
        {"path": "a", "mode": 0o644, "text": "A"},
        {"path": "b", "mode": 0o644, "text": ""},
    ]
    assert pod == manifest()


def test_items_are_files_at_their_paths_and_modes() -> None:
    pod = manifest(items=[{"key": "b", "path": "z"}, {"key": "a", "path": "x/y", "mode": 0o400}], defaultMode=0o440)
    assert [(p, s, k) for p, s, k in references((pod,))] == [
        ("spec.pods[0].spec.volumes[0].secret.items[0]", "s", "b"),
        ("spec.pods[0].spec.volumes[0].secret.items[1]", "s", "a"),
    ]
    assert [(f["path"], f["mode"]) for f in resolved(pod, TEXTS)["spec"]["volumes"][0]["secret"]["files"]] == [
        ("x/y", 0o400),
        ("z", 0o440),
    ]


def test_a_fingerprint_changes_with_text_path_and_mode() -> None:
    marks = [
        resolved(manifest(items=[{"key": "a", "path": path, "mode": mode}]), {"s/a": SecretText(mark, "A")})
        for path, mode, mark in (("x", 0o400, "f"), ("y", 0o400, "f"), ("x", 0o440, "f"), ("x", 0o400, "g"))
    ]
    assert len({m["spec"]["volumes"][0]["secret"]["fingerprint"] for m in marks}) == 4


def test_a_text_that_is_not_at_hand_is_missed() -> None:
    assert not lacks_text((manifest(),), TEXTS)
    assert lacks_text((manifest(),), {})
    assert lacks_text((manifest(),), TEXTS | {"s/b": SecretText("fb")})
    assert lacks_text((manifest(items=[{"key": "zz", "path": "x"}]),), TEXTS)
    with pytest.raises(KeyError):
        resolved(manifest(), {"s/a": SecretText("fa")})
