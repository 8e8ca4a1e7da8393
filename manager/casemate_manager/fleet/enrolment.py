"""PURE. Who may be a host: tokens, enrolments, their renewal and their end.

A *token* lets one machine become one named host, once, within an hour. Its secret is shown when it is made and never kept:
the record has its SHA-256. Using it binds the host's name to the key of the request; the host is then *enrolled*, and
whoever holds that key is that host until the enrolment is revoked or another token binds another key. Using a token again
with the key that it bound is the same use, whose answer was lost.

What an enrolment says of labels, taints and capacity was written with the token by an operator. A host says nothing of the
first two, and what it tells of its parts may not go beyond the last (:func:`beyond`).
"""

import hashlib
import hmac
from dataclasses import replace
from typing import Final

from casemate_core.errors import CallerError, Conflict, InvalidSpec, NotFound, Violation, shown
from casemate_core.spec.fleet import Host, HostSpec
from casemate_core.spec.meta import Meta, check_labels, check_name
from casemate_core.spec.views import ObjectRef
from casemate_core.topology import Topology
from casemate_manager.fleet.commands import (
    Batch,
    CreateToken,
    EndSession,
    Enrolled,
    RenewEnrolment,
    Revoked,
    RevokeHost,
    RevokeToken,
    TokenMade,
    UseToken,
)
from casemate_manager.fleet.draft import Draft, make_uid
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import EnrolmentRecord, HostLimits, HostRecord, TokenRecord
from casemate_manager.fleet.state import State

#: Life of a token, and the most that may be asked for.
TOKEN_S: Final = 3600.0
#: Tokens that may wait to be used at the same time.
MAX_TOKENS: Final = 20_000
MAX_LABELS: Final = 64


class TokenRefused(CallerError):
    """The token does not let its holder in."""

    reason = "TokenRefused"


class NotEnrolled(CallerError):
    """The host is not enrolled with the key that it shows."""

    reason = "NotEnrolled"


def digest_of(secret: str) -> str:
    """What is kept of a token's secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_token(state: State, observed: Observed, command: CreateToken, now_s: float) -> Batch:
    """An operator lets a machine become a host. Raises InvalidSpec, Conflict."""
    problems = [*check_name("host", command.host)]
    problems += check_labels("labels", dict(command.labels))
    problems += check_labels("taints", {t.key: t.value for t in command.taints})
    if len(command.labels) + len(command.taints) > MAX_LABELS:
        problems.append(Violation("labels", str(len(command.labels)), "are too many", f"give at most {MAX_LABELS}"))
    if not 0 < command.life_s <= TOKEN_S:
        problems.append(
            Violation("life", f"{command.life_s:g}s", "is not within an hour", "ask for a time above 0, at most 1h")
        )
    for name in ("threads", "memory_mib", "gpus"):
        if getattr(command.limits, name) < 0:
            problems.append(
                Violation(f"limits.{name}", str(getattr(command.limits, name)), "is below 0", "write 0 for no limit")
            )
    if problems:
        raise InvalidSpec(tuple(problems), f"token for host {shown(command.host)}")
    if command.token in state.tokens:
        raise Conflict("this request made a token before, whose secret is not kept: revoke it and ask for another")
    draft = Draft(state, observed, now_s)
    for old in [t for t in state.tokens.values() if now_s > t.expires_s + TOKEN_S][:100]:
        draft.drop("Token", old.token)
    if len(state.tokens) - len(draft) >= MAX_TOKENS:
        raise Conflict(f"{MAX_TOKENS} tokens wait already: revoke some, or wait until they expire")
    record = TokenRecord(
        command.token,
        command.host,
        command.digest,
        now_s,
        now_s + command.life_s,
        dict(command.labels),
        command.taints,
        command.limits,
    )
    draft.put(record)
    return draft.batch(TokenMade(record))


def revoke_token(state: State, observed: Observed, command: RevokeToken, now_s: float) -> Batch:
    """An operator takes a token back. Raises NotFound; a token that is over already stays so."""
    token = state.tokens.get(command.token)
    if token is None:
        raise NotFound("Token", command.token)
    draft = Draft(state, observed, now_s)
    if not token.revoked_s and not token.used_s:
        token = replace(token, revoked_s=now_s)
        draft.put(token)
    return draft.batch(TokenMade(token))


def use_token(state: State, observed: Observed, command: UseToken, now_s: float) -> Batch:
    """A machine asks to become the host that its token names. Raises TokenRefused."""
    token = state.tokens.get(command.token)
    # Compared in any case, so that how long it takes tells nothing of which tokens there are.
    digest = token.digest if token else digest_of("")
    if not hmac.compare_digest(digest, digest_of(command.secret)) or token is None:
        raise TokenRefused("no such token: make one with casemate host token create")
    if token.revoked_s:
        raise TokenRefused("the token was revoked: make another with casemate host token create")
    if now_s > token.expires_s:
        raise TokenRefused("the token has expired: make another with casemate host token create")
    enrolment = state.enrolments.get(token.host)
    if token.used_s and (token.key != command.key or enrolment is None or enrolment.key != command.key):
        raise TokenRefused("the token was used before: make another with casemate host token create")
    draft = Draft(state, observed, now_s)
    if not token.used_s:
        draft.put(replace(token, used_s=now_s, key=command.key))
        known = state.hosts.get(token.host)
        draft.put(_host(draft, token, known, command.seed))
        _end_session(draft, token.host, "OtherKey", "the host was enrolled with another key")
    elif enrolment is not None and enrolment.revoked_s:
        raise TokenRefused("the host was revoked: make another token with casemate host token create")
    # The first use decides: a relay that was taken since may ask again with its key, and must not name another for root.
    sealing = enrolment.sealing if token.used_s and enrolment is not None else command.sealing
    draft.put(
        EnrolmentRecord(
            token.host,
            command.key,
            now_s,
            now_s,
            command.expires_s,
            command.authority,
            limits=token.limits,
            sealing=sealing,
        )
    )
    draft.event(_ref(state, token.host), "HostEnrolled", f"with the key {command.key[:16]}")
    return draft.batch(Enrolled(token.host))


def _host(draft: Draft, token: TokenRecord, known: HostRecord | None, seed: str) -> HostRecord:
    """The host's record: made, or free to dial again, with its counter begun anew and no hold."""
    if known is not None:
        return replace(known, held="", session=0)
    meta = Meta(
        token.host,
        uid=make_uid("Host", token.host, seed),
        labels=dict(token.labels),
        generation=1,
        created_s=draft.now_s,
        resource_version=draft.revision,
    )
    return HostRecord(Host(meta, HostSpec(taints=token.taints)))


def renew(state: State, observed: Observed, command: RenewEnrolment, now_s: float) -> Batch:
    """A host asks for a certificate for the key that is bound to it. Raises NotEnrolled."""
    enrolment = state.enrolments.get(command.host)
    refusal = refused(enrolment, command.key)
    if refusal:
        raise NotEnrolled(refusal)
    assert enrolment is not None
    draft = Draft(state, observed, now_s)
    draft.put(replace(enrolment, renewed_s=now_s, expires_s=command.expires_s, authority=command.authority))
    return draft.batch(Enrolled(command.host))


def refused(enrolment: EnrolmentRecord | None, key: str) -> str:
    """Why a host with this key is not let in; empty where it is.

    Who does not hold the key is not told whether there is such a host: anybody may ask for a certificate.
    """
    remedy = "make a token with casemate host token create, and join again"
    if enrolment is None or enrolment.key != key:
        return f"no host of this name is enrolled with this key: {remedy}"
    return f"the host was revoked: {remedy}" if enrolment.revoked_s else ""


def revoke_host(state: State, observed: Observed, command: RevokeHost, now_s: float) -> Batch:
    """An operator ends a host's identity: its stream now, and every later one. Raises NotFound."""
    enrolment = state.enrolments.get(command.host)
    if enrolment is None:
        raise NotFound("enrolled host", command.host)
    draft = Draft(state, observed, now_s)
    for token in [t for t in state.tokens.values() if t.host == command.host and not t.used_s and not t.revoked_s][
        :100
    ]:
        draft.put(replace(token, revoked_s=now_s))
    if not enrolment.revoked_s:
        draft.put(replace(enrolment, revoked_s=now_s))
        draft.event(_ref(state, command.host), "HostRevoked", "its certificate is accepted no more", warning=True)
        _end_session(draft, command.host, "Revoked", "the host was revoked")
    return draft.batch(Revoked(command.host))


def _end_session(draft: Draft, host: str, reason: str, message: str) -> None:
    seen = draft.observed.host(host)
    if seen.connected:
        draft.effects.append(EndSession(host, seen.session, reason, message, -1.0))


def _ref(state: State, host: str) -> ObjectRef:
    record = state.hosts.get(host)
    return ObjectRef("Host", host, "", record.host.meta.uid if record else "")


def beyond(limits: HostLimits, topology: Topology) -> str:
    """What of a machine goes beyond what it was enrolled for; empty where nothing does."""
    has = HostLimits(
        threads=len(topology.online),
        memory_mib=sum(cell.memory_mib for cell in topology.cells),
        gpus=len(topology.gpus),
    )
    return ", ".join(
        f"{getattr(has, name)} {name} where {most} were enrolled"
        for name in ("threads", "memory_mib", "gpus")
        if (most := getattr(limits, name)) and getattr(has, name) > most
    )
