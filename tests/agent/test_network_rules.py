"""Names of taps, bridges and tables; the rules as values."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.domain import names
from casemate_agent.drivers import nft
from casemate_core.errors import InternalError
from support.instances import NETWORK, UID, nic

SCOPES = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12)


@given(SCOPES, st.uuids(), st.integers(0, 15), st.text(max_size=60))
def test_names_fit_an_interface_and_are_the_same_for_life(scope: str, uid: Any, index: int, network: str) -> None:
    tap, bridge = names.tap_name(scope, str(uid), index), names.bridge_name(scope, network)
    assert len(tap) == 13 and tap.startswith(names.tap_prefix(scope))
    assert len(bridge) <= names.MAX_INTERFACE_NAME
    assert not bridge.startswith(names.tap_prefix(scope)), "the guard must never take a bridge for a tap"
    assert (tap, bridge) == (names.tap_name(scope, str(uid), index), names.bridge_name(scope, network))


def test_names_differ_by_scope_instance_and_interface() -> None:
    taps = {names.tap_name(scope, uid, i) for scope in ("main", "b") for uid in (UID, UID[::-1]) for i in range(4)}
    assert len(taps) == 16
    assert names.bridge_name("main", "default") != names.bridge_name("b", "default")


@pytest.mark.parametrize("scope", ["", "A", "a b", "a" * 13, "x;y", "../x", "é"])
def test_a_scope_is_small_letters_and_digits(scope: str) -> None:
    with pytest.raises(InternalError):
        names.table_name(scope)


@given(st.text(max_size=80), st.text(max_size=80), st.integers(0, 10**6))
def test_a_domain_name_is_fit_for_files_and_tells_its_instance(environment: str, name: str, ordinal: int) -> None:
    made = names.domain_name(environment, name, ordinal, UID)
    assert made.endswith(UID[:8]) and len(made) <= 60
    assert made.isascii() and not set(made) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert not made.startswith(("-", "."))


def test_a_socket_path_that_the_kernel_would_cut_off_is_refused() -> None:
    assert names.channel_path("/run/casemate", UID) == f"/run/casemate/{UID}.sock"
    with pytest.raises(InternalError, match="shorter folder"):
        names.channel_path("/x" * 40, UID)


def test_a_guard_is_replaced_in_one_transaction() -> None:
    commands = nft.replace_guards("main", {"tap0": ("52:54:00:00:00:01", "10.0.0.1")}, {"tap0": nic()})
    assert [next(iter(command)) for command in commands] == ["delete", "add"]
    assert nft.replace_guards("main", {}, {}) == []


def test_guards_are_read_back_from_what_was_written() -> None:
    elements = nft.guard_elements({"cm1": nic(2), "cm2": nic(3)})
    listing = {"nftables": [{"metainfo": {}}, {"set": {"name": nft.GUARD_SET, "elem": elements}}]}
    assert nft.read_guards(json.loads(json.dumps(listing))) == {
        "cm1": ("52:54:00:00:00:02", "10.219.7.2"),
        "cm2": ("52:54:00:00:00:03", "10.219.7.3"),
    }
    assert nft.read_guards({"nftables": [{"set": {"name": nft.GUARD_SET}}]}) == {}


def test_the_last_rule_for_a_tap_drops() -> None:
    rules = [c["add"]["rule"] for c in nft.base_rules("main") if "rule" in c.get("add", {})]
    guard = [rule["expr"] for rule in rules if rule["family"] == "bridge"]
    assert guard[0][-1] == {"return": None}
    assert guard[-1][-1] == {"drop": None}
    assert all(expression[-1] == {"accept": None} for expression in guard[1:-1])


def test_a_network_that_is_taken_away_was_added_in_the_same_transaction() -> None:
    verbs = [next(iter(c)) for c in nft.remove_network("main", NETWORK.subnet, "cmbr-0")]
    assert verbs == ["add", "delete"] * 3
