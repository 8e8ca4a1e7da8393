"""A tenant's administrator asks everything there is to ask, and learns nothing of another tenant.

Everything that the other has carries a word that stands nowhere else. Calls that do not say the word never get it back; calls
that do get, for what is there, the very answer that they get for what is not.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from casemate_core.spec.access import Scope, Tenant, User
from casemate_core.spec.meta import Meta
from casemate_core.spec.secret import Secret
from casemate_manager.access import KINDS, RPCS, Permission, Principal
from casemate_manager.fleet.acts import Actor, By
from casemate_manager.fleet.commands import MakeAccessKey, NoteAct, OperateInstances
from casemate_manager.keyring import Keyring
from casemate_manager.vault import Vault
from casemate_wire.codec import resources
from casemate_wire.v1 import operators_pb2 as pb
from support.gatekeeping import POD, House, as_user, bind, hosted, house, of_tenant
from support.rpcs import Method, methods

#: Stands in everything of the other tenant, and nowhere else; and a word of the same length for what nobody has.
THERE, ABSENT = "zqfoe", "zqnil"
OWN = "own"
ANN = "ann"
KEYS = Keyring(b"k" * 32)
#: What a call may say where it does not say the word.
WORDS = {"verb": "restart", "action": "exec", "request_key": "a-key-of-a-request", "path": "environment", "change": 1}
#: Ends of names: an instance, a pod, a role binding, an access key.
ENDS = ("", "-0", "-0.web", "-there", "-ci", "-key")


def pod(word: str) -> dict[str, Any]:
    container = {**POD["spec"]["containers"][0], "env": [{"name": word.upper(), "value": word}]}
    return {**POD, "metadata": {"name": "web", "labels": {word: word}}, "spec": {"containers": [container]}}


async def furnish(found: House) -> None:
    """Two tenants; of the other everything that there can be, failures and refusals too."""
    vault = Vault(KEYS)
    for tenant in (OWN, THERE):
        meta = Meta("hello" if tenant == OWN else THERE, tenant, {f"l-{tenant}": tenant}, {f"a-{tenant}": tenant})
        made = of_tenant(tenant, meta.name, pods=(pod(tenant),), user_data=f"#!/bin/sh\n# {tenant}")
        large = of_tenant(tenant, f"{tenant}-large", memory_mib=1 << 20)
        await found.put(
            Tenant(Meta(tenant), {"cpus": 100_000}),
            replace(made, meta=meta),
            large,
            vault.seal(Secret(Meta(tenant, tenant), data={tenant: f"text of {tenant}"})),
            User(Meta(f"{tenant}-ci"), "service", tenant=tenant),
            bind(
                f"{tenant}-there", "tenant-admin", Scope(tenant), f"{tenant}-someone", ANN if tenant == OWN else "bob"
            ),
        )
        writer = found.manager.writer
        await writer.submit(MakeAccessKey(f"{tenant}-key", f"{tenant}-ci", "digest", tenant, 10_000_000))
        by = Actor(Principal(f"{tenant}-someone", "certificate"), f"ipv4:{tenant}", f"client-{tenant}", f"req-{tenant}")
        await writer.submit(By(by, NoteAct("denied", "denied", (f"environment/{tenant}/x",), (tenant,), tenant)))
    state = found.manager.writer.state
    async with asyncio.timeout(90):
        started = {"hello-0", f"{THERE}-0"}
        while not started <= {e.regarding.name for e in state.events.values() if e.reason == "Started"}:
            await asyncio.sleep(0.02)
    instance = next(i for i in state.instances.values() if i.meta.tenant == THERE and i.environment == THERE)
    order = OperateInstances("op", THERE, THERE, "restart", "s", by=f"{THERE}-someone")
    await found.manager.writer.submit(order)
    assert instance.meta.name == f"{THERE}-0"


def asked() -> Iterator[tuple[str, Method]]:
    """Every method that a user may call."""
    for name, method in sorted(methods().items()):
        if RPCS[name].permission not in (Permission.ANYONE, Permission.HOST) and "/HostAccess/" not in name:
            yield name, method


def filled(method: Method, name: str, tenant: str, kind: str) -> Any:
    """A request that says ``name`` wherever it has a text to say."""
    request = method.request()
    message = request.start if "start" in request.DESCRIPTOR.fields_by_name else request
    _fill(message, name, tenant, kind)
    return request


def _fill(message: Any, name: str, tenant: str, kind: str) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.name in ("resources", "selector", "page_token", "resume_token", "follow", "ticket", "public_key"):
            continue
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            value = {"tenant": tenant, "kind": kind, **{k: v for k, v in WORDS.items() if k != "change"}}
            setattr(message, field.name, value.get(field.name, name))
        elif field.name == "change":
            message.change = WORDS["change"]
        elif field.name == "target":
            _fill(message.target, name, tenant, kind)


async def answer(found: House, method: Method, request: Any, user: str = ANN) -> list[str]:
    """All that comes back: messages, and how it ends with its details."""
    call = method.of(found.channel)
    told: list[str] = []
    try:
        if method.streams_in:
            stream = call(metadata=as_user(user), timeout=60)
            await stream.write(request)
            await stream.done_writing()
        elif method.streams_out:
            stream = call(request, metadata=as_user(user), timeout=60)
        else:
            return [str(await call(request, metadata=as_user(user), timeout=60))]
        while (message := await stream.read()) is not grpc.aio.EOF:
            told.append(str(message))
            if getattr(message, "type", None) == pb.WatchEvent.BOOKMARK and isinstance(message, pb.WatchEvent):
                break
        stream.cancel()
    except grpc.aio.AioRpcError as error:
        told.append(f"{error.code()} {error.details()} {sorted(error.trailing_metadata() or {})!r}")
    return told


@asynccontextmanager
async def furnished(tmp_path: Path) -> AsyncIterator[House]:
    async with house(keyring=KEYS) as made, hosted(made, tmp_path, "h1"):
        await furnish(made)
        yield made


def requests(method: Method, names: tuple[str, ...], tenants: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    kinds = sorted(KINDS) if "kind" in method.request.DESCRIPTOR.fields_by_name else [""]
    for kind in kinds:
        for tenant in tenants:
            for name in names:
                yield f"{kind} {tenant} {name}", filled(method, name, tenant, kind)


async def test_who_does_not_say_the_word_never_hears_it(tmp_path: Path) -> None:
    """Own names, empty ones, all kinds: lists, watches, events, audit, why, logs, keys, refusals."""
    async with furnished(tmp_path) as found:
        words, seen = 0, ""
        for full, method in asked():
            for what, request in requests(method, ("", "hello", "hello-0", f"{OWN}-large"), (OWN, "")):
                told = await answer(found, method, request)
                words += len(told)
                seen += "".join(told)
                assert THERE not in "".join(told).lower(), f"{full} {what}"
        assert words > 300 and "client-own" in seen and "hello-0" in seen, "much was told"
        everything = [
            await answer(found, m, pb.ListRequest(kind="Event"), "root") for n, m in asked() if n.endswith("/List")
        ]
        assert THERE in str(everything), "the administrator of the platform does see it"


async def test_what_is_there_answers_as_what_is_not(tmp_path: Path) -> None:
    """Of every method, with every kind of name, in the own tenant and in the other."""
    async with furnished(tmp_path) as found:
        compared = 0
        for full, method in asked():
            pairs = {}
            for word in (THERE, ABSENT):
                names = tuple(word + end for end in ENDS)
                for what, request in requests(method, names, (word, OWN, "")):
                    told = [
                        t.replace(word, "WORD").replace(word.upper(), "WORD")
                        for t in await answer(found, method, request)
                    ]
                    pairs.setdefault(what.replace(word, "WORD"), []).append(told)
            for what, (there, absent) in pairs.items():
                compared += 1
                assert _timeless(there) == _timeless(absent), f"{full} {what}"
        assert compared > 1000


def _timeless(told: list[str]) -> list[str]:
    """Refusals as they are. Of what is told besides, whether the word is in it: times and revisions are new in each answer."""
    return [t if t.startswith("StatusCode") else f"answer {'WORD' in t}" for t in told]


@pytest.mark.parametrize(
    "field", ["secret of a variable", "secret of a volume", "image", "network", "archive", "label"]
)
async def test_an_object_that_names_what_another_has_is_refused_as_if_it_were_not_there(
    tmp_path: Path, field: str
) -> None:
    async with furnished(tmp_path) as found:
        told = []
        for word in (THERE, ABSENT):
            manifest = pod("own")
            made = of_tenant(OWN, "probe", pods=(manifest,))
            container = manifest["spec"]["containers"][0]
            match field:
                case "secret of a variable":
                    container["env"] = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": word, "key": word}}}]
                case "secret of a volume":
                    manifest["spec"]["volumes"] = [{"name": "v", "secret": {"secretName": word}}]
                case "image":
                    made = replace(made, spec=replace(made.spec, image=word))
                case "network":
                    made = of_tenant(OWN, "probe")
                case "archive":
                    made = replace(made, spec=replace(made.spec, archives=(word,)))
                case "label":
                    made = replace(made, meta=replace(made.meta, labels={f"l-{word}": word}))
            message = resources.to_message(made)
            if field == "network":
                message.environment.spec.nics[0].network = word
            request = pb.ApplyRequest(request_key=found.key(), dry_run=True, resources=[message])
            told.append(
                [t.replace(word, "WORD") for t in await answer(found, methods()["/casemate.v1.Fleet/Apply"], request)]
            )
        assert field == "label" or told[0] == told[1]
        assert THERE not in str(told)


async def test_selectors_and_pages_find_nothing_of_others(tmp_path: Path) -> None:
    async with furnished(tmp_path) as found:
        method = methods()["/casemate.v1.Fleet/List"]
        for kind in (
            "Environment",
            "Instance",
            "Pod",
            "Placement",
            "Secret",
            "Operation",
            "Event",
            "Tenant",
            "RoleBinding",
        ):
            for selector in ("", f"l-{THERE}={THERE}", f"l-{THERE}", f"!l-{OWN}"):
                for size in (1, 500):
                    request = pb.ListRequest(kind=kind, selector=selector, page_size=size)
                    while True:
                        page = await method.of(found.channel)(request, metadata=as_user(ANN), timeout=60)
                        assert THERE not in str(page).lower().replace(request.page_token.lower(), ""), (kind, selector)
                        if not page.next_page_token:
                            break
                        request.page_token = page.next_page_token
