"""Which manager is asked: options over contexts over the environment over the current context over the default."""

from pathlib import Path

import pytest

from casemate_cli import settings
from casemate_cli.failure import Failure

FILE = "current: lab\ncontexts:\n  lab: {manager: 10.0.0.5:7443, tenant: ran}\n  edge: {manager: '[::1]:9'}\n"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return {"CASEMATE_CONFIG": str(path)}


def test_without_anything_loopback_and_the_default_tenant(tmp_path: Path) -> None:
    found = settings.resolve(environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert (found.manager, found.tenant) == ("127.0.0.1:7443", "default")


def test_the_current_context(environ: dict[str, str]) -> None:
    found = settings.resolve(environ=environ)
    assert (found.manager, found.tenant) == ("10.0.0.5:7443", "ran")


def test_the_environment_over_the_current_context(environ: dict[str, str]) -> None:
    found = settings.resolve(environ=environ | {"CASEMATE_MANAGER": "m:1"})
    assert (found.manager, found.tenant) == ("m:1", "default")


def test_a_named_context_over_the_environment(environ: dict[str, str]) -> None:
    found = settings.resolve(context="edge", environ=environ | {"CASEMATE_MANAGER": "m:1"})
    assert (found.manager, found.tenant) == ("[::1]:9", "default")


def test_options_over_all(environ: dict[str, str]) -> None:
    found = settings.resolve(manager="x:2", tenant="t", context="lab", environ=environ)
    assert (found.manager, found.tenant) == ("x:2", "t")


@pytest.mark.parametrize("address", ["host", "host:", ":7443", "host:0", "host:70000", "host:http", "::1:7443"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(Failure) as raised:
        settings.checked_address(address)
    assert raised.value.details[0].value == address


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("- a", ""),
        ("curent: x", "curent"),
        ("current: x", "current"),
        ("contexts: 3", "contexts"),
        ("contexts: {a: {server: x}}", "contexts.a"),
        ("a: [", ""),
    ],
)
def test_a_file_that_is_wrong_names_the_field(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(Failure) as raised:
        settings.load_contexts(path)
    assert raised.value.details[0].field == field


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    wanted = settings.Contexts("a", {"a": settings.Context("m:1", "t"), "b": settings.Context("n:2")})
    path = tmp_path / "below" / "config.yaml"
    settings.save_contexts(path, wanted)
    assert settings.load_contexts(path) == wanted


IDENTITY = {"roots": "R\n", "certificate": "C\n", "key": "K\n"}


def test_the_certificate_goes_with_the_address_however_it_was_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    mine = settings.Context("m:1", **IDENTITY)
    settings.save_contexts(path, settings.Contexts("a", {"a": settings.Context("n:2"), "b": mine}))
    assert path.stat().st_mode & 0o777 == 0o600
    assert settings.load_contexts(path).contexts["b"] == mine
    environ = {"CASEMATE_CONFIG": str(path)}
    for found in (
        settings.resolve(manager="m:1", environ=environ),
        settings.resolve(context="b", environ=environ),
        settings.resolve(environ=environ | {"CASEMATE_MANAGER": "m:1"}),
    ):
        assert (found.roots, found.certificate, found.key) == ("R\n", "C\n", "K\n")
        assert "K\\n" not in repr(found)
    assert settings.resolve(environ=environ).certificate == ""
