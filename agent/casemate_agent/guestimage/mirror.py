"""Where this machine gets its Debian packages from, read from apt's own configuration.

A guest image is built from the mirror that the administrator chose for the host; no address is written in this
program. The parser is pure; `ask_apt` runs ``apt-get indextargets``.
"""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_FORMAT = "$(RELEASE)\t$(COMPONENT)\t$(REPO_URI)"


class NoMirror(RuntimeError):
    """apt knows no Debian archive that the guest's packages could come from."""


@dataclass(frozen=True, slots=True)
class Mirrors:
    """The archive's base addresses: the release itself, and its security updates where apt has them."""

    main: str
    security: str | None


def parse(lines: Iterable[str], codename: str) -> Mirrors:
    """Pick the mirrors out of apt's index targets, one ``release TAB component TAB address`` a line.

    ``codename`` is the host's own release: the guest's release lies on the same mirror under another name. Raises
    `NoMirror`.
    """
    found: dict[str, str] = {}
    for line in lines:
        fields = line.split("\t")
        if len(fields) == 3 and fields[1] == "main":
            found.setdefault(fields[0], fields[2].strip().rstrip("/"))
    main = found.get(codename)
    if main is None:
        raise NoMirror(f"apt has no index for {codename}/main: check /etc/apt/sources.list*, then run `apt-get update`")
    return Mirrors(main, found.get(f"{codename}-security"))


def sources(mirrors: Mirrors, suite: str, keyring: str) -> list[str]:
    """The sources.list lines of ``suite``, verified with ``keyring`` alone."""
    option = f"[signed-by={keyring}]"
    lines = [f"deb {option} {mirrors.main} {suite} main", f"deb {option} {mirrors.main} {suite}-updates main"]
    if mirrors.security is not None:
        lines.append(f"deb {option} {mirrors.security} {suite}-security main")
    return lines


def ask_apt(codename: str) -> Mirrors:
    """Ask apt for its mirrors. Raises `NoMirror`, also when apt itself is missing or fails."""
    command = ["apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoMirror(f"apt-get indextargets failed: {error}") from error
    return parse(done.stdout.splitlines(), codename)
