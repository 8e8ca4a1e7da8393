"""The services of joining: for machines that have no certificate yet, and for operators who let them in.

Nothing is decided here: the fleet says whether a token or a key is good, and commits it; then, and only then, a certificate
is signed. How many requests are worked on at once is bounded, for here anyone may call.
"""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable
from typing import Any, Final

import grpc

from casemate_core.errors import (
    CallerError,
    Conflict,
    InternalError,
    InvalidSpec,
    NotFound,
    Unavailable,
    Violation,
    shown,
)
from casemate_core.spec.fleet import Taint
from casemate_manager import pki
from casemate_manager.api.errors import unary
from casemate_manager.api.tls import ServerTls
from casemate_manager.authority import Authorities, Retired
from casemate_manager.fleet.commands import (
    Answer,
    Command,
    CreateToken,
    Enrolled,
    NoteAct,
    RenewEnrolment,
    RevokeHost,
    RevokeToken,
    TokenMade,
    UseToken,
)
from casemate_manager.fleet.enrolment import TOKEN_S, digest_of
from casemate_manager.fleet.records import HostLimits, TokenRecord
from casemate_manager.fleet.state import State
from casemate_wire.codec.basics import timestamp
from casemate_wire.token import Token
from casemate_wire.v1 import enrolment_pb2, enrolment_pb2_grpc, join_pb2_grpc
from casemate_wire.v1 import join_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]
log = logging.getLogger("casemate.enrolment")

#: Requests for certificates that are worked on at once, and that wait.
AT_ONCE: Final = 32
WAITING: Final = 4096


class Joining:
    """What both services stand on. ``session_port`` and ``enrolment_port`` are told to machines and operators."""

    def __init__(
        self,
        submit: Callable[[Command], Any],
        state: Callable[[], State],
        tls: ServerTls,
        clock: Callable[[], float],
        seed: Callable[[], str],
    ) -> None:
        self.submit = submit
        self.state = state
        self.tls = tls
        self.clock = clock
        self.seed = seed
        self.session_port = 0
        self.enrolment_port = 0

    @property
    def authorities(self) -> Authorities:
        """Who signs, and who is trusted."""
        return self.tls.authorities


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServicer):
    """casemate.host.v1.Enrolment."""

    def __init__(self, joining: Joining) -> None:
        self._joining = joining
        self._places = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    @unary
    async def Roots(self, request: enrolment_pb2.RootsRequest, context: Context) -> enrolment_pb2.RootsResponse:
        """Certificates of the authorities."""
        return enrolment_pb2.RootsResponse(roots=self._joining.authorities.roots)

    @unary
    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.Certificates:
        """Become the host that a token names."""

        sealing = request.sealing_key
        if len(sealing) not in (0, pki.SEALING_BYTES):
            remedy = f"send the {pki.SEALING_BYTES} of X25519, or none"
            raise InvalidSpec((Violation("sealingKey", "", f"has {len(sealing)} bytes", remedy),))

        def command(key: str, authority: str, expires_s: float) -> Command:
            seed = self._joining.seed()
            return UseToken(request.token, request.secret, key, authority, expires_s, seed, sealing.hex())

        return await self._certificate(context, f"token {shown(request.token)}", request.certificate_request, command)

    @unary
    async def Renew(self, request: enrolment_pb2.RenewRequest, context: Context) -> enrolment_pb2.Certificates:
        """A fresh certificate for the bound key."""

        def command(key: str, authority: str, expires_s: float) -> Command:
            return RenewEnrolment(request.host, key, authority, expires_s)

        return await self._certificate(context, f"host {shown(request.host)}", request.certificate_request, command)

    async def _certificate(
        self, context: Context, who: str, request: bytes, command: Callable[[str, str, float], Command]
    ) -> enrolment_pb2.Certificates:
        """Ask the fleet, and sign after its commit."""
        if self._waiting >= WAITING:
            raise Unavailable("too many machines ask for certificates: try again")
        self._waiting += 1
        try:
            async with self._places:
                joining = self._joining
                key = pki.read_request(request)
                now_s, signing = joining.clock(), joining.authorities.signing
                answer: Answer = await joining.submit(command(pki.key_id(key), signing.pin, now_s + pki.HOST_S))
        except CallerError as error:
            log.warning("no certificate for %s at %s: %s", who, context.peer(), str(error))
            raise
        finally:
            self._waiting -= 1
        if not isinstance(answer, Enrolled):
            raise InternalError(f"enrolment was answered with {type(answer).__name__}")
        certificate = pki.sign_client(signing, key, "host", answer.host, now_s, pki.HOST_S)
        return enrolment_pb2.Certificates(
            host=answer.host,
            certificate=pki.pem(certificate),
            roots=joining.authorities.roots,
            not_before=now_s,
            not_after=now_s + pki.HOST_S,
            session_port=joining.session_port,
        )


class HostAccess(join_pb2_grpc.HostAccessServicer):
    """casemate.v1.HostAccess."""

    def __init__(self, joining: Joining) -> None:
        self._joining = joining

    @unary
    async def CreateHostToken(self, request: pb.CreateHostTokenRequest, context: Context) -> pb.CreateHostTokenResponse:
        """A token, with its secret."""
        joining = self._joining
        # Named by the request, so that a repeat makes no second one.
        name = hashlib.sha256((request.request_key or joining.seed()).encode()).hexdigest()[:12]
        secret = secrets.token_urlsafe(24)
        command = CreateToken(
            name,
            request.host,
            digest_of(secret),
            request.life_s or TOKEN_S,
            dict(request.labels),
            tuple(Taint(t.key, t.value, t.effect or "NoSchedule") for t in request.taints),
            HostLimits(request.max_threads, request.max_memory_mib, request.max_gpus),
        )
        record = self._made(await joining.submit(command))
        token = Token(name, secret, record.host, joining.authorities.signing.pin)
        return pb.CreateHostTokenResponse(
            token=self._shown(record), secret=str(token), enrolment_port=joining.enrolment_port
        )

    @unary
    async def ListHostTokens(self, request: pb.ListHostTokensRequest, context: Context) -> pb.ListHostTokensResponse:
        """Tokens, newest first."""
        records = sorted(self._joining.state().tokens.values(), key=lambda t: (-t.created_s, t.token))
        return pb.ListHostTokensResponse(tokens=map(self._shown, records))

    @unary
    async def RevokeHostToken(self, request: pb.RevokeHostTokenRequest, context: Context) -> pb.HostToken:
        """Take a token back."""
        return self._shown(self._made(await self._joining.submit(RevokeToken(request.id))))

    @unary
    async def RevokeHost(self, request: pb.RevokeHostRequest, context: Context) -> pb.RevokeHostResponse:
        """End a host's identity."""
        await self._joining.submit(RevokeHost(request.host))
        return pb.RevokeHostResponse(host=request.host)

    @unary
    async def ListAuthorities(self, request: pb.ListAuthoritiesRequest, context: Context) -> pb.ListAuthoritiesResponse:
        """The authorities, oldest first."""
        return pb.ListAuthoritiesResponse(authorities=map(self._authority, self._joining.authorities.every))

    @unary
    async def RollAuthority(self, request: pb.RollAuthorityRequest, context: Context) -> pb.Authority:
        """Begin a new authority."""
        await self._write_down("roll authority", request.pin)
        return self._authority(self._joining.authorities.roll(request.pin, self._joining.clock()))

    @unary
    async def RetireAuthority(self, request: pb.RetireAuthorityRequest, context: Context) -> pb.Authority:
        """Trust an older authority no more."""
        _, good = self._signed(request.pin)
        signs = request.pin == self._joining.authorities.signing.pin  # refused by itself, with another remedy
        if good and not signs and not request.force:
            raise Conflict(
                f"{good} hosts have certificates of that authority that are still good:"
                " wait until they have renewed (at most a day), or force it and they renew when they dial again"
            )
        await self._write_down("retire authority", request.pin, "forced" if request.force else "")
        return self._authority(self._joining.authorities.retire(request.pin))

    async def _write_down(self, act: str, pin: str, detail: str = "") -> None:
        """Authorities are files beside the store: the act is committed to the audit before it is done, or is not done."""
        if not any(pki.pin_of(a.certificate) == pin for a in self._joining.authorities.every):
            raise NotFound("authority", pin)
        await self._joining.submit(NoteAct(act, "begun", (f"authority/{pin[:16]}",), (), detail))

    def _made(self, answer: Answer) -> TokenRecord:
        if not isinstance(answer, TokenMade):
            raise InternalError(f"a token was answered with {type(answer).__name__}")
        return answer.record

    def _shown(self, record: TokenRecord) -> pb.HostToken:
        if record.used_s:
            state = "Used"
        elif record.revoked_s:
            state = "Revoked"
        else:
            state = "Expired" if self._joining.clock() > record.expires_s else "Waiting"
        return pb.HostToken(
            id=record.token,
            host=record.host,
            state=state,
            created=timestamp(record.created_s),
            expires=timestamp(record.expires_s),
        )

    def _signed(self, pin: str) -> tuple[int, int]:
        """Hosts whose last certificate this authority signed, and of how many it is still good."""
        now_s = self._joining.clock()
        of = [e for e in self._joining.state().enrolments.values() if e.authority == pin and not e.revoked_s]
        return len(of), sum(e.expires_s > now_s for e in of)

    def _authority(self, authority: pki.Authority | Retired) -> pb.Authority:
        certificate = authority.certificate
        pin = pki.pin_of(certificate)
        if isinstance(authority, Retired):
            state = "Retired"
        else:
            state = "Signing" if pin == self._joining.authorities.signing.pin else "Trusted"
        hosts, good = self._signed(pin)
        return pb.Authority(
            pin=pin,
            name=pki.name_of(certificate),
            state=state,
            since=timestamp(certificate.not_valid_before_utc.timestamp() + pki.SKEW_S),
            until=timestamp(certificate.not_valid_after_utc.timestamp()),
            hosts=hosts,
            good=good,
        )
