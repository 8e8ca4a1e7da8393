"""The systemd units: what must stay true of them, whatever else is changed."""

from pathlib import Path

import pytest

from casemate_agent.relay.pipe import SOCKET, USER

ROOT = Path(__file__).resolve().parents[2]
AGENT, RELAY, MANAGER = UNITS = (
    "agent/casemate-agent.service",
    "agent/casemate-relay.service",
    "manager/casemate-manager.service",
)


def settings(name: str) -> dict[str, list[str]]:
    """Every setting of a unit, in order."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_progress_is_watched_and_nothing_else_is_ended_with_the_service(name: str) -> None:
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert unit["KillMode"] == ["process"]
    assert int(unit["WatchdogSec"][0]) >= 60  # the slowest round by right is told four times in it
    assert unit["Restart"] == ["always"]
    # A descriptor for each guest or host, or for each of the bounded connections of a relay.
    assert int(unit["LimitNOFILE"][0]) >= (4096 if name == RELAY else 65536)


@pytest.mark.parametrize("name", UNITS)
def test_it_is_confined(name: str) -> None:
    unit = settings(name)
    for key, value in (
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("RestrictSUIDSGID", "yes"),
    ):
        assert unit[key] == [value]


@pytest.mark.parametrize(("name", "user"), [(RELAY, "casemate-relay"), (MANAGER, "casemate-manager")])
def test_who_has_the_network_is_nobody_and_may_nothing(name: str, user: str) -> None:
    unit = settings(name)
    assert unit["User"] == [user]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["PrivateDevices"] == ["yes"]
    assert (unit["StateDirectoryMode"], unit["UMask"]) == (["0700"], ["0077"])


def test_who_is_root_has_no_network_and_sees_no_key() -> None:
    unit = settings(AGENT)
    assert "User" not in unit
    assert unit["RestrictAddressFamilies"] == ["AF_UNIX AF_NETLINK"]
    assert unit["IPAddressDeny"] == ["any"]
    assert "IPAddressAllow" not in unit
    assert unit["InaccessiblePaths"] == ["-/var/lib/casemate-relay"]
    assert unit["DevicePolicy"] == ["closed"]


def test_who_is_root_sees_who_has_a_device_open() -> None:
    """Without this capability the descriptors of QEMU, another user, are not to be read, and a device in use looks free."""
    assert "CAP_SYS_PTRACE" in settings(AGENT)["CapabilityBoundingSet"][0].split()
    assert "/dev/cpu_dma_latency rw" in settings(AGENT)["DeviceAllow"]


def test_the_relay_is_where_the_agent_looks_for_it() -> None:
    agent, relay = settings(AGENT), settings(RELAY)
    assert agent["ExecStart"][0].endswith(f"--relay {SOCKET}")
    assert SOCKET.startswith(f"/run/{relay['RuntimeDirectory'][0]}/")
    assert relay["User"] == [USER]
    assert f"u {USER} " in (ROOT / "agent/casemate-relay.sysusers.conf").read_text()
    # Neither needs the other to start: what runs on a host is looked after without the manager.
    assert "Requires" not in agent
    assert agent["Wants"] == ["casemate-relay.service"]


def test_sockets_of_guests_outlive_the_agent() -> None:
    assert settings(AGENT)["RuntimeDirectoryPreserve"] == ["yes"]
