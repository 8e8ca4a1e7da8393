"""The systemd units: what must stay true of them, whatever else is changed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("agent/casemate-agent.service", "manager/casemate-manager.service")


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
    assert int(unit["LimitNOFILE"][0]) >= 65536


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


def test_the_manager_is_nobody_and_may_nothing() -> None:
    unit = settings(UNITS[1])
    assert unit["User"] == ["casemate-manager"]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["PrivateDevices"] == ["yes"]
    assert (unit["StateDirectoryMode"], unit["UMask"]) == (["0700"], ["0077"])


def test_sockets_of_guests_outlive_the_agent() -> None:
    assert settings(UNITS[0])["RuntimeDirectoryPreserve"] == ["yes"]
