"""The shipped units, as systemd runs them: who is who, what each may, and that it is enough.

The other tests of this folder run under the same units; here is what is asked of the units themselves.
"""

import json
import sys
from typing import Any

import pytest

from support.hostlab.server import HOST, Server

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]

AGENT, RELAY = "casemate-agent", "casemate-relay"
#: Bits of capability(7) that the agent's unit leaves.
CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "NET_ADMIN": 12,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "SYS_NICE": 23,
    "SYS_RESOURCE": 24,
}


def main_pid(server: Server, unit: str) -> str:
    return server.machine.run(f"systemctl show -P MainPID {unit}").strip()


def status(server: Server, unit: str) -> dict[str, str]:
    """/proc/PID/status of a unit's process."""
    lines = server.machine.read(f"/proc/{main_pid(server, unit)}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_root_has_no_network_and_who_has_it_is_nobody(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    agent, relay = status(server, AGENT), status(server, RELAY)
    user = server.machine.run("id -u casemate-relay").strip()
    assert user != "0"
    assert agent["Uid"].split() == ["0"] * 4
    assert relay["Uid"].split() == [user] * 4
    assert relay["CapBnd"] == relay["CapEff"] == "0" * 16
    assert int(agent["CapBnd"], 16) == int(agent["CapEff"], 16) == sum(1 << bit for bit in CAPABILITIES.values())
    for each in (agent, relay):
        assert (each["NoNewPrivs"], each["Seccomp"]) == ("1", "2")
    # Sockets of the network, by process: the way to the manager and the port for scrapers are the relay's, the agent has none.
    sockets = server.machine.run("ss -H -t -u -a -n -p")
    assert f"pid={main_pid(server, RELAY)}," in sockets
    assert f"pid={main_pid(server, AGENT)}," not in sockets
    # Nor could it have one: what the kernel says to a process in the agent's confinement that asks for one.
    properties = [
        "RestrictAddressFamilies",
        "IPAddressDeny",
        "SystemCallFilter",
        "CapabilityBoundingSet",
        "NoNewPrivileges",
    ]
    shown = server.machine.run(f"systemctl show -p {','.join(properties)} {AGENT}").splitlines()
    assert "RestrictAddressFamilies=AF_NETLINK AF_UNIX" in [" ".join(sorted_words(line)) for line in shown]
    exposure = server.machine.run(f"systemd-analyze security {AGENT} {RELAY} --no-pager")
    with capsys.disabled():
        sys.stdout.write(f"\n{exposure}")


def sorted_words(line: str) -> list[str]:
    """``Key=b a`` as its words in order, the key before the first."""
    key, _, value = line.partition("=")
    first, *others = sorted(value.split()) or [""]
    return [f"{key}={first}", *others]


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_PACKET"])
def test_within_the_agents_confinement_no_socket_of_the_network_opens(server: Server, family: str) -> None:
    script = f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)"
    said = server.machine.run(
        f"systemd-run -q --wait --pipe -p RestrictAddressFamilies='AF_UNIX AF_NETLINK' python3 -c '{script}' 2>&1",
        check=False,
    )
    assert "Address family not supported" in said


def test_a_vm_is_made_and_outlives_both_halves(server: Server) -> None:
    server.make_fleet()
    server.apply("confined", "  nics: [{network: fronthaul, type: sriov}]\n")
    try:
        before = server.started("confined")
        for unit in (AGENT, RELAY):
            pid = main_pid(server, unit)
            server.machine.run(f"kill -9 {pid}")
            server.until(f"another {unit} runs", lambda unit=unit, pid=pid: main_pid(server, unit) not in ("0", pid))  # type: ignore[misc]
            server.until("it is joined again", server.joined)
            server.until("systemd calls it active", lambda unit=unit: active(server, unit))  # type: ignore[misc]
            after = server.started("confined")
            assert after["status"]["pid"] == before["status"]["pid"]
        assert server.get("host", HOST)["status"]["phase"] == "Ready"
    finally:
        server.deleted("confined")


def active(server: Server, unit: str) -> bool:
    return server.machine.run(f"systemctl is-active {unit}", check=False).strip() == "active"


def test_a_relay_that_hangs_is_ended_by_its_watchdog_and_the_agent_goes_on(server: Server) -> None:
    agent, pid = main_pid(server, AGENT), main_pid(server, RELAY)
    server.machine.run(f"kill -STOP {pid}")
    server.until("another relay runs", lambda: main_pid(server, RELAY) not in ("0", pid))
    server.until("the host has joined again", server.joined)
    assert main_pid(server, AGENT) == agent
    assert "watchdog" in server.machine.run(f"journalctl -u {RELAY} --no-pager -o cat").lower()


def test_metrics_of_root_are_served_by_the_relay(server: Server) -> None:
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9470/metrics', timeout=30).read().decode())"

    def scraped() -> str:
        return server.machine.run(f'python3 -c "{ask}"', check=False, timeout_s=60)

    server.until("the agent has come to be scraped", lambda: "casemate_rounds_total" in scraped())


def test_the_key_is_the_relays_alone(server: Server) -> None:
    folder = "/var/lib/casemate-relay/identity"
    rights: Any = server.machine.run(f"stat -c '%U %a' {folder} {folder}/identity.json").split()
    assert rights == ["casemate-relay", "700", "casemate-relay", "600"]
    pid = main_pid(server, AGENT)
    said = server.machine.run(f"nsenter -m -t {pid} cat {folder}/identity.json 2>&1", check=False)
    assert "BEGIN" not in said
    key = json.loads(server.machine.read(f"{folder}/identity.json"))["host"]
    assert key == HOST
