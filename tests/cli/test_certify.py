"""casemate certify: asked for, waited for, shown; and the profile in describe."""

from collections.abc import Iterator

import pytest

from casemate_cli import profiles
from casemate_wire.v1 import realtime_pb2 as pb
from support.fleet import Fleet

MANIFEST = """\
apiVersion: casemate/v1
kind: Environment
metadata: {{name: {name}}}
spec:
  cpu: {{count: 1}}
  memory: {{size: 256Mi}}
  image: debian-13
"""


def make(fleet: Fleet, name: str) -> None:
    fleet.run("apply", "-f", "-", stdin=MANIFEST.format(name=name)).ok()
    fleet.run("wait", f"env/{name}", "--for", "ready", "--timeout", "60s").ok()


@pytest.fixture
def name(fleet: Fleet) -> Iterator[str]:
    yield "certified"
    fleet.run("delete", "env", "certified", "--ignore-not-found").ok()


def test_a_certificate_is_measured_kept_and_marked_as_what_it_is(fleet: Fleet, name: str) -> None:
    make(fleet, name)
    told = fleet.run("certify", name, "--duration", "1s").ok()
    assert f"instance/{name}-0: certify done: " in told and "MEANINGLESS" in told
    row = next(line for line in told.splitlines() if line.startswith(f"{name}-0 "))
    assert "0 µs" in row and "no: MEANINGLESS: the guest is simulated" in row
    assert f"{name}-0" in fleet.run("certify", "--show").ok()
    shown = fleet.run("describe", f"inst/{name}-0").ok()
    assert "Certificate:" in shown and "MEANINGLESS: the guest is simulated" in shown and "cyclictest" in shown
    assert "certificate:" in fleet.run("get", "operations", "-o", "yaml").ok(), "it stays with the operation too"


def test_what_cannot_be_measured_is_refused_by_its_field(fleet: Fleet, name: str) -> None:
    make(fleet, name)
    short = fleet.run("certify", name, "--duration", "60s", "--timeout", "30s")
    assert short.code == 1 and "timeout" in short.err and "is too short to measure for 60 s" in short.err
    nothing = fleet.run("certify")
    assert nothing.code != 0 and "nothing is named" in nothing.err
    assert "out of range" in fleet.run("certify", name, "--duration", "2h").err


def test_lines_of_a_profile_say_what_is_broken_and_what_to_do() -> None:
    lines = [
        pb.ProfileLine(name="thp", state="held", wanted="never", found="never", source="/sys/x"),
        pb.ProfileLine(name="ksm", state="broken", wanted="0", found="1", source="/sys/y", remedy="write 0 there"),
    ]
    shown = list(profiles.profile(lines))
    assert shown[0].split() == ["thp", "held", "never", "(/sys/x)"]
    assert shown[1].split() == ["ksm", "BROKEN", "1", "(/sys/y)"] and shown[2].strip() == "wanted 0: write 0 there"


def test_a_certificate_begins_with_why_it_does_not_count() -> None:
    c = pb.Certificate(samples=10, max_us=7, void="the host runs kernel 6.13 since", overflows=1)
    c.histogram.add(upto_us=3, count=9)
    shown = list(profiles.certificate(c))
    assert shown[0] == "VOID: the host runs kernel 6.13 since"
    assert any("≤     3 µs" in line and "#" * profiles.BAR in line for line in shown)
    assert any(line.split() == ["beyond", "1"] for line in shown)
