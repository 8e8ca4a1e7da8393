"""Tokens, enrolments and their end, on values: every refusal, and that none of them changes anything."""

from typing import Any

import pytest

from casemate_core.errors import CasemateError, Conflict, InvalidSpec, NotFound
from casemate_core.spec.fleet import Taint
from casemate_core.spec.views import Condition
from casemate_manager.fleet.commands import (
    CreateToken,
    DeleteResource,
    HostFacts,
    HostHello,
    HostInventory,
    HostNote,
    RenewEnrolment,
    RevokeHost,
    RevokeToken,
    TokenMade,
    Turned,
    UseToken,
    Welcomed,
)
from casemate_manager.fleet.enrolment import TOKEN_S, NotEnrolled, TokenRefused, digest_of
from casemate_manager.fleet.machine import apply
from casemate_manager.fleet.records import HostLimits
from casemate_wire.stream import Facts, Hello, HostEvent, HostReport, Inventory
from casemate_wire.v1 import hosts_pb2
from support.small_fleet import SmallFleet, topology

SECRET = "a-secret-that-nobody-keeps"


class Fleet(SmallFleet):
    """With short words for what these tests do."""

    def token(self, name: str = "t1", host: str = "h7", **more: object) -> TokenMade:
        made = self.do(CreateToken(name, host, digest_of(SECRET), TOKEN_S, **more))  # type: ignore[arg-type]
        assert isinstance(made, TokenMade)
        return made

    def use(self, key: str = "key-a", token: str = "t1", secret: str = SECRET) -> None:
        self.do(UseToken(token, secret, key, "pin", self.now_s + 86400, "seed"))

    def dial(self, key: str | None, host: str = "h7", session: int = 1) -> object:
        return self.do(HostHello(Hello(host, "boot", 0, 0, "digest", session), "seed", key))

    def refuses(self, kind: type[CasemateError], words: str, *arguments: str) -> None:
        before = self.state.revision
        with pytest.raises(kind, match=words):
            self.use(*arguments)
        assert self.state.revision == before


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_a_token_enrols_one_host_with_what_the_operator_wrote(fleet: Fleet) -> None:
    fleet.token(labels={"site": "fra1"}, taints=(Taint("gpu"),))
    fleet.use()
    host = fleet.state.hosts["h7"].host
    assert (dict(host.meta.labels), host.spec.taints) == ({"site": "fra1"}, (Taint("gpu"),))
    assert isinstance(fleet.dial("key-a"), Welcomed)
    assert SECRET not in repr(fleet.reload())
    assert fleet.reload().enrolments == fleet.state.enrolments


def test_a_token_is_used_once(fleet: Fleet) -> None:
    fleet.token()
    fleet.use("key-a")
    fleet.refuses(TokenRefused, "used before", "key-b")
    assert fleet.state.enrolments["h7"].key == "key-a"


def test_the_same_key_may_ask_again_for_a_lost_answer(fleet: Fleet) -> None:
    fleet.token()
    fleet.use("key-a")
    fleet.use("key-a")
    fleet.token("t2")
    fleet.use("key-b", "t2")
    fleet.refuses(TokenRefused, "used before", "key-a")  # not any more: another token bound another key


def test_a_token_that_is_wrong_revoked_or_old_lets_nobody_in(fleet: Fleet) -> None:
    fleet.token()
    fleet.refuses(TokenRefused, "no such token", "key-a", "t1", "guessed")
    fleet.refuses(TokenRefused, "no such token", "key-a", "t2")
    fleet.refuses(TokenRefused, "no such token", "key-a", "t2", "")
    fleet.do(RevokeToken("t1"))
    fleet.refuses(TokenRefused, "revoked")
    fleet.token("t3")
    fleet.now_s += TOKEN_S
    fleet.refuses(TokenRefused, "expired", "key-a", "t3")
    assert fleet.state.enrolments == {}


def test_tokens_are_asked_for_with_sense(fleet: Fleet) -> None:
    bad = CreateToken("t1", "No Name", "", TOKEN_S + 1, {"": "x"}, (), HostLimits(-1))
    with pytest.raises(InvalidSpec) as refused:
        fleet.do(bad)
    assert {v.path.partition(".")[0].partition("[")[0] for v in refused.value.violations} == {
        "host",
        "labels",
        "life",
        "limits",
    }
    fleet.token()
    with pytest.raises(Conflict):
        fleet.token()
    with pytest.raises(NotFound):
        fleet.do(RevokeToken("t9"))
    with pytest.raises(NotFound):
        fleet.do(RevokeHost("h9"))


def test_old_tokens_are_forgotten(fleet: Fleet) -> None:
    fleet.token()
    fleet.now_s += 3 * TOKEN_S
    fleet.token("t2")
    assert list(fleet.state.tokens) == ["t2"]


def test_only_the_bound_key_is_renewed_and_welcomed(fleet: Fleet) -> None:
    assert isinstance(refused := fleet.dial("key-a"), Turned)
    assert (refused.reason, refused.retry_after_s) == ("NotEnrolled", -1.0)
    fleet.token()
    fleet.use()
    fleet.do(RenewEnrolment("h7", "key-a", "pin2", 5.0))
    assert (fleet.state.enrolments["h7"].authority, fleet.state.enrolments["h7"].expires_s) == ("pin2", 5.0)
    for host, key in (("h7", "key-b"), ("h8", "key-a")):
        with pytest.raises(NotEnrolled):
            fleet.do(RenewEnrolment(host, key, "pin", 0.0))
        assert isinstance(fleet.dial(key, host), Turned)


def test_who_does_not_hold_the_key_learns_nothing_of_the_host(fleet: Fleet) -> None:
    fleet.token()
    fleet.use()
    told = set()
    for host in ("h7", "nobody"):
        with pytest.raises(NotEnrolled) as refused:
            fleet.do(RenewEnrolment(host, "guessed", "pin", 0.0))
        told.add(str(refused.value))
    fleet.do(RevokeHost("h7"))
    with pytest.raises(NotEnrolled) as refused:
        fleet.do(RenewEnrolment("h7", "guessed", "pin", 0.0))
    assert told == {str(refused.value)}


def test_revoking_a_host_ends_its_stream_and_its_renewals(fleet: Fleet) -> None:
    fleet.token()
    fleet.use()
    fleet.dial("key-a", session=3)
    fleet.token("t2")
    fleet.now_s += 1
    batch = fleet.fold(apply(fleet.state, fleet.observed, RevokeHost("h7"), fleet.now_s, fleet.rules))
    assert [(e.host, e.session, e.reason) for e in batch.effects] == [("h7", 3, "Revoked")]
    assert isinstance(fleet.dial("key-a", session=4), Turned)
    with pytest.raises(NotEnrolled, match="revoked"):
        fleet.do(RenewEnrolment("h7", "key-a", "pin", 0.0))
    fleet.refuses(TokenRefused, "revoked", "key-a", "t2")  # tokens that waited for it went with it
    fleet.refuses(TokenRefused, "revoked", "key-a", "t1")
    fleet.token("t3")
    fleet.use("key-c", "t3")
    assert isinstance(fleet.dial("key-c", session=1), Welcomed)  # a new machine begins its counter anew


def test_a_cloned_identity_is_held_until_another_token_binds_another_key(fleet: Fleet) -> None:
    fleet.token()
    fleet.use()
    fleet.dial("key-a", session=5)
    assert isinstance(fleet.dial("key-a", session=5), Turned)
    assert isinstance(fleet.dial("key-a", session=6), Turned)
    fleet.token("t2")
    fleet.use("key-b", "t2")
    assert isinstance(fleet.dial("key-a", session=7), Turned)
    assert isinstance(fleet.dial("key-b", session=1), Welcomed)


def test_capacity_beyond_the_enrolment_is_not_taken(fleet: Fleet) -> None:
    fleet.token(limits=HostLimits(threads=4, memory_mib=4096))
    fleet.use()
    fleet.dial("key-a")
    fleet.now_s += 1
    tell = HostInventory("h7", 1, Inventory("digest", topology("1s 4k/c 1t 8G disk=100G")))
    batch = fleet.fold(apply(fleet.state, fleet.observed, tell, fleet.now_s, fleet.rules))
    assert [(e.reason, e.retry_after_s) for e in batch.effects] == [("BeyondEnrolment", -1.0)]
    assert "8192 memory_mib where 4096 were enrolled" in batch.effects[0].message
    assert "h7" not in fleet.state.inventories


def test_deleting_a_host_ends_its_enrolment(fleet: Fleet) -> None:
    fleet.token()
    fleet.use()
    fleet.do(DeleteResource("k", "Host", "", "h7"))
    assert isinstance(fleet.dial("key-a"), Turned)


def test_plain_text_needs_no_key(fleet: Fleet) -> None:
    assert isinstance(fleet.dial(None), Welcomed)


def test_nothing_that_a_host_says_sets_its_labels_or_taints(fleet: Fleet) -> None:
    """Neither has the schema a field for them, nor does anything that is told change them."""
    fields: set[str] = set()

    def walk(descriptor: Any) -> None:
        for field in descriptor.fields:
            if field.full_name not in fields:
                fields.add(field.full_name)
                if field.message_type is not None and field.message_type.full_name.startswith("casemate."):
                    walk(field.message_type)

    walk(hosts_pb2.FromHost.DESCRIPTOR)
    assert "casemate.host.v1.Hello.host" in fields
    assert not {f for f in fields if f.rpartition(".")[2] in ("labels", "taints", "annotations", "unschedulable")}
    fleet.token(labels={"site": "fra1"}, taints=(Taint("dedicated", "ran"),))
    fleet.use()
    before = fleet.state.hosts["h7"].host
    fleet.dial("key-a")
    for tell in (
        HostInventory("h7", 1, Inventory("digest", topology("1s 4k/c 1t 8G disk=100G name=site=ber1"))),
        HostFacts("h7", 1, Facts(1, True, (), (), HostReport(conditions=(Condition("site", "True", "ber1"),)))),
        HostNote("h7", 1, HostEvent("e1", "", "", "Labels", "site=ber1")),
    ):
        fleet.now_s += 1
        fleet.fold(apply(fleet.state, fleet.observed, tell, fleet.now_s, fleet.rules))
    after = fleet.state.hosts["h7"].host
    assert (after.meta.labels, after.spec) == (before.meta.labels, before.spec) == ({"site": "fra1"}, before.spec)
    assert after.spec.taints == (Taint("dedicated", "ran"),)
