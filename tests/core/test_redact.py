"""Secrets are left out by the names they go by and by their place; what is left keeps its shape."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_core.redact import LEFT_OUT, plain, text

CANARY = "hunter2canary"


@pytest.mark.parametrize(
    "value",
    [
        {"spec": {"userData": CANARY}},
        {"spec": {"user_data": f"#cloud-config\npassword: {CANARY}"}},
        {"spec": {"sshKeys": [CANARY]}},
        {
            "containers": [
                {"name": "a", "env": [{"name": "X", "value": CANARY}, {"name": "Y", "valueFrom": {"a": CANARY}}]}
            ]
        },
        {"containers": [{"command": ["run", CANARY], "args": [f"--x={CANARY}"]}]},
        {"metadata": {"annotations": {"note": CANARY}}},
        {"data": {"stringData": {"a": CANARY}}, "password": CANARY, "apiKey": CANARY, "clientSecret": {"a": CANARY}},
        {"source": f"https://user:{CANARY}@example.org/image?sig={CANARY}#{CANARY}"},
        {"message": f"GET https://{CANARY}@example.org/ failed"},
        {"message": f"Authorization: Bearer {CANARY}"},
        {"message": f"started with --db-password={CANARY} --token {CANARY}, api_key: '{CANARY}'"},
        {"message": f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"},
        {"message": f"-----BEGIN PRIVATE KEY-----\n{CANARY}"},
        [[{"deep": [{"token": CANARY}]}]],
    ],
)
def test_a_canary_is_left_out(value: Any) -> None:
    assert CANARY not in json.dumps(plain(value))
    assert LEFT_OUT in json.dumps(plain(value))


def test_what_is_no_secret_stays_as_it_is() -> None:
    value = {
        "metadata": {"name": "web", "labels": {"tier": "a"}, "uid": "u"},
        "spec": {"cpu": {"count": 2}, "memory": "1Gi", "image": "debian-13", "pods": [{"name": "web", "ports": [80]}]},
        "message": "host h1: 3 of 8 threads are free at /var/lib/casemate",
        "source": "https://example.org/image.qcow2",
        "empty": "",
        "none": None,
    }
    assert plain(value) == value


def test_it_can_be_seen_that_something_was_there_and_the_given_value_is_not_changed() -> None:
    given = {"env": [{"name": "A", "value": "x"}], "userData": "", "args": ["a", "b"], "annotations": {"k": "v"}}
    kept = json.loads(json.dumps(given))
    assert plain(given) == {
        "env": [{"name": "A", "value": LEFT_OUT}], "userData": "", "args": f"{LEFT_OUT}: 2 words",
        "annotations": {"k": LEFT_OUT},
    }  # fmt: skip
    assert given == kept


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=12,
)


@given(JSON)
def test_any_value_is_taken_and_twice_is_once(value: Any) -> None:
    once = plain(value)
    assert plain(once) == once or LEFT_OUT in json.dumps(once)


@given(st.text(max_size=200))
def test_any_text_is_taken(value: str) -> None:
    assert isinstance(text(value), str)
