"""Manifests from files, folders and standard input."""

import io
import sys
from pathlib import Path

import pytest

from casemate_cli import manifests
from casemate_cli.failure import Failure
from casemate_wire import schema

ENVIRONMENT = """\
apiVersion: casemate/v1
kind: Environment
metadata: {name: %s}
spec: {cpu: {count: 1}, memory: {size: 1Gi}, image: debian-13}
"""
NETWORK = "apiVersion: casemate/v1\nkind: Network\nmetadata: {name: n}\nspec: {type: nat, subnet: 10.1.0.0/24}\n"


def names(found: list[object]) -> list[str]:
    return [f"{schema.kind_of(r)}/{schema.object_of(r).metadata.name}" for r in found]  # type: ignore[arg-type, attr-defined]


def test_a_folder_stands_for_the_manifests_in_it(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(ENVIRONMENT % "b")
    (tmp_path / "c.yml").write_text(NETWORK)
    (tmp_path / "readme.md").write_text("no manifest")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.yaml").write_text(ENVIRONMENT % "a")
    flat = manifests.load((str(tmp_path),), recursive=False, tenant="t")
    # What is used stands before its users.
    assert names(list(flat)) == ["Network/n", "Environment/b"]
    deep = manifests.load((str(tmp_path),), recursive=True, tenant="t")
    assert names(list(deep)) == ["Network/n", "Environment/b", "Environment/a"]


def test_a_tenant_is_given_to_those_that_name_none(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        ENVIRONMENT % "a"
        + "---\n"
        + (ENVIRONMENT % "b").replace("name: b", "name: b, tenant: other")
        + "---\n"
        + NETWORK
    )
    found = manifests.load((str(path),), recursive=False, tenant="mine")
    tenants = {schema.object_of(r).metadata.name: schema.object_of(r).metadata.tenant for r in found}  # type: ignore[attr-defined]
    assert tenants == {"a": "mine", "b": "other", "n": ""}


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(NETWORK.encode())))
    assert names(list(manifests.load(("-",), recursive=False, tenant="t"))) == ["Network/n"]


def test_everything_wrong_in_all_files_is_told_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(ENVIRONMENT.replace("count: 1", "cuont: 1") % name)
    with pytest.raises(Failure) as raised:
        manifests.load((str(tmp_path),), recursive=False, tenant="t")
    assert [d.field.partition(": ")[2] for d in raised.value.details] == [
        "environment/a: spec.cpu.cuont",
        "environment/b: spec.cpu.cuont",
    ]
    assert all("count" in d.remedy for d in raised.value.details)


@pytest.mark.parametrize("content", ["", "---\n---\n", "# nothing\n"])
def test_a_file_without_an_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(Failure):
        manifests.load((str(path),), recursive=False, tenant="t")


def test_an_empty_folder_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(Failure) as raised:
        manifests.files((str(tmp_path),), recursive=False)
    assert "-R" in raised.value.remedy


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(Failure) as raised:
        manifests.read("/dev/zero")
    assert "16 MiB" in raised.value.details[0].problem


def test_volumes_and_secrets_come_before_those_who_use_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: casemate/v1, kind: Environment, metadata: {name: a},"
        " spec: {cpu: {count: 1}, memory: {size: 64Mi}, image: x, volumes: [{volume: v}]}}\n"
        "---\n{apiVersion: casemate/v1, kind: Volume, metadata: {name: v}, spec: {size: 1Gi}}\n"
        "---\n{apiVersion: casemate/v1, kind: Secret, metadata: {name: s}, spec: {data: {k: t}}}\n"
    )
    found = manifests.load((str(tmp_path / "a.yaml"),), recursive=False, tenant="")
    assert names(list(found)) == ["Secret/s", "Volume/v", "Environment/a"]
