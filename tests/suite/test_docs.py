"""The documents keep what they promise: links that lead somewhere, and every dependency accounted for."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    dead = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert not dead


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """Every package that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    groups += project["dependency-groups"].values()
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for group in groups for line in group}


def locked() -> dict[str, set[str]]:
    versions: dict[str, set[str]] = {}
    for name in ("build.lock", "requirements.lock", "fuzz.lock"):
        for package, version in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / ".ci" / name).read_text(), re.MULTILINE):
            versions.setdefault(normal(package), set()).add(version)
    return versions


def written() -> dict[str, str]:
    """Package -> its line in docs/dependencies.md; ``a, -b`` in the first cell stands for ``a`` and ``a-b``."""
    lines = {}
    for line in (ROOT / "docs/dependencies.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| package"):
            continue
        first = ""
        for name in re.sub(r"\([^)]*\)", "", line.split("|")[1]).replace(" ", "").split(","):
            if not name.startswith("-"):
                first = name
            lines[normal(first + name if name.startswith("-") else name)] = line
    return lines


def test_every_python_dependency_is_locked_and_accounted_for() -> None:
    assert not declared() - locked().keys()
    assert not declared() - written().keys()


def test_the_versions_written_are_those_locked() -> None:
    """Type stubs are dated, not versioned."""
    lines, versions = written(), locked()
    wrong = {
        name: versions[name]
        for name in declared()
        if not name.startswith("types-") and not any(version in lines[name] for version in versions[name])
    }
    assert not wrong


def test_every_debian_package_is_accounted_for() -> None:
    sections = ("build", "run", "guest", "test")
    listed = subprocess.run([ROOT / ".ci/apt-install", "--list", *sections], capture_output=True, text=True, check=True)
    missing = [line for line in listed.stdout.splitlines() if not {*line.split(" | ")} & written().keys()]
    assert not missing


def test_locks_name_no_index() -> None:
    for name in ("build.lock", "requirements.lock", "fuzz.lock"):
        assert "://" not in (ROOT / ".ci" / name).read_text()
