"""The list of Debian packages and its reader."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def apt_install(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci/apt-install", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("section", ["build", "run", "guest", "test", "lab"])
def test_sections_list_plain_names(section: str) -> None:
    names = apt_install("--list", section).stdout.replace("|", " ").split()
    assert names
    assert all(name.replace("-", "").replace(".", "").replace("+", "").isalnum() for name in names)


def test_alternatives_stay_on_one_line() -> None:
    assert "pkg-config | pkgconf" in apt_install("--list", "build").stdout.splitlines()


def test_sections_are_merged_without_repeats() -> None:
    both = apt_install("--list", "guest", "lab").stdout.splitlines()
    assert len(both) == len(set(both))
    assert "mmdebstrap" in both


def test_an_unknown_section_is_named() -> None:
    done = apt_install("--check", "run", "rum")
    assert done.returncode == 2
    assert "[rum]" in done.stderr


def test_nothing_pulls_in_an_init_system() -> None:
    """libvirt-daemon-system depends on one."""
    names = apt_install("--list", "build", "run", "guest", "test").stdout.split()
    assert not {"libvirt-daemon-system", "systemd", "systemd-sysv", "sysvinit-core"} & set(names)
