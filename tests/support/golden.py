"""Golden files: what the code writes, compared with what a person once read and kept.

``golden("domain/plain.xml", text)`` compares with tests/golden/domain/plain.xml. ``pytest --regenerate`` writes the
files instead; the change is then read in the diff. A file that is missing fails the test: it is not written in passing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--regenerate") and os.environ.get("CI") == "true":
        raise pytest.UsageError("--regenerate is for people: in CI a golden file is compared, never written")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, actual)``: fail unless tests/golden/``name`` holds exactly ``actual``."""

    def compare(name: str, actual: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(actual)
            return
        if not path.exists():
            pytest.fail(f"no golden file tests/golden/{name}; write it with --regenerate, then read it", pytrace=False)
        assert actual == path.read_text(), f"differs from tests/golden/{name}; --regenerate rewrites it"

    return compare
