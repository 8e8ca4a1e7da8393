"""Files of secrets in a guest, by its real helper: in memory, whole, given again after a boot, gone with the pod."""

import asyncio
import json
import shutil
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.drivers.guest import GuestChannels
from casemate_agent.drivers.ports import GuestHello
from casemate_agent.guest.casemate_guest.secrets import take_files
from casemate_core.errors import CasemateError
from casemate_core.spec.secret import SecretText, resolved
from support.guest_bench import RealGuestBench, guest_bench, pod

TEXT = "canary-in-a-file-7919"


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[RealGuestBench]:
    async with guest_bench("real", tmp_path) as made:
        assert isinstance(made, RealGuestBench)
        yield made


def with_secret(text: str = TEXT, fingerprint: str = "f1", **spec: Any) -> dict[str, Any]:
    """A pod with a volume of a secret, as the host gives it."""
    manifest = pod("web", "sleep", "1000")
    items = [{"key": "a", "path": "auth/token", "mode": 0o400}, {"key": "b", "path": "plain"}]
    manifest["spec"]["volumes"] = [{"name": "tls", "secret": {"secretName": "s", "items": items, "defaultMode": 0o444}}]
    manifest["spec"]["containers"][0]["volumeMounts"] = [{"name": "tls", "mountPath": "/tls"}]
    manifest["spec"] |= spec
    return resolved(manifest, {"s/a": SecretText(fingerprint, text), "s/b": SecretText("f0", "other")})


def folder(guest: RealGuestBench) -> Path:
    return guest.root / "run/casemate/secrets/web/tls"


def kept(guest: RealGuestBench) -> str:
    """All that the helper, and podman for it, keep beside memory."""
    places = [guest.root / "var/lib/casemate", guest.root / "fake"]
    return "".join(p.read_text(errors="replace") for place in places for p in place.rglob("*") if p.is_file())


async def test_they_lie_in_memory_with_their_modes_and_nowhere_else(guest: RealGuestBench) -> None:
    await guest.apply("a", with_secret())
    await guest.ready("web")
    assert (folder(guest) / "auth/token").read_text() == TEXT and (folder(guest) / "plain").read_text() == "other"
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder(guest).rglob("*")}
    assert modes == {"auth": 0o755, "token": 0o400, "plain": 0o444}
    assert stat.S_IMODE(folder(guest).parent.stat().st_mode) == 0o700
    assert TEXT not in kept(guest), "found beside memory"
    (given,) = (guest.root / "fake/containers").glob("*/mounts.json")
    assert json.loads(given.read_text()) == [
        [{"name": "tls", "hostPath": {"path": str(folder(guest)), "type": "Directory"}}],
        [{"name": "tls", "mountPath": "/tls", "readOnly": True}],
    ]


async def test_a_changed_text_starts_the_pod_anew_and_an_equal_one_does_not(guest: RealGuestBench) -> None:
    await guest.apply("a", with_secret())
    first = (await guest.ready("web")).started_s
    await guest.apply("b", with_secret())
    await guest.until(lambda: guest.pods.revision == "b")
    assert guest.pods.pods[0].started_s == first
    await guest.apply("c", with_secret("rotated", "f2"))
    await guest.until(lambda: (p := guest.pod("web")) and p.ready and p.started_s > first)
    assert (folder(guest) / "auth/token").read_text() == "rotated"


async def test_they_are_gone_with_the_volume_and_with_the_pod(guest: RealGuestBench) -> None:
    await guest.apply("a", with_secret())
    first = (await guest.ready("web")).started_s
    await guest.apply("b", pod("web", "sleep", "1000"))
    second = await guest.until(lambda: (p := guest.pod("web")) and p.ready and p.started_s > first and p.started_s)
    assert not folder(guest).exists()
    await guest.apply("c", with_secret())
    await guest.until(lambda: (p := guest.pod("web")) and p.ready and p.started_s > second)
    assert folder(guest).exists()
    await guest.apply("d")
    await guest.until(lambda: not guest.pods.pods)
    assert not folder(guest).parent.exists()


async def test_after_a_boot_the_host_is_asked_for_them_and_the_pod_waits(guest: RealGuestBench) -> None:
    await guest.apply("a", with_secret())
    await guest.ready("web")
    assert guest.process is not None
    await guest.end_agent()
    guest.process.terminate()
    await guest.process.wait()
    await guest.kill("web")  # as a boot would, and only now: the helper would start it again
    shutil.rmtree(guest.root / "run/casemate/secrets")
    (guest.root / "guest.sock").unlink(missing_ok=True)
    shutil.rmtree(guest.root / "bin")
    await guest.boot()
    async with asyncio.timeout(60):
        while not (guest.root / "guest.sock").exists():
            await asyncio.sleep(0.01)
    guest.guests = GuestChannels()
    await guest.start_agent()
    hello = guest.last(GuestHello)
    assert hello is not None and guest.pods.revision == ""
    await guest.until(lambda: (p := guest.pod("web")) and p.reason == "SecretsMissing")
    await guest.apply("a", with_secret())
    await guest.until(lambda: guest.pods.revision == "a" and (p := guest.pod("web")) and p.ready)
    assert (folder(guest) / "auth/token").read_text() == TEXT


@pytest.mark.parametrize("path", ["../escape", "/etc/passwd", "a/../../b", "a//b", ""])
async def test_a_path_that_leaves_the_volume_is_refused_by_the_helper_too(guest: RealGuestBench, path: str) -> None:
    manifest = with_secret()
    manifest["spec"]["volumes"][0]["secret"]["files"] = [{"path": path, "mode": 0o400, "text": TEXT}]
    await guest.apply("a", manifest)
    await guest.until(lambda: (p := guest.pod("web")) and p.reason == "SecretFilesFailed")
    assert not [p for p in guest.root.rglob("*") if p.is_file() and TEXT in p.read_text(errors="replace")]


@pytest.mark.parametrize("secret", [{}, [], {"files": "x"}, {"files": [{"path": 1, "text": "x"}]}, {"files": [7]}])
async def test_what_is_no_volume_of_a_secret_is_refused_and_the_helper_lives(
    guest: RealGuestBench, secret: Any
) -> None:
    manifest = pod("web", "sleep", "1000")
    manifest["spec"]["volumes"] = [{"name": "tls", "secret": secret}]
    with pytest.raises(CasemateError):
        await guest.apply("a", manifest)
    await guest.apply("b", pod("web", "sleep", "1000"))
    await guest.ready("web")


def test_a_manifest_of_the_host_says_what_changed_and_not_to_what() -> None:
    volume = with_secret()["spec"]["volumes"][0]["secret"]
    other = with_secret("rotated", "f2")["spec"]["volumes"][0]["secret"]
    assert volume["fingerprint"] != other["fingerprint"]
    volume.pop("files")
    assert TEXT not in json.dumps(volume)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "secret", "files", "path", "text", "mode"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.sampled_from(["name", "secret", "hostPath"]), JSON, max_size=3), max_size=3))
def test_any_volumes_have_their_files_taken_out_or_are_refused(volumes: list[Any]) -> None:
    manifest = {"spec": {"volumes": volumes}}
    try:
        found = take_files(manifest)
    except (ValueError, KeyError, TypeError):
        return
    assert set(found) == {v["name"] for v in volumes if "secret" in v}
    assert not any("files" in v["secret"] for v in volumes if "secret" in v)
