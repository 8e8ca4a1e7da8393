"""What `casemate why` tells, as text."""

from casemate_cli.verbs.why import story
from casemate_wire.v1 import operators_pb2 as pb

ANSWER = pb.WhyResponse(
    hosts=12,
    reasons=[
        pb.WhyReason(reason="have too little memory", hosts=11, message="on h1: 4Gi is free, 8Gi is asked"),
        pb.WhyReason(reason="are not open to new instances", hosts=1),
    ],
    nearest=[pb.WhyMiss(host="h1", messages=["4Gi is free, 8Gi is asked", "the host is cordoned"])],
    suggestions=[
        pb.WhySuggestion(change="uncordon host h3", host="h3", command="casemate uncordon h3"),
        pb.WhySuggestion(change="ask for 4Gi", host="h1"),
    ],
)


def test_the_whole_story() -> None:
    assert story(ANSWER, "web-0") == [
        "instance web-0 fits on none of 12 hosts",
        "Refused:",
        "  11 hosts   have too little memory",
        "               on h1: 4Gi is free, 8Gi is asked",
        "  1 host     are not open to new instances",
        "Nearest:",
        "  h1",
        "    4Gi is free, 8Gi is asked",
        "    the host is cordoned",
        "Any one of these, tried with the scheduler, would place it:",
        "  uncordon host h3 (then on h3)",
        "      casemate uncordon h3",
        "  ask for 4Gi (then on h1)",
    ]


def test_where_it_is_and_where_it_could_be() -> None:
    assert story(pb.WhyResponse(placed=True, host="h1"), "a-0") == ["instance a-0 is placed on h1"]
    assert story(pb.WhyResponse(host="h2", hosts=2), "a-0") == ["instance a-0 fits on h2 now"]
    assert story(pb.WhyResponse(hosts=1), "a-0") == ["instance a-0 does not fit on the one host"]


def test_what_it_holds_and_how_far_a_gang_came() -> None:
    placed = pb.WhyResponse(
        placed=True,
        host="h1",
        hosts=3,
        holds=["2 vCPUs on threads 4-5 of cell 0"],
        reasons=[pb.WhyReason(reason="have enough as well", hosts=2, message="hosts have enough as well")],
    )
    assert story(placed, "a-0") == [
        "instance a-0 is placed on h1",
        "  2 vCPUs on threads 4-5 of cell 0",
        "Other hosts:",
        "  2 hosts    have enough as well",
    ]
    gang = pb.WhyResponse(hosts=2, group="1 of 3 instances find a place")
    assert story(gang, "a-0") == ["instance a-0 fits on none of 2 hosts", "  1 of 3 instances find a place"]


def test_what_hosts_say_cannot_command_a_terminal() -> None:
    evil = "on \x1b[2J\n"
    answer = pb.WhyResponse(
        hosts=3,
        reasons=[pb.WhyReason(reason=evil, message=evil)],
        nearest=[pb.WhyMiss(host=evil, messages=[evil])],
        suggestions=[pb.WhySuggestion(change=evil, host=evil, command=evil)],
        group=evil,
    )
    for lines in (
        story(answer, "a-0"),
        story(pb.WhyResponse(placed=True, host=evil, holds=[evil]), "a-0"),
        story(pb.WhyResponse(host=evil), "a-0"),
    ):
        assert all(line.isprintable() for line in lines)
