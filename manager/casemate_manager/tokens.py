"""What programs show: access keys and short tokens of ours, and tokens of an OpenID Connect provider.

Theory of operation. An access key is ``cak_<id>_<secret>``: the id finds its record, the secret has 256 random bits, and of it
the store has the SHA-256 (there is nothing to guess, so a slow hash would only be slow). A short token is a JWT signed with a
key of the keyring; it lives for minutes and is kept nowhere, and it is void when its user is disabled. A provider's token is
checked against the keys that its discovery document leads to: signature, issuer, audience, times; then its claims are mapped
to a user and groups, both behind a prefix, so that no provider can name a user of ours.

Only the algorithms named here are taken; which one a token claims decides nothing.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeGuard

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OctKey

from casemate_core.errors import Unavailable
from casemate_core.spec.access import GROUP
from casemate_manager.access import Principal, Unauthenticated
from casemate_manager.fleet.records import AccessKeyRecord
from casemate_manager.fleet.state import State

KEY_PREFIX: Final = "cak_"
ISSUER: Final = "casemate"
MAX_TOKEN: Final = 16 * 1024
#: Clocks of a provider and ours may differ by so much.
LEEWAY_S: Final = 30
#: The provider's keys are asked for again at most so often, when a token names one that is not known; and are kept so long.
REFRESH_S: Final = 10.0
KEPT_S: Final = 3600.0
MAX_GROUPS: Final = 256
ALGORITHMS: Final = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]


def secret_for(key: bytes, *parts: str) -> tuple[str, str]:
    """The secret of one request and its digest. The same request again (its answer was lost) has the same secret."""
    raw = hmac.digest(key, "\0".join(parts).encode(), "sha256")
    secret = base64.urlsafe_b64encode(raw).decode().rstrip("=")
    return secret, digest_of(secret)


def digest_of(secret: str) -> str:
    """What the store keeps of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def full_key(key_id: str, secret: str) -> str:
    """An access key as a program sends it."""
    return f"{KEY_PREFIX}{key_id}_{secret}"


def by_key(text: str, keys: Mapping[str, AccessKeyRecord], now_s: float) -> Principal:
    """Who an access key is. Raises Unauthenticated, with one sentence for every way in which it can be wrong."""
    key_id, _, secret = text.removeprefix(KEY_PREFIX).partition("_")
    record = keys.get(key_id)
    given = digest_of(secret)
    right = hmac.compare_digest(given, record.digest if record else "")
    if record is not None and record.former_digest and now_s < record.former_until_s:
        right |= hmac.compare_digest(given, record.former_digest)
    if record is None or not right or record.disabled or (record.expires_s and now_s >= record.expires_s):
        raise Unauthenticated("the access key is not known, or not good any more")
    return Principal(record.user, "key")


class ShortTokens:
    """Tokens that the manager signs for its own users."""

    def __init__(self, key: bytes) -> None:
        self._key = OctKey.import_key(key)

    def issue(self, user: str, now_s: float, lifetime_s: int) -> str:
        """A token of ``user``."""
        claims = {"iss": ISSUER, "sub": user, "iat": int(now_s), "exp": int(now_s) + lifetime_s}
        return jwt.encode({"alg": "HS256"}, claims, self._key, algorithms=["HS256"])

    def read(self, text: str, now_s: float) -> Principal:
        """Whose it is. Raises Unauthenticated."""
        try:
            token = jwt.decode(text, self._key, algorithms=["HS256"])
        except (JoseError, ValueError) as error:
            raise Unauthenticated("the token is not one of this manager's") from error
        claims = token.claims
        expires = claims.get("exp")
        if claims.get("iss") != ISSUER or not isinstance(claims.get("sub"), str) or not isinstance(expires, int):
            raise Unauthenticated("the token is not one of this manager's")
        if now_s >= expires:
            raise Unauthenticated("the token has ended: get another")
        return Principal(claims["sub"], "token")


@dataclass(frozen=True, slots=True)
class OidcConfig:
    """A provider. ``prefix`` stands before the user's name and each group: ``oidc:``."""

    issuer: str
    audience: str
    username_claim: str = "sub"
    groups_claim: str = "groups"
    prefix: str = "oidc:"


class Fetch(Protocol):
    """Gets a JSON document."""

    async def __call__(self, url: str) -> Any:
        """Raises Unavailable."""
        ...


class Oidc:
    """Reads tokens of one provider. ``clock`` gives seconds since the epoch."""

    def __init__(self, config: OidcConfig, fetch: Fetch, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._fetch = fetch
        self._clock = clock
        self._keys: KeySet | None = None
        self._kids: frozenset[str] = frozenset()
        self._fetched_s = float("-inf")
        self._lock = asyncio.Lock()

    async def read(self, text: str) -> Principal:
        """Who the token is of. Raises Unauthenticated, Unavailable."""
        kid = _header(text).get("kid")
        keys = await self._keys_for(kid if isinstance(kid, str) else "")
        try:
            claims = jwt.decode(text, keys, algorithms=ALGORITHMS).claims
        except (JoseError, ValueError) as error:
            raise Unauthenticated("the token's signature is not one of the provider's") from error
        self._check(claims)
        return self._principal(claims)

    def _check(self, claims: Mapping[str, Any]) -> None:
        now_s, config = self._clock(), self._config
        audience = claims.get("aud")
        named = audience if isinstance(audience, list) else [audience]
        expires, begins = claims.get("exp"), claims.get("nbf", 0)
        if claims.get("iss") != config.issuer or config.audience not in named:
            raise Unauthenticated("the token is of another issuer, or for another audience")
        if not _is_time(expires) or not _is_time(begins):
            raise Unauthenticated("the token does not say until when it is good")
        if now_s >= expires + LEEWAY_S or now_s < begins - LEEWAY_S:
            raise Unauthenticated("the token has ended, or has not begun")

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        config = self._config
        name = claims.get(config.username_claim)
        if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable() or " " in name:
            raise Unauthenticated(f"the token's claim {config.username_claim} names nobody")
        if config.username_claim == "email" and claims.get("email_verified") is not True:
            raise Unauthenticated("the provider has not verified the token's email address")
        groups = claims.get(config.groups_claim, [])
        told = [g for g in groups if isinstance(g, str) and 0 < len(g) <= 200] if isinstance(groups, list) else []
        return Principal(config.prefix + name, "oidc", tuple(config.prefix + g for g in told[:MAX_GROUPS]))

    async def _keys_for(self, kid: str) -> KeySet:
        async with self._lock:
            age_s = self._clock() - self._fetched_s
            if self._keys is None or age_s > KEPT_S or (kid not in self._kids and age_s > REFRESH_S):
                try:
                    await self._refresh()
                except Unavailable:
                    # Keys that are known stay good through an outage of the provider.
                    if self._keys is None:
                        raise
            assert self._keys is not None
            return self._keys

    async def _refresh(self) -> None:
        issuer = self._config.issuer.rstrip("/")
        document = await self._fetch(f"{issuer}/.well-known/openid-configuration")
        if not isinstance(document, dict) or document.get("issuer") != self._config.issuer:
            raise Unavailable("the provider's discovery document names another issuer")
        address = document.get("jwks_uri")
        if not isinstance(address, str):
            raise Unavailable("the provider's discovery document leads to no keys")
        found = await self._fetch(address)
        try:
            public = [k for k in found["keys"] if k.get("kty") in ("RSA", "EC", "OKP")]
            self._keys = KeySet.import_key_set({"keys": public})
        except (KeyError, TypeError, AttributeError, ValueError, JoseError) as error:
            raise Unavailable("the provider's keys cannot be read") from error
        self._kids = frozenset(str(k["kid"]) for k in public if "kid" in k)
        self._fetched_s = self._clock()


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _header(text: str) -> Mapping[str, Any]:
    return _part(text, 0)


def _part(text: str, index: int) -> Mapping[str, Any]:
    """A part of a token, not believed: only to see whom to ask."""
    try:
        raw = text.split(".")[index]
        found = json.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))
    except (IndexError, ValueError, RecursionError):
        raise Unauthenticated("what was shown is no token") from None
    if not isinstance(found, dict):
        raise Unauthenticated("what was shown is no token")
    return found


class Bearers:
    """Reads whatever stands behind ``authorization: Bearer``."""

    def __init__(
        self,
        state: Callable[[], State],
        short: ShortTokens,
        clock: Callable[[], float],
        oidc: Oidc | None = None,
    ) -> None:
        self._state = state
        self._short = short
        self._clock = clock
        self._oidc = oidc

    async def read(self, value: str) -> Principal:
        """Who it is. Raises Unauthenticated, Unavailable."""
        scheme, _, text = value.partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text or len(text) > MAX_TOKEN:
            raise Unauthenticated("the authorization is not understood: send Bearer and a key or token")
        if text.startswith(KEY_PREFIX):
            principal = by_key(text, self._state().access_keys, self._clock())
        elif _part(text, 1).get("iss") == ISSUER:
            principal = self._short.read(text, self._clock())
        elif self._oidc is not None:
            principal = await self._oidc.read(text)
        else:
            raise Unauthenticated("the token is of an issuer that this manager does not know")
        user = self._state().users.get(principal.name)
        if user is not None and user.disabled:
            raise Unauthenticated("the user is disabled")
        return principal


__all__ = ["GROUP", "Bearers", "Oidc", "OidcConfig", "ShortTokens", "by_key", "full_key", "secret_for"]
