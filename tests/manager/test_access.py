"""Who may do what: the table is whole, the matrix is read by people, and what is refused tells nothing of what is there."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.errors import NotFound
from casemate_core.spec.access import FLEET, ROLES, RoleBinding, Scope, Tenant, User, parse_scope
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.meta import TENANT_KINDS, Meta
from casemate_manager import access
from casemate_manager.access import KINDS, RPCS, Denied, Permission, Principal, Where, grants_of, refusal
from casemate_manager.api import gate
from casemate_manager.fleet.acts import Actor
from casemate_manager.fleet.commands import MakeAccessKey
from casemate_wire import schema, v1
from casemate_wire.codec import resources
from casemate_wire.v1 import (
    audit_pb2,
    channels_pb2,
    checkpoints_pb2,
    gpus_pb2,
    hostcare_pb2,
    identity_pb2,
    operations_pb2,
    seriallog_pb2,
    support_pb2,
    tickets_pb2,
    top_pb2,
)
from casemate_wire.v1 import operators_pb2 as pb
from support.gatekeeping import House, as_user, bind, house, of_tenant, ticket

OWN, FOREIGN = Scope("own"), Scope("foreign")


def services() -> list[str]:
    """Every method of every service of the schema."""
    files = {m.DESCRIPTOR.name: m.DESCRIPTOR for m in _modules()}
    return [
        f"/{service.full_name}/{method.name}"
        for file in files.values()
        for service in file.services_by_name.values()
        for method in service.methods
    ]


def _modules() -> list[Any]:
    return [
        importlib.import_module(f"casemate_wire.v1.{m.name}")
        for m in pkgutil.iter_modules(v1.__path__)
        if m.name.endswith("_pb2")
    ]


def test_every_rpc_of_every_service_has_a_row_and_no_row_is_left_over() -> None:
    ours = {name for name in RPCS if name.startswith("/casemate.")}
    assert sorted(services()) == sorted(ours), "add a row to casemate_manager.access.RPCS for each new RPC"


async def test_every_method_that_is_served_has_a_row() -> None:
    """Health and reflection included: asked from the server itself."""
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with house() as found:
        stub = reflection_pb2_grpc.ServerReflectionStub(found.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]), metadata=as_user("root"))
        answer = await call.read()
        names = {s.name for s in answer.list_services_response.service}
        call.cancel()
    with_tls = {"casemate.host.v1.Enrolment", "casemate.v1.HostAccess"}  # where they are served: test_tls
    assert names | with_tls == {row.split("/")[1] for row in RPCS}


def test_every_kind_has_a_row() -> None:
    assert set(KINDS) == set(schema.KIND_FIELDS)


def test_roles_are_those_of_the_schema() -> None:
    words = schema.words(
        schema.kind_descriptor("RoleBinding").fields_by_name["spec"].message_type.fields_by_name["role"]
    )
    assert set(words) == set(ROLES) == set(access.ROLES)


async def test_without_a_row_nobody_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "RPCS", {k: v for k, v in RPCS.items() if not k.endswith("/Version")})
    async with house() as found:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await found.stub.Version(pb.VersionRequest(), metadata=as_user("root"))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


# --- the matrix -------------------------------------------------------------------------------------------------------

#: Callers of the matrix: a role, and where it is bound.
CALLERS: dict[str, tuple[str, Scope] | None] = {
    "nobody": None,
    "viewer of one environment": ("viewer", Scope("own", "hello")),
    "console of one environment": ("console", Scope("own", "hello")),
    "viewer": ("viewer", OWN),
    "console": ("console", OWN),
    "operator": ("operator", OWN),
    "tenant-admin": ("tenant-admin", OWN),
    "viewer of the fleet": ("viewer", FLEET),
    "operator of the fleet": ("operator", FLEET),
    "platform-admin": ("platform-admin", FLEET),
}


def _environment(tenant: str) -> pb.Resource:
    message = resources.to_message(of_tenant(tenant, memory_mib=1024))
    message.environment.metadata.ClearField("uid")
    return message


def _applying(*messages: Any) -> Callable[[str, str], Any]:
    return lambda tenant, key: pb.ApplyRequest(
        request_key=key,
        dry_run=True,
        resources=[resources.to_message(m(tenant) if callable(m) else m) for m in messages],
    )


def _target(tenant: str) -> channels_pb2.ChannelTarget:
    return channels_pb2.ChannelTarget(tenant=tenant, instance="hello")


def _asking(tenant: str, action: str) -> tickets_pb2.TicketRequest:
    return tickets_pb2.TicketRequest(tenant=tenant, instance="hello", action=action)


#: What is called, and with what: method, and a request from (tenant, request key).
CALLS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "Apply Environment": ("Apply", lambda t, k: pb.ApplyRequest(request_key=k, resources=[_environment(t)])),
    "Apply Tenant": ("Apply", _applying(lambda t: Tenant(Meta(t), {"cpus": 1000}))),
    "Apply User": ("Apply", _applying(User(Meta("new")))),
    "Apply RoleBinding": ("Apply", _applying(lambda t: bind(f"{t}-new", "viewer", Scope(t), "new"))),
    "Get Environment": ("Get", lambda t, k: pb.GetRequest(kind="Environment", tenant=t, name="hello")),
    "Get Tenant": ("Get", lambda t, k: pb.GetRequest(kind="Tenant", name=t)),
    "Get Network": ("Get", lambda t, k: pb.GetRequest(kind="Network", name="default")),
    "Get RoleBinding": ("Get", lambda t, k: pb.GetRequest(kind="RoleBinding", name=f"{t}-there")),
    "List Environment": ("List", lambda t, k: pb.ListRequest(kind="Environment", tenant=t)),
    "List Host": ("List", lambda t, k: pb.ListRequest(kind="Host")),
    "List User": ("List", lambda t, k: pb.ListRequest(kind="User")),
    "Watch Environment": ("Watch", lambda t, k: pb.WatchRequest(kind="Environment", tenant=t)),
    "Delete Environment": (
        "Delete",
        lambda t, k: pb.DeleteRequest(request_key=k, kind="Environment", tenant=t, name="hello", uid="other"),
    ),
    "Delete Image": ("Delete", lambda t, k: pb.DeleteRequest(request_key=k, kind="Image", name="debian")),
    "Operate": (
        "Operate",
        lambda t, k: operations_pb2.OperateRequest(request_key=k, tenant=t, name="hello", verb="restart", uid="other"),
    ),
    "Logs": ("Logs", lambda t, k: pb.LogsRequest(tenant=t, instance="hello")),
    "Exec": (
        "Exec",
        lambda t, k: pb.ExecInput(start=pb.ExecStart(tenant=t, instance="hello", guest=True, argv=["id"])),
    ),
    "Events": ("Events", lambda t, k: pb.EventsRequest(tenant=t)),
    "Explain": ("Explain", lambda t, k: pb.ExplainRequest(path="environment")),
    "Why": ("Why", lambda t, k: pb.WhyRequest(tenant=t, environment="hello")),
    "Top": ("Top", lambda t, k: top_pb2.TopRequest()),
    "Version": ("Version", lambda t, k: pb.VersionRequest()),
    "Audit": ("Audit/Records", lambda t, k: audit_pb2.AuditRequest(tenant=t)),
    "Support": ("Support/Collect", lambda t, k: support_pb2.CollectRequest(host_timeout_s=1.0)),
    "Fsck": ("HostCare/Fsck", lambda t, k: hostcare_pb2.FsckRequest(host="h1", repair=True, timeout_s=1.0)),
    "Order GPU": ("Gpus/Order", lambda t, k: gpus_pb2.OrderGpuRequest(request_key=k, gpu="GPU-1", verb="fly")),
    "Audit Ends": ("Audit/Ends", lambda t, k: audit_pb2.AuditEndsRequest()),
    "Witnesses": ("Audit/Witnesses", lambda t, k: checkpoints_pb2.WitnessesRequest(host_timeout_s=1.0)),
    "WhoAmI": ("Identity/WhoAmI", lambda t, k: identity_pb2.WhoAmIRequest()),
    "CreateKey": (
        "Identity/CreateKey",
        lambda t, k: identity_pb2.CreateKeyRequest(request_key=f"{k}-request", user=f"{t}-ci"),
    ),
    "ListKeys": ("Identity/ListKeys", lambda t, k: identity_pb2.ListKeysRequest(user=f"{t}-ci")),
    "ChangeKey": (
        "Identity/ChangeKey",
        lambda t, k: identity_pb2.ChangeKeyRequest(id=f"{t}-key", change=identity_pb2.ChangeKeyRequest.ENABLE),
    ),
    "RotateKey": (
        "Identity/RotateKey",
        lambda t, k: identity_pb2.RotateKeyRequest(request_key=f"{k}-request", id=f"{t}-key"),
    ),
    "IssueToken": ("Identity/IssueToken", lambda t, k: identity_pb2.IssueTokenRequest(user=f"{t}-ci")),
    "Admit console": ("Channels/Admit", lambda t, k: _asking(t, "console")),
    "Admit exec": ("Channels/Admit", lambda t, k: _asking(t, "exec")),
    "Console": ("Channels/Console", lambda t, k: channels_pb2.ConsoleInput(start=_target(t))),
    "ConsoleLog": ("Channels/ConsoleLog", lambda t, k: seriallog_pb2.ConsoleLogRequest(tenant=t, instance="hello")),
    "Forward": (
        "Channels/Forward",
        lambda t, k: channels_pb2.ForwardInput(start=channels_pb2.ForwardStart(target=_target(t), port=80)),
    ),
    "Copy": (
        "Channels/Copy",
        lambda t, k: channels_pb2.CopyInput(start=channels_pb2.CopyStart(target=_target(t), path="/x")),
    ),
    "Authorize": (
        "Channels/Authorize",
        lambda t, k: channels_pb2.AuthorizeRequest(target=_target(t), public_key="ssh-ed25519 AAAA"),
    ),
}


def _needs_tls(name: str) -> bool:
    """Services that a manager without certificates does not have: judged by the gate alone, below."""
    return name.startswith("/casemate.v1.HostAccess/")


SERVER_STREAMS = (
    "Watch",
    "Events",
    "Logs",
    "Audit/Records",
    "Channels/ConsoleLog",
    "Support/Collect",
    "Audit/Witnesses",
)
BOTH_STREAM = ("Exec", "Channels/Console", "Channels/Forward", "Channels/Copy")


def _full(method: str) -> str:
    return f"/casemate.v1.{method if '/' in method else f'Fleet/{method}'}"


def _callable(found: House, method: str) -> Any:
    """The method of the stub of its service."""
    service, _, name = _full(method).rpartition("/")
    (stub,) = [
        getattr(importlib.import_module(f"{m.__name__}_grpc"), f"{d.name}Stub")
        for m in _modules()
        for d in m.DESCRIPTOR.services_by_name.values()
        if f"/{d.full_name}" == service
    ]
    return getattr(stub(found.channel), name)


WORDS = {
    grpc.StatusCode.PERMISSION_DENIED: "denied",
    grpc.StatusCode.NOT_FOUND: "not found",
    grpc.StatusCode.UNAUTHENTICATED: "who?",
}


async def call(found: House, name: str, user: str, tenant: str) -> str:
    """What becomes of a call: ``ok`` (also where it fails for what is asked, not for who asks), or how it is refused."""
    method, make = CALLS[name]
    request = make(tenant, found.key())
    call = _callable(found, method)
    if action := RPCS[_full(method)].ticket:
        gate._target(request).ticket = await ticket(found, action, user, tenant)
    try:
        if method in SERVER_STREAMS:
            stream = call(request, metadata=as_user(user), timeout=60)
            answer = await stream.read()
            await _end(stream)
            return "nothing" if answer is grpc.aio.EOF or not _tells(answer) else "ok"
        if method in BOTH_STREAM:
            stream = call(metadata=as_user(user), timeout=60)
            await stream.write(request)
            await stream.done_writing()
            await stream.read()
            await _end(stream)
            return "ok"
        answer = await call(request, metadata=as_user(user), timeout=60)
        empty = (isinstance(answer, pb.ListResponse) and not answer.resources) or (
            isinstance(answer, identity_pb2.ListKeysResponse) and not answer.keys
        )
        return "nothing" if empty else "ok"
    except grpc.aio.AioRpcError as error:
        return WORDS.get(error.code(), "ok")


async def judged(found: House, name: str, user: str) -> str:
    """What the gate says to a call whose service is not there."""
    state = found.manager.writer.state

    async def noted(by: Any, what: str, error: Any, tenants: tuple[str, ...] = ()) -> None:
        pass

    judge = gate.Gate(lambda: state, gate.by_certificate, noted, lambda: 0.0, lambda: "id")
    asking = gate.Caller(Actor(Principal(user, "certificate")), lambda: state, frozenset(), noted)
    try:
        await judge._judge(asking, name, RPCS[name], None)
    except Denied:
        return "denied"
    assert RPCS[name].where is Where.FLEET
    return "ok"


async def _end(stream: Any) -> None:
    stream.cancel()
    await stream.code()


def _tells(answer: Any) -> bool:
    return not isinstance(answer, pb.WatchEvent) or answer.type == pb.WatchEvent.ADDED


async def test_the_matrix_of_rpc_role_and_tenant(golden: Callable[[str, str], None]) -> None:
    """Every RPC, by every role, in the own and in a foreign tenant. Read the table before it is committed."""
    assert {_full(m) for m, _ in CALLS.values()} >= {
        name
        for name, row in RPCS.items()
        if name.startswith("/casemate.v1.") and row.permission is not Permission.ANYONE and not _needs_tls(name)
    }, "a new RPC needs a call in the matrix"
    async with house() as found:
        await found.put(
            Tenant(Meta("own")),
            Tenant(Meta("foreign")),
            User(Meta("someone")),
            User(Meta("own-ci"), "service", tenant="own"),
            User(Meta("foreign-ci"), "service", tenant="foreign"),
            Host(Meta("h1"), HostSpec()),
            bind("own-there", "viewer", OWN, "x"),
            bind("foreign-there", "viewer", FOREIGN, "x"),
            *(bind(f"m-{i}", of[0], of[1], f"user-{i}") for i, of in enumerate(CALLERS.values()) if of is not None),
        )
        for tenant in ("own", "foreign"):
            key = MakeAccessKey(f"{tenant}-key", f"{tenant}-ci", "digest", "", 10_000_000)
            await found.manager.writer.submit(key)
        rows = []
        for i, caller in enumerate(CALLERS):
            for name in CALLS:
                own, foreign = [await call(found, name, f"user-{i}", tenant) for tenant in ("own", "foreign")]
                rows.append(f"{caller:27} {name:19} {own:10} {foreign}")
        for i, caller in enumerate(CALLERS):
            rows += [
                f"{caller:27} {name.rpartition('/')[2]:19} {await judged(found, name, f'user-{i}')}"
                for name in filter(_needs_tls, RPCS)
            ]
    golden("access/matrix.txt", "\n".join(row.rstrip() for row in rows) + "\n")


async def test_the_foreign_column_is_the_same_for_what_is_there_and_what_is_not() -> None:
    """A caller of one tenant learns nothing of another: every answer equals the one about a tenant that nobody made."""
    async with house() as found:
        await found.put(
            bind("m", "tenant-admin", OWN, "ann"),
            bind("foreign-there", "viewer", FOREIGN, "x"),
            User(Meta("foreign-ci"), "service", tenant="foreign"),
        )
        await found.manager.writer.submit(MakeAccessKey("foreign-key", "foreign-ci", "digest", "", 10_000_000))
        for name in CALLS:
            if name in ("Apply Tenant", "Apply User"):
                continue
            there, not_there = [await _whole(found, name, "ann", tenant) for tenant in ("foreign", "absents")]
            assert there == not_there, name


async def _whole(found: House, name: str, user: str, tenant: str) -> tuple[object, str]:
    method, make = CALLS[name]
    request = make(tenant, "key-of-nobody")
    call = _callable(found, method)
    try:
        if method in (*SERVER_STREAMS, *BOTH_STREAM):
            if method in BOTH_STREAM:
                stream = call(metadata=as_user(user), timeout=60)
                await stream.write(request)
            else:
                stream = call(request, metadata=as_user(user), timeout=60)
            answer = await stream.read()
            await _end(stream)
        else:
            answer = await call(request, metadata=as_user(user), timeout=60)
        return "ok", str(answer).replace(tenant, "T")
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details()).replace(tenant, "T")


# --- leaks ------------------------------------------------------------------------------------------------------------


async def test_lists_and_watches_hold_only_what_the_caller_may_see() -> None:
    async with house() as found:
        await found.put(
            bind("a", "viewer", OWN, "ann"),
            bind("b", "viewer", Scope("own", "hello"), "bob"),
            of_tenant("own", "other"),
        )
        seen = {}
        for user in ("ann", "bob", "root"):
            answer = await found.stub.List(pb.ListRequest(kind="Environment"), metadata=as_user(user))
            seen[user] = sorted((r.environment.metadata.tenant, r.environment.metadata.name) for r in answer.resources)
        assert seen["ann"] == [("own", "hello"), ("own", "other")]
        assert seen["bob"] == [("own", "hello")]
        assert len(seen["root"]) == 3
        stream = found.stub.Watch(pb.WatchRequest(kind="Environment"), metadata=as_user("bob"), timeout=60)
        assert (await stream.read()).resource.environment.metadata.name == "hello"
        assert (await stream.read()).type == pb.WatchEvent.BOOKMARK
        await found.put(of_tenant("foreign", "secretive"), of_tenant("own", "another"))
        await found.put(of_tenant("own", "hello", memory_mib=1024))
        while True:
            event = await stream.read()
            if event.HasField("resource"):
                assert event.resource.environment.metadata.name == "hello"
                if event.resource.environment.spec.memory.size == "1Gi":
                    break
        stream.cancel()


async def test_a_role_that_is_taken_away_closes_a_watch_that_is_open() -> None:
    async with house() as found:
        # the other role keeps the watch itself open
        await found.put(bind("a", "viewer", OWN, "ann"), bind("b", "viewer", Scope("own", "other"), "ann"))
        stream = found.stub.Watch(pb.WatchRequest(kind="Environment"), metadata=as_user("ann"), timeout=60)
        assert (await stream.read()).type == pb.WatchEvent.ADDED
        assert (await stream.read()).type == pb.WatchEvent.BOOKMARK
        request = pb.DeleteRequest(request_key="d", kind="RoleBinding", name="a")
        await found.stub.Delete(request, metadata=as_user("root"))
        await found.put(of_tenant("own", "hello", memory_mib=2048))
        event = await stream.read()
        assert event.type == pb.WatchEvent.DELETED and not event.resource.environment.HasField("spec")
        stream.cancel()


async def test_a_tenant_is_not_told_what_others_use_of_shared_things() -> None:
    async with house() as found:
        await found.put(bind("a", "tenant-admin", OWN, "ann"))
        for kind, field in (("Image", "image"), ("Network", "network")):
            request = pb.GetRequest(kind=kind, name={"Image": "debian", "Network": "default"}[kind])
            ann = await found.stub.Get(request, metadata=as_user("ann"))
            root = await found.stub.Get(request, metadata=as_user("root"))
            assert not getattr(ann, field).HasField("status") and getattr(root, field).HasField("status")
        events = found.stub.Events(pb.EventsRequest(), metadata=as_user("ann"), timeout=60)
        assert {e.regarding.tenant async for e in events} == {"own"}


async def test_a_group_of_the_identity_provider_can_be_bound() -> None:
    async with house() as found:
        await found.put(bind("a", "viewer", OWN, "group:ran"))
        request = pb.GetRequest(kind="Environment", tenant="own", name="hello")
        await found.stub.Get(request, metadata=as_user("zoe", x_groups="ran,other"))
        with pytest.raises(grpc.aio.AioRpcError):
            await found.stub.Get(request, metadata=as_user("zoe", x_groups="other"))


async def test_who_is_disabled_may_nothing() -> None:
    async with house() as found:
        await found.put(bind("a", "platform-admin", FLEET, "ann"), User(Meta("ann"), disabled=True))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await found.stub.Top(top_pb2.TopRequest(), metadata=as_user("ann"))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_tenants_admin_gives_roles_in_his_tenant_and_nowhere_else() -> None:
    async with house() as found:
        await found.put(bind("a", "tenant-admin", OWN, "ann"), bind("own-trap", "viewer", FOREIGN, "x"))

        async def give(name: str, role: str, scope: Scope) -> grpc.StatusCode:
            message = resources.to_message(bind(name, role, scope, "bob"))
            request = pb.ApplyRequest(request_key=found.key(), resources=[message])
            try:
                await found.stub.Apply(request, metadata=as_user("ann"))
            except grpc.aio.AioRpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            return grpc.StatusCode.OK

        assert await give("own-bob", "tenant-admin", OWN) is grpc.StatusCode.OK
        assert await give("own-bob-2", "console", Scope("own", "hello")) is grpc.StatusCode.OK
        assert await give("bob", "viewer", OWN) is grpc.StatusCode.INVALID_ARGUMENT
        assert await give("foreign-bob", "viewer", FOREIGN) is grpc.StatusCode.PERMISSION_DENIED
        assert await give("own-bob", "platform-admin", FLEET) is grpc.StatusCode.PERMISSION_DENIED
        assert await give("own-trap", "viewer", OWN) is grpc.StatusCode.PERMISSION_DENIED
        assert found.manager.writer.state.role_bindings["own-trap"].scope == FOREIGN


async def test_errors_carry_nothing_of_what_is_hidden() -> None:
    async with house() as found:
        await found.put(bind("a", "viewer", OWN, "ann"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await found.stub.Why(pb.WhyRequest(tenant="foreign", environment="hello"), metadata=as_user("ann"))
        status = rpc_status.from_call(refused.value)
        info = error_details_pb2.ResourceInfo()
        assert any(d.Unpack(info) for d in status.details)
        assert (info.resource_type, info.resource_name) == ("Environment", "hello")
        assert "foreign" not in str(status)


async def test_in_development_mode_whoever_dials_is_the_administrator() -> None:
    async with house(authenticate=gate.by_certificate) as found:
        assert await found.stub.Top(top_pb2.TopRequest())


# --- the pure part ----------------------------------------------------------------------------------------------------

scopes = st.sampled_from([FLEET, OWN, FOREIGN, Scope("own", "hello"), Scope("own", "other"), Scope("foreign", "hello")])
bindings = st.builds(
    lambda i, role, scope: RoleBinding(Meta(f"b{i}"), role, ("u",), scope),
    st.integers(0, 9),
    st.sampled_from(ROLES),
    scopes,
)


@given(st.lists(bindings, max_size=5), st.sampled_from(list(Permission)), scopes)
def test_allowed_is_what_some_binding_allows(
    given_bindings: list[RoleBinding], permission: Permission, scope: Scope
) -> None:
    """Against a dumb twin on sets of names."""
    grants = grants_of(Principal("u", "key"), {"u": {b.meta.name: b for b in given_bindings}}, {})
    mine = {b.meta.name: b for b in given_bindings}.values()

    def inside(b: RoleBinding) -> bool:
        wide, narrow = str(b.scope).split("/"), str(scope).split("/")
        return wide == ["fleet"] or wide[1:] == narrow[1 : len(wide)]

    expected = any(permission in access.ROLES[b.role] and inside(b) for b in mine)
    if permission is Permission.USE:
        expected = bool(mine)
    if permission in (Permission.ANYONE, Permission.SIGNED_IN):
        expected = True
    assert grants.allows(permission, scope) == expected


@given(scopes)
def test_scopes_are_read_as_they_are_written(scope: Scope) -> None:
    assert parse_scope(str(scope)) == scope


def test_a_refusal_tells_who_may_read_what_he_may_not_do_and_others_nothing() -> None:
    viewer = grants_of(Principal("v", "key"), {"v": {"b": bind("b", "viewer", OWN, "v")}}, {})
    assert isinstance(refusal(viewer, Permission.EXEC, OWN, "Environment", "hello"), Denied)
    assert isinstance(refusal(viewer, Permission.EXEC, FOREIGN, "Environment", "hello"), NotFound)


def test_only_hosts_and_strangers_pass_without_a_scope_or_a_sign_in() -> None:
    open_rows = {name for name, row in RPCS.items() if row.permission in (Permission.ANYONE, Permission.HOST)}
    assert all(name.startswith(("/grpc.health.", "/casemate.host.")) for name in open_rows)
    assert all(
        row.where is not Where.NOWHERE or row.permission in (Permission.ANYONE, Permission.SIGNED_IN, Permission.HOST)
        for row in RPCS.values()
    )


@pytest.mark.parametrize("kind", sorted(TENANT_KINDS - {"Event"}))
def test_parts_of_an_environment_are_in_its_scope(kind: str) -> None:
    names = {"Environment": "a-b", "Instance": "a-b-0", "Placement": "a-b-0", "Pod": "a-b-0.web"}
    if kind in names:
        assert access.scope_of(kind, "t", names[kind]) == Scope("t", "a-b")
    else:
        assert access.scope_of(kind, "t", "x") == Scope("t")


def test_the_manager_settings_name_administrators() -> None:
    grants = grants_of(Principal("admin", "certificate"), {}, {}, frozenset({"admin"}))
    assert grants.allows(Permission.MANAGE)
    assert not grants_of(Principal("admins", "certificate"), {}, {}, frozenset({"admin"})).roles
