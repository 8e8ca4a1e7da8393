"""Keys and tokens: taken while they are good, from whom they say, and never a moment longer; secrets are kept nowhere."""

import asyncio
import base64
import hmac
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from casemate_core.errors import CasemateError, Unavailable
from casemate_core.spec.access import FLEET, Scope, User
from casemate_core.spec.meta import Meta
from casemate_manager.access import Unauthenticated
from casemate_manager.config import BadConfig, load
from casemate_manager.fetching import fetch_json
from casemate_manager.keyring import BadKeyFile, Keyring
from casemate_manager.keyring import load as load_key
from casemate_manager.store.sqlite import SqliteStore
from casemate_manager.tokens import Bearers, Oidc, OidcConfig, ShortTokens
from casemate_wire.v1 import identity_pb2 as pb
from casemate_wire.v1 import identity_pb2_grpc
from support.gatekeeping import House, as_user, bind, by_header, house

# --- the manager's own key --------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "manager.key"
    made = load_key(path)
    assert path.stat().st_mode & 0o777 == 0o600 and [p.name for p in tmp_path.iterdir()] == ["manager.key"]
    assert load_key(path).key("x") == made.key("x") != made.key("y")
    assert path.read_bytes().hex() not in repr(made)
    path.chmod(0o644)
    with pytest.raises(BadKeyFile, match="others may read it"):
        load_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(BadKeyFile, match="restore it from its backup"):
        load_key(path)


# --- short tokens -----------------------------------------------------------------------------------------------------


def test_a_short_token_is_good_until_its_end_and_for_its_manager_alone() -> None:
    ours = ShortTokens(Keyring.fresh().key("tokens"))
    token = ours.issue("ci", 1000.0, 60)
    assert ours.read(token, 1059.0).name == "ci"
    with pytest.raises(Unauthenticated, match="has ended"):
        ours.read(token, 1060.0)
    with pytest.raises(Unauthenticated):
        ShortTokens(Keyring.fresh().key("tokens")).read(token, 1000.0)


@given(st.integers(0, 500), st.integers(1, 255))
def test_a_token_with_any_byte_altered_is_refused(position: int, change: int) -> None:
    ours = ShortTokens(b"k" * 32)
    token = ours.issue("ci", 1000.0, 60)
    raw = bytearray(token.encode())
    raw[position % len(raw)] = (raw[position % len(raw)] + change) % 128
    altered = raw.decode("latin-1")
    if altered != token:
        try:
            principal = ours.read(altered, 1000.0)
        except Unauthenticated:
            return
        # base64 has bits at its end that say nothing: the same token, written otherwise
        assert principal.name == "ci"


def test_no_algorithm_is_taken_on_a_tokens_word() -> None:
    ours = ShortTokens(b"k" * 32)
    for header in ({"alg": "none"}, {"alg": "HS512"}):
        key = OctKey.import_key(b"k" * 64)
        claims = {"iss": "casemate", "sub": "root", "exp": 9999999999}
        if header["alg"] == "none":
            parts = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in (header, claims)]
            forged = ".".join(parts) + "."
        else:
            forged = jwt.encode(header, claims, key, algorithms=["HS512"])
        with pytest.raises(Unauthenticated):
            ours.read(forged, 1000.0)


# --- a provider of identities -----------------------------------------------------------------------------------------


class Issuer:
    """An OpenID Connect provider on loopback."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {"k1": ECKey.generate_key("P-256", {"kid": "k1"})}
        self.url = ""
        self.asked = 0
        self.down = False

    def token(self, kid: str = "k1", *, key: Any = None, alg: str = "", **claims: Any) -> str:
        key = key or self.keys[kid]
        algorithm = alg or ("RS256" if isinstance(key, RSAKey) else "ES256")
        now = int(time.time())
        plain = {"iss": self.url, "aud": "casemate", "sub": "zoe", "exp": now + 300, "iat": now, **claims}
        plain = {k: v for k, v in plain.items() if v is not None}
        return jwt.encode({"alg": algorithm, "kid": kid}, plain, key, algorithms=[algorithm])

    async def discovery(self, request: web.Request) -> web.Response:
        if self.down:
            raise web.HTTPServiceUnavailable
        return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"})

    async def jwks(self, request: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response({"keys": [k.as_dict(private=False) for k in self.keys.values()]})


@asynccontextmanager
async def issuer() -> AsyncIterator[Issuer]:
    made = Issuer()
    app = web.Application()
    app.router.add_get("/.well-known/openid-configuration", made.discovery)
    app.router.add_get("/jwks", made.jwks)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()


async def test_a_providers_token_names_a_user_and_his_groups_behind_a_prefix() -> None:
    async with issuer() as provider:
        oidc = Oidc(OidcConfig(provider.url, "casemate", "email"), fetch_json)
        found = await oidc.read(provider.token(email="zoe@example.org", email_verified=True, groups=["ran", 7, "x"]))
        assert (found.name, found.groups) == ("oidc:zoe@example.org", ("oidc:ran", "oidc:x"))
        assert found.subjects == ("oidc:zoe@example.org", "group:oidc:ran", "group:oidc:x")
        with pytest.raises(Unauthenticated, match="not verified"):
            await oidc.read(provider.token(email="zoe@example.org"))


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://elsewhere.example"},
        {"aud": "other"},
        {"aud": None},
        {"exp": 1000},
        {"exp": None},
        {"exp": "never"},
        {"nbf": 9999999999},
        {"sub": None},
        {"sub": "two words"},
        {"sub": 7},
    ],
)
async def test_a_token_that_is_not_for_us_is_refused(claims: dict[str, Any]) -> None:
    async with issuer() as provider:
        oidc = Oidc(OidcConfig(provider.url, "casemate"), fetch_json)
        await oidc.read(provider.token(aud=["other", "casemate"]))
        with pytest.raises(Unauthenticated):
            await oidc.read(provider.token(**claims))


async def test_a_token_signed_by_another_key_is_refused_also_by_the_public_key_as_a_password() -> None:
    async with issuer() as provider:
        oidc = Oidc(OidcConfig(provider.url, "casemate"), fetch_json)
        with pytest.raises(Unauthenticated):
            await oidc.read(provider.token(key=ECKey.generate_key("P-256", {"kid": "k1"})))
        public = provider.keys["k1"].as_pem(private=False)
        with pytest.raises(Unauthenticated):
            await oidc.read(_signed_by_hand(provider.token(), public))


def _signed_by_hand(token: str, password: bytes) -> str:
    """The claims of a token, signed with HS256 and a password that everybody knows."""
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"k1"}').decode().rstrip("=")
    signed = f"{header}.{token.split('.')[1]}"
    digest = hmac.digest(password, signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


async def test_keys_that_are_rolled_over_are_asked_for_and_an_outage_is_survived() -> None:
    now = [1000.0 + time.time()]
    async with issuer() as provider:
        oidc = Oidc(OidcConfig(provider.url, "casemate"), fetch_json, lambda: now[0])
        far = int(now[0]) + 100_000
        await oidc.read(provider.token(exp=far))
        provider.keys["k2"] = RSAKey.generate_key(2048, {"kid": "k2"})
        for _ in range(3):
            with pytest.raises(Unauthenticated):  # asked for a moment ago: not again yet
                await oidc.read(provider.token("k2", exp=far))
        assert provider.asked == 1
        now[0] += 11
        await oidc.read(provider.token("k2", exp=far))
        assert provider.asked == 2
        provider.down = True
        now[0] += 4000
        await oidc.read(provider.token(exp=far))
        with pytest.raises(Unavailable):
            await Oidc(OidcConfig(provider.url, "casemate"), fetch_json).read(provider.token())


@given(st.text(max_size=200) | st.binary(max_size=100).map(lambda b: f"{b.hex()}.{b.hex()}.x"))
def test_whatever_is_shown_is_answered(text: str) -> None:
    from casemate_manager.fleet.state import State

    async def nothing(url: str) -> Any:
        raise Unavailable("no")

    bearers = Bearers(lambda: State(1), ShortTokens(b"k" * 32), lambda: 1000.0, Oidc(OidcConfig("x", "y"), nothing))
    with pytest.raises(CasemateError):
        asyncio.run(bearers.read(f"Bearer {text}"))


def test_a_provider_without_an_audience_or_by_plain_http_is_no_setting(tmp_path: Path) -> None:
    for lines in ('oidc_issuer = "https://id.example"', 'oidc_issuer = "http://id.example"\noidc_audience = "c"'):
        (tmp_path / "c.toml").write_text(lines)
        with pytest.raises(BadConfig, match="oidc_issuer"):
            load(str(tmp_path / "c.toml"), {})


# --- over the wire ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def world(tmp_path: Path, oidc: Oidc | None = None) -> AsyncIterator[tuple[House, Any]]:
    """A manager that takes keys and tokens, and users by header for those who have certificates."""
    ring = Keyring.fresh()
    holder: dict[str, Any] = {}

    async def known(context: Any) -> Any:
        told = dict(context.invocation_metadata() or ())
        return await (holder["read"](told["authorization"]) if "authorization" in told else by_header(context))

    async with house(store=SqliteStore(tmp_path / "f.db"), authenticate=known, keyring=ring) as found:
        holder["read"] = Bearers(
            lambda: found.manager.writer.state, ShortTokens(ring.key("tokens")), lambda: holder["now"], oidc
        ).read
        holder["now"] = 1_800_000_060.0
        await found.put(
            User(Meta("ci"), "service", tenant="own"),
            User(Meta("other-ci"), "service", tenant="foreign"),
            bind("own-ci", "operator", Scope("own"), "ci"),
            bind("own-ann", "tenant-admin", Scope("own"), "ann"),
        )
        yield found, holder


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


async def code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        found: grpc.StatusCode = error.code()
        return found
    return grpc.StatusCode.OK


async def test_a_key_is_made_used_listed_rotated_disabled_and_deleted(tmp_path: Path) -> None:
    async with world(tmp_path) as (found, holder):
        stub = identity_pb2_grpc.IdentityStub(found.channel)
        ann = as_user("ann")
        request = pb.CreateKeyRequest(request_key="request-1", user="ci", description="deploys")
        made = await stub.CreateKey(request, metadata=ann)
        assert (await stub.CreateKey(request, metadata=ann)) == made  # its answer was lost: the same again
        who = await stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(made.secret))
        assert (who.user, who.how, [(r.role, r.scope) for r in who.roles]) == (
            "ci",
            "key",
            [("operator", "tenant/own")],
        )
        (listed,) = (await stub.ListKeys(pb.ListKeysRequest(), metadata=ann)).keys
        assert (listed.id, listed.user, listed.description) == (made.key.id, "ci", "deploys")
        rotated = await stub.RotateKey(
            pb.RotateKeyRequest(request_key="request-2", id=made.key.id, overlap_s=100), metadata=ann
        )
        assert rotated.secret != made.secret
        for secret in (made.secret, rotated.secret):
            assert await code(stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(secret))) is grpc.StatusCode.OK
        holder["now"] += 10_000
        assert (
            await code(stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(made.secret))) is grpc.StatusCode.UNAUTHENTICATED
        )
        for change, expected in (
            ("DISABLE", grpc.StatusCode.UNAUTHENTICATED),
            ("ENABLE", grpc.StatusCode.OK),
            ("DELETE", grpc.StatusCode.UNAUTHENTICATED),
        ):
            await stub.ChangeKey(
                pb.ChangeKeyRequest(id=made.key.id, change=pb.ChangeKeyRequest.Change.Value(change)), metadata=ann
            )
            assert await code(stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(rotated.secret))) is expected
        data = b"".join(p.read_bytes() for p in tmp_path.iterdir())
        for secret in (made.secret, rotated.secret):
            assert secret.rpartition("_")[2].encode() not in data


async def test_an_expired_key_and_one_of_a_disabled_user_are_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as (found, holder):
        stub = identity_pb2_grpc.IdentityStub(found.channel)
        made = await stub.CreateKey(
            pb.CreateKeyRequest(request_key="request-1", user="ci", lifetime_s=5000), metadata=as_user("root")
        )
        assert await code(stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(made.secret))) is grpc.StatusCode.OK
        holder["now"] += 6000
        assert (
            await code(stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(made.secret))) is grpc.StatusCode.UNAUTHENTICATED
        )
        holder["now"] -= 6000
        await found.put(User(Meta("ci"), "service", disabled=True, tenant="own"))
        assert (
            await code(stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(made.secret))) is grpc.StatusCode.UNAUTHENTICATED
        )


async def test_only_who_looks_after_a_user_touches_his_keys(tmp_path: Path) -> None:
    async with world(tmp_path) as (found, _):
        stub = identity_pb2_grpc.IdentityStub(found.channel)
        root, ann, ci = as_user("root"), as_user("ann"), as_user("ci")

        def create(user: str, key: str, metadata: Any) -> Any:
            return stub.CreateKey(pb.CreateKeyRequest(request_key=key, user=user), metadata=metadata)

        assert await code(create("other-ci", "request-1", ann)) is grpc.StatusCode.PERMISSION_DENIED
        assert await code(create("root", "request-2", ann)) is grpc.StatusCode.PERMISSION_DENIED
        assert await code(create("ci", "request-3", as_user("nobody"))) is grpc.StatusCode.PERMISSION_DENIED
        assert await code(create("ci", "request-4", ci)) is grpc.StatusCode.OK  # his own, by his certificate
        other = await create("other-ci", "request-5", root)
        change = pb.ChangeKeyRequest(id=other.key.id, change=pb.ChangeKeyRequest.DELETE)
        assert await code(stub.ChangeKey(change, metadata=ann)) is grpc.StatusCode.NOT_FOUND
        assert other.key.id not in {k.id for k in (await stub.ListKeys(pb.ListKeysRequest(), metadata=ann)).keys}


async def test_neither_a_key_nor_a_token_makes_what_outlives_it(tmp_path: Path) -> None:
    async with world(tmp_path) as (found, _):
        stub = identity_pb2_grpc.IdentityStub(found.channel)
        made = await stub.CreateKey(pb.CreateKeyRequest(request_key="request-1", user="ci"), metadata=as_user("ann"))
        again = pb.CreateKeyRequest(request_key="request-2", user="ci")
        assert await code(stub.CreateKey(again, metadata=bearer(made.secret))) is grpc.StatusCode.PERMISSION_DENIED
        token = await stub.IssueToken(pb.IssueTokenRequest(lifetime_s=600), metadata=bearer(made.secret))
        who = await stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(token.token))
        assert (who.user, who.how) == ("ci", "token")
        assert await code(stub.CreateKey(again, metadata=bearer(token.token))) is grpc.StatusCode.PERMISSION_DENIED
        longer = pb.IssueTokenRequest(lifetime_s=600)
        assert await code(stub.IssueToken(longer, metadata=bearer(token.token))) is grpc.StatusCode.PERMISSION_DENIED
        rotate = pb.RotateKeyRequest(request_key="request-3", id=made.key.id)
        assert await code(stub.RotateKey(rotate, metadata=bearer(token.token))) is grpc.StatusCode.NOT_FOUND


async def test_a_provider_and_a_role_for_its_group_let_a_person_in(tmp_path: Path) -> None:
    async with issuer() as provider:
        oidc = Oidc(OidcConfig(provider.url, "casemate"), fetch_json)
        async with world(tmp_path, oidc) as (found, _):
            await found.put(bind("g", "viewer", FLEET, "group:oidc:ran"))
            stub = identity_pb2_grpc.IdentityStub(found.channel)
            token = provider.token(groups=["ran"])
            who = await stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(token))
            assert (who.user, who.how, who.roles[0].role) == ("oidc:zoe", "oidc", "viewer")
            # A provider that names one of ours names nobody of ours.
            who = await stub.WhoAmI(pb.WhoAmIRequest(), metadata=bearer(provider.token(sub="root")))
            assert who.user == "oidc:root" and not who.roles


async def test_the_command_line_says_who_you_are_and_takes_a_key_from_the_environment(tmp_path: Path) -> None:
    async with house(store=SqliteStore(tmp_path / "f.db"), authenticate=None) as found:
        await found.put(User(Meta("ci"), "service"), bind("ci", "viewer", Scope("own"), "ci"))

        def casemate(*arguments: str, token: str = "") -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-m", "casemate_cli", "--manager", f"127.0.0.1:{found.manager.port}", *arguments]
            environ = {**os.environ, "CASEMATE_INSECURE_LOOPBACK": "1", **({"CASEMATE_TOKEN": token} if token else {})}
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)

        def both(*arguments: str, token: str = "") -> Any:
            return asyncio.to_thread(casemate, *arguments, token=token)

        who = await both("whoami")
        assert "development" in who.stdout and "development mode" in who.stderr
        made = await both("key", "create", "ci", "--description", "deploys")
        secret = made.stdout.strip()
        assert secret.startswith("cak_") and secret not in made.stderr
        assert "no User" not in made.stderr
        assert "there is no User cl: this key may do what roles bound" in (await both("key", "create", "cl")).stderr
        assert "user    ci" in (await both("whoami", token=secret)).stdout
        assert "deploys" in (await both("key", "list")).stdout
        token = (await both("token", token=secret)).stdout.strip()
        assert "by      token" in (await both("whoami", token=token)).stdout
        assert "hello" in (await both("get", "environments", "-A", token=token)).stdout
        refused = await both("cordon", "h1", token=token)
        assert refused.returncode in (4, 5)
        wrong = await both("get", "environments", token="cak_0000_x")
        assert wrong.returncode == 5
        key_id = secret.split("_")[1]
        assert (await both("key", "disable", key_id)).returncode == 0
        assert (await both("whoami", token=secret)).returncode == 5
