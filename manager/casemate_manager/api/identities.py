"""Who calls, and the keys and tokens that programs call with. Secrets are made here, answered once, and kept nowhere."""

import hashlib
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc

from casemate_core.errors import InternalError, InvalidSpec, Violation, shown
from casemate_manager.access import DEVELOPMENT, Denied, Permission, scope_of_user
from casemate_manager.api.errors import unary
from casemate_manager.api.gate import caller
from casemate_manager.api.side import SessionLog
from casemate_manager.fleet.acts import Actor
from casemate_manager.fleet.commands import Answer, ChangeAccessKey, Command, KeyAnswer, MakeAccessKey, NoteAct
from casemate_manager.fleet.records import AccessKeyRecord
from casemate_manager.fleet.state import State
from casemate_manager.tokens import ShortTokens, full_key, secret_for
from casemate_wire.codec.basics import timestamp
from casemate_wire.v1 import identity_pb2 as pb
from casemate_wire.v1 import identity_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
KEY_LIFETIME_S: Final = 90 * 86400
TOKEN_LIFETIME_S: Final = 900
MAX_TOKEN_LIFETIME_S: Final = 3600
_CHANGES: Final = {
    pb.ChangeKeyRequest.DISABLE: "disable",
    pb.ChangeKeyRequest.ENABLE: "enable",
    pb.ChangeKeyRequest.DELETE: "delete",
}


class Core(Protocol):
    """What is asked of the manager."""

    @property
    def state(self) -> State: ...

    def sessions_of(self, by: Actor) -> SessionLog: ...

    async def submit(self, command: Command) -> Answer: ...


class IdentityService(identity_pb2_grpc.IdentityServicer):
    """casemate.v1.Identity."""

    def __init__(self, core: Core, short: ShortTokens, key: bytes, clock: Callable[[], float]) -> None:
        self._core = core
        self._secret_key = key
        self._short = short
        self._clock = clock

    @unary
    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        """Who the caller is, and what he may do."""
        grants = caller().grants
        answer = pb.WhoAmIResponse(
            user=grants.principal.name, how=grants.principal.how, groups=sorted(grants.principal.groups)
        )
        answer.roles.extend(pb.HeldRole(role=role, scope=str(scope)) for role, scope in grants.roles)
        if grants.principal == DEVELOPMENT:
            answer.roles.add(role="platform-admin", scope="fleet")
            answer.note = (
                "development mode: the connection is plain text on loopback, and whoever dials may do everything"
            )
        return answer

    @unary
    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.KeySecret:
        """A new access key; its secret is in this answer alone."""
        user = request.user or caller().actor.principal.name
        _check_request(request.request_key)
        secret, digest = secret_for(self._secret_key, "key", user, request.request_key)
        key_id = hashlib.sha256(f"{user}\0{request.request_key}".encode()).hexdigest()[:16]
        record = await self._key(
            MakeAccessKey(key_id, user, digest, request.description, request.lifetime_s or KEY_LIFETIME_S)
        )
        return pb.KeySecret(key=_shown(record), secret=full_key(key_id, secret))

    @unary
    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        """Access keys that the caller may look after."""
        state, grants = self._core.state, caller().grants
        keys = [
            record
            for record in state.access_keys.values()
            if (not request.user or record.user == request.user)
            and (
                record.user == grants.principal.name
                or grants.allows(Permission.GRANT, scope_of_user(state.users.get(record.user)))
            )
        ]
        return pb.ListKeysResponse(keys=[_shown(r) for r in sorted(keys, key=lambda r: (r.user, r.created_s, r.id))])

    @unary
    async def ChangeKey(self, request: pb.ChangeKeyRequest, context: Context) -> pb.AccessKey:
        """Disables, enables or deletes one."""
        change = _CHANGES.get(request.change, "")
        return _shown(await self._key(ChangeAccessKey(request.id, change)))

    @unary
    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.KeySecret:
        """A new secret for one."""
        _check_request(request.request_key)
        secret, digest = secret_for(self._secret_key, "rotate", request.id, request.request_key)
        record = await self._key(ChangeAccessKey(request.id, "rotate", digest, request.overlap_s))
        return pb.KeySecret(key=_shown(record), secret=full_key(record.id, secret))

    @unary
    async def IssueToken(self, request: pb.IssueTokenRequest, context: Context) -> pb.Token:
        """A token that ends by itself."""
        lifetime_s = request.lifetime_s or TOKEN_LIFETIME_S
        if not 0 < lifetime_s <= MAX_TOKEN_LIFETIME_S:
            raise InvalidSpec(
                (Violation("lifetimeS", str(lifetime_s), "is out of range", f"write 1 to {MAX_TOKEN_LIFETIME_S}"),)
            )
        state, principal = self._core.state, caller().actor.principal
        name = request.user or principal.name
        user = state.users.get(name)
        # A token gets no other one: else it would live for ever.
        own = name == principal.name and principal.how not in ("token", "development")
        if not own and not caller().grants.allows(Permission.GRANT, scope_of_user(user)):
            error = Denied(principal.name, Permission.GRANT, f"user {name}")
            await caller().on_denied(caller().actor, f"token of user/{name}", error)
            raise error
        if user is None or user.type != "service" or user.disabled:
            raise InvalidSpec(
                (Violation("user", name, "is not a service account that is enabled", "apply a User of type service"),)
            )
        await self._core.submit(NoteAct("token", "done", (f"user/{name}",), (user.tenant,) if user.tenant else ()))
        now_s = self._clock()
        return pb.Token(token=self._short.issue(name, now_s, lifetime_s), expires=timestamp(now_s + lifetime_s))

    async def _key(self, command: MakeAccessKey | ChangeAccessKey) -> AccessKeyRecord:
        answer = await self._core.submit(command)
        if not isinstance(answer, KeyAnswer):
            raise InternalError(f"an access key was answered with {type(answer).__name__}")
        return answer.key


def _check_request(key: str) -> None:
    if not 8 <= len(key) <= 128 or not key.isprintable():
        raise InvalidSpec((Violation("requestKey", shown(key), "is not 8 to 128 printable characters", "send a UUID"),))


def _shown(record: AccessKeyRecord) -> pb.AccessKey:
    return pb.AccessKey(
        id=record.id,
        user=record.user,
        description=record.description,
        created=timestamp(record.created_s),
        expires=timestamp(record.expires_s),
        disabled=record.disabled,
        rotated=timestamp(record.rotated_s),
        former_until=timestamp(record.former_until_s),
    )
