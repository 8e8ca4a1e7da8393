"""What `wait --for` takes, and when it is met."""

import pytest

from casemate_cli.failure import Failure
from casemate_cli.verbs.label import parse
from casemate_cli.verbs.logs import parse_name
from casemate_cli.verbs.wait import parse_goal
from casemate_wire.v1 import environment_pb2, meta_pb2


def message(phase: str = "Running", generation: int = 2, observed: int = 2) -> environment_pb2.Environment:
    return environment_pb2.Environment(
        metadata=meta_pb2.Meta(name="a", generation=generation),
        status=environment_pb2.EnvironmentStatus(
            phase=phase,
            observed_generation=observed,
            ready=2,
            conditions=[
                meta_pb2.Condition(type="Ready", status="True"),
                meta_pb2.Condition(type="Odd", status="False"),
            ],
        ),
    )


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ("phase=Running", True),
        ("phase=Ready,Running", True),
        ("phase=Ready", False),
        ("ready", False),
        ("condition=ready", True),
        ("condition=Odd", False),
        ("condition=Odd=false", True),
        ("jsonpath={.status.ready}=2", True),
        ("jsonpath={.status.ready}=3", False),
        ("jsonpath={.status.phase}", True),
        ("jsonpath={.status.nothing}", False),
        ("jsonpath={.status.nothing}=", True),
        ("delete", False),
    ],
)
def test_goals(goal: str, met: bool) -> None:
    assert parse_goal(goal).met(message()) is met


def test_a_phase_of_an_older_spec_does_not_count() -> None:
    assert not parse_goal("phase=Running").met(message(observed=1))


@pytest.mark.parametrize("goal", ["", "phase", "condition=", "gone", "jsonpath={.a", "delete=now"])
def test_a_goal_that_is_none(goal: str) -> None:
    with pytest.raises(Failure):
        parse_goal(goal)


def test_labels() -> None:
    targets, labels = parse(("env", "a", "b", "x=1", "y-", "z="))
    assert [t.name for t in targets] == ["a", "b"]
    assert labels == {"x": "1", "y": None, "z": ""}


@pytest.mark.parametrize("arguments", [("env", "a"), ("env", "x=1"), ("env", "a", "=1"), ("env", "a", "-")])
def test_labels_that_are_none(arguments: tuple[str, ...]) -> None:
    with pytest.raises(Failure):
        parse(arguments)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hello", ("hello", "")),
        ("hello-0.web", ("hello-0", "web")),
        ("env/hello", ("hello", "")),
        ("pod/hello-0.web", ("hello-0", "web")),
    ],
)
def test_names_of_logs(name: str, parts: tuple[str, str]) -> None:
    assert parse_name(name) == parts
