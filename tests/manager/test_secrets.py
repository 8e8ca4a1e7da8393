"""Secrets: on the host that runs who names them, and nowhere else. Fifty canaries are looked for wherever text can go."""

import asyncio
import base64
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.domain.metadata import full_record, public_record
from casemate_agent.drivers.seed import seed_files
from casemate_core.errors import Conflict, InternalError, InvalidSpec
from casemate_core.spec.access import FLEET
from casemate_core.spec.instance import DesiredInstance, Phase
from casemate_core.spec.meta import Meta
from casemate_core.spec.secret import Secret, SecretText, check_secret, references, resolved
from casemate_manager.access import Principal
from casemate_manager.fleet import desired
from casemate_manager.keyring import Keyring
from casemate_manager.store.sqlite import SqliteStore
from casemate_manager.vault import Vault, WrongKey
from casemate_wire.codec import resources
from casemate_wire.session import HostEnd, Outbox
from casemate_wire.stream import Desired, FromHost, Hello, HostReport, Inventory, ToHost, Welcome
from casemate_wire.v1 import audit_pb2, audit_pb2_grpc
from casemate_wire.v1 import operators_pb2 as pb
from support.gatekeeping import bind, house
from support.small_fleet import SmallFleet, environment, image, network, told, topology

COUNT = 50
CANARIES = [f"canary-{n:02d}-{'kvothe' * 2}-{n * 7919:06x}" for n in range(COUNT)]
#: A canary, and the forms in which it could be hidden from a plain search.
FORMS = [
    form
    for canary in CANARIES
    for form in (
        canary.encode(),
        base64.b64encode(canary.encode())[:-4],
        canary.encode("utf-16-le"),
        canary.encode().hex().encode(),
        canary[::-1].encode(),
    )
]


def hits(data: bytes | str) -> int:
    raw = data.encode() if isinstance(data, str) else data
    return sum(form in raw for form in FORMS)


def pod(count: int = COUNT) -> dict[str, Any]:
    variables = [
        {"name": f"V{n}", "valueFrom": {"secretKeyRef": {"name": f"s{n // 10}", "key": f"k{n}"}}} for n in range(count)
    ]
    containers = [{"name": "c", "image": "x", "env": [*variables, {"name": "PLAIN", "value": "seen"}]}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"}, "spec": {"containers": containers}}


def secret(name: str, **texts: str) -> Secret:
    return Secret(Meta(name, "default"), data=texts)


# --- sealing ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(max_size=50), min_size=1, max_size=4))
def test_what_is_sealed_opens_with_its_key_alone_and_at_its_place_alone(texts: dict[str, str]) -> None:
    vault = Vault(Keyring(b"k" * 32))
    sealed = vault.seal(secret("s", **texts))
    assert not sealed.data and {k: vault.open(sealed, k) for k in texts} == texts
    assert vault.seal(secret("s", **texts)) == sealed  # the same request again is the same request
    for moved in (replace(sealed, meta=Meta("other", "default")), replace(sealed, meta=Meta("s", "elsewhere"))):
        with pytest.raises(InternalError):
            vault.open(moved, next(iter(texts)))
    with pytest.raises(InternalError):
        Vault(Keyring(b"o" * 32)).open(sealed, next(iter(texts)))


def test_another_key_file_is_found_at_the_start() -> None:
    sealed = Vault(Keyring(b"k" * 32)).seal(secret("s", a="b"))
    Vault(Keyring(b"k" * 32)).check([sealed])
    with pytest.raises(WrongKey, match="is it the key file that belongs to this store"):
        Vault(Keyring(b"o" * 32)).check([sealed])


def test_no_representation_and_no_violation_tells_a_text() -> None:
    bad = secret("Not A Name", **{"a b": CANARIES[0], "x": CANARIES[1] + "\0", "big": CANARIES[2] * 20_000})
    found = list(check_secret(bad))
    assert len(found) >= 4 and not hits("".join(map(str, found))) and not hits(repr(bad))


# --- in the fleet -----------------------------------------------------------------------------------------------------


def sealed_fleet() -> tuple[SmallFleet, Vault]:
    made, vault = SmallFleet(), Vault(Keyring(b"k" * 32))
    made.apply(image(), network())
    made.join("h1")
    made.apply(
        *(vault.seal(secret(f"s{n}", **{f"k{i}": CANARIES[i] for i in range(n * 10, n * 10 + 10)})) for n in range(5))
    )
    return made, vault


def test_a_pod_names_only_secrets_of_its_tenant_and_keys_that_are_there() -> None:
    made, _ = sealed_fleet()
    broken = pod(1)
    broken["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"] = {"name": "s0", "key": "nope"}
    with pytest.raises(InvalidSpec, match=r"secretKeyRef.key: 'nope' is not in secret s0; name one of k0"):
        made.apply(environment("a", pods=(broken,)))
    foreign = environment("a", pods=(pod(1),))
    with pytest.raises(InvalidSpec, match="'s0' is no secret of this tenant"):
        made.apply(replace(foreign, meta=Meta("a", "elsewhere")))
    with pytest.raises(InternalError, match="unsealed"):
        made.apply(secret("s9", a=CANARIES[0]))


def test_a_secret_in_use_is_neither_deleted_nor_robbed_of_a_key() -> None:
    made, vault = sealed_fleet()
    made.apply(environment("a", pods=(pod(),)))
    with pytest.raises(Conflict, match="used by environment default/a"):
        made.delete("Secret", "s0")
    with pytest.raises(InvalidSpec, match=r"spec.data\[k1\]: is named by environment a"):
        made.apply(vault.seal(secret("s0", k0="only")))
    made.delete("Environment", "a")
    made.obey("h1")
    made.delete("Secret", "s0")
    assert "default/s0" not in made.state.secrets and made.reload().secrets == made.state.secrets


def test_labels_change_without_the_texts_and_a_new_text_wakes_the_hosts_that_need_it() -> None:
    made, vault = sealed_fleet()
    made.apply(environment("a", pods=(pod(),)), environment("b"))
    made.obey("h1")
    before = made.state.secrets["default/s0"]
    answer = made.apply(Secret(Meta("s0", "default", {"team": "x"})), settle=False)
    assert answer.results[0].action == "changed" and made.state.secrets["default/s0"].sealed == before.sealed
    texts = {f"k{i}": CANARIES[i] for i in range(10)}
    same = made.apply(vault.seal(Secret(Meta("s0", "default", {"team": "x"}), data=texts)), settle=False)
    assert same.results[0].action == "unchanged"
    revision = made.state.revision
    changed = made.apply(
        vault.seal(Secret(Meta("s0", "default", {"team": "x"}), data={**texts, "k0": "new"})), settle=False
    )
    assert [c.path for c in changed.results[0].changes] == ["spec.fingerprints"]
    users = {i.meta.uid for i in made.state.instances.values() if i.environment == "a"}
    assert made.woken == {"h1": users}
    keep, _ = desired.since(made.state, "h1", revision)
    (again,) = [vault.revealed(made.state, instance) for instance in keep]
    assert again.secrets["s0/k0"].text == "new"
    given = resolved(again.pods[0], again.secrets)
    assert given["spec"]["containers"][0]["env"][0] == {"name": "V0", "value": "new"}


def test_what_a_host_keeps_beside_the_guest_has_no_text() -> None:
    """Neither the seed nor the domain's metadata, from which a lost ledger is rebuilt."""
    made, vault = sealed_fleet()
    made.apply(environment("a", pods=(pod(),)))
    keep, _ = desired.whole(made.state, "h1")
    (instance,) = [vault.revealed(made.state, one) for one in keep]
    assert hits(json.dumps([resolved(p, instance.secrets) for p in instance.pods])) >= COUNT
    assert not hits(repr(instance)) and not hits(full_record(instance))
    assert not hits(public_record(instance))
    assert not any(hits(data) for data in seed_files(instance, b"helper").values())


@given(st.data())
def test_resolving_touches_nothing_but_the_variables_that_name_a_secret(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 5))
    manifest = pod(count)
    values = {f"{s}/{k}": SecretText("f", data.draw(st.text(max_size=5))) for _, s, k in references((manifest,))}
    found = resolved(manifest, values)
    assert list(references((found,))) == []
    env = found["spec"]["containers"][0]["env"]
    assert [v["value"] for v in env[:count]] == [values[f"s{n // 10}/k{n}"].text for n in range(count)]
    assert env[count] == {"name": "PLAIN", "value": "seen"}
    assert manifest == pod(count)


# --- the canaries -----------------------------------------------------------------------------------------------------


class Pipe:
    """A host's stream in memory."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[FromHost | None] = asyncio.Queue()
        self.down: asyncio.Queue[ToHost] = asyncio.Queue()

    async def receive(self) -> FromHost | None:
        return await self.up.get()

    async def send(self, message: ToHost) -> None:
        self.down.put_nowait(message)


async def host(pipe: Pipe, seen: dict[str, DesiredInstance]) -> None:
    """Takes what it should have, and says that it has it."""
    end = HostEnd(Hello("h1", "boot", 0, 0, "digest", 1), Outbox())
    while True:
        for message in end.take():
            pipe.up.put_nowait(message)
        match end.receive(await pipe.down.get()):
            case Welcome():
                end.tell_inventory(Inventory("digest", topology()))
                end.whole([], HostReport())
            case Desired() as wanted:
                seen |= {i.uid: i for i in wanted.instances}
                end.persisted(wanted.revision)
                end.consumed()
                end.changed([told(uid, Phase.READY) for uid in seen], [])
            case _:
                pass


async def admin(context: Any) -> Principal:
    return Principal("root", "certificate")


async def test_fifty_canaries_are_on_their_host_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told_to_people: list[str] = []
    seen: dict[str, DesiredInstance] = {}
    manifest = tmp_path / "all.yaml"
    documents = [
        {
            "apiVersion": "casemate/v1",
            "kind": "Secret",
            "metadata": {"name": f"s{n}"},
            "spec": {"data": {f"k{i}": CANARIES[i] for i in range(n * 10, n * 10 + 10)}},
        }
        for n in range(5)
    ]
    made = resources.to_message(environment("a", pods=(pod(),)))
    from casemate_wire import manifest as forms

    documents.append(forms.to_plain(made))
    manifest.write_text("\n---\n".join(json.dumps(d) for d in documents))
    store = tmp_path / "store"
    store.mkdir()
    async with house(store=SqliteStore(store / "f.db"), authenticate=admin, keyring=Keyring.fresh()) as found:
        await found.put(bind("r", "platform-admin", FLEET, "root"))
        pipe = Pipe()
        tasks = [
            asyncio.create_task(found.manager.sessions.serve(pipe)),
            asyncio.create_task(host(pipe, seen)),
        ]

        async def casemate(*arguments: str) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-m", "casemate_cli", "--manager", f"127.0.0.1:{found.manager.port}", *arguments]
            environ = {**os.environ, "CASEMATE_INSECURE_LOOPBACK": "1"}
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60, check=False, env=environ
            )
            told_to_people.append(" ".join(command) + done.stdout + done.stderr)
            return done

        try:
            applied = await casemate("apply", "-f", str(manifest))
            assert applied.returncode == 0, applied.stderr
            async with asyncio.timeout(60):
                while not any(i.pods for i in seen.values() if i.environment == "a"):
                    await asyncio.sleep(0.02)
            # On the host, each of them.
            assert hits(json.dumps([s.text for i in seen.values() for s in i.secrets.values()])) >= COUNT
            # To people, in every form; and refusals of what is wrong with a secret.
            shown = await casemate("get", "secret", "s0", "-o", "yaml")
            assert re.search(r"k0: '?\"?[0-9a-f]{16}", shown.stdout)
            for arguments in (
                ("get", "secrets"),
                ("get", "secrets,env,inst,pods,placements,events", "-o", "json"),
                ("get", "pods", "-o", "yaml"),
                ("describe", "secret", "s0"),
                ("describe", "env", "a"),
                ("diff", "-f", str(manifest)),
                ("events",),
                ("audit", "-o", "json"),
                ("why", "a"),
            ):
                await casemate(*arguments)
            broken = resources.to_message(secret("BAD NAME", x=""))
            broken.secret.spec.data["bad key"] = CANARIES[3]
            broken.secret.spec.data["nul"] = CANARIES[4] + "\0"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await found.stub.Apply(pb.ApplyRequest(request_key="b", resources=[broken]))
            told_to_people.append(f"{refused.value!r} {refused.value.trailing_metadata()!r}")
            watch = found.stub.Watch(pb.WatchRequest(kind="Secret"), timeout=60)
            told_to_people += [repr((await watch.read()).SerializeToString()) for _ in range(5)]
            watch.cancel()
            audit = audit_pb2_grpc.AuditStub(found.channel).Records(audit_pb2.AuditRequest(), timeout=60)
            told_to_people.extend([str(message) async for message in audit])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        at_rest = [path.read_bytes() for path in store.iterdir()]
    at_rest += [path.read_bytes() for path in store.iterdir()]
    places = {
        "what people were told": sum(map(hits, told_to_people)),
        "the store's files": sum(map(hits, at_rest)),
        "the log": hits("\n".join(r.getMessage() + repr(r.args) for r in caplog.records)),
    }
    assert places == dict.fromkeys(places, 0)
    assert hits(manifest.read_bytes()) == COUNT, "the search finds what is there"
