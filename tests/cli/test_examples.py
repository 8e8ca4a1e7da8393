"""Every example is taken by the schema and by the checks of meaning; the first one is the one that is shipped."""

from importlib import resources
from pathlib import Path

import pytest

from casemate_cli import manifests
from casemate_wire.codec.resources import from_message

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.rglob("*.yaml"))


def test_there_are_examples() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_an_example_is_good(path: Path) -> None:
    for resource in manifests.load((str(path),), recursive=False, tenant="default"):
        from_message(resource)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_an_example_is_listed(path: Path) -> None:
    listed = (EXAMPLES / "README.md").read_text()
    relative = path.relative_to(EXAMPLES)
    assert f"`{relative.parts[0]}{'/' if len(relative.parts) > 1 else ''}`" in listed


def test_the_first_example_is_the_shipped_one() -> None:
    shipped = resources.files("casemate_cli.dev").joinpath("hello.yaml").read_bytes()
    assert (EXAMPLES / "hello.yaml").read_bytes() == shipped


def test_the_shipped_images_of_simulated_hosts_are_good() -> None:
    text = resources.files("casemate_cli.dev").joinpath("simulated-images.yaml").read_bytes()
    for resource in manifests.parse(text, "simulated-images.yaml", tenant=""):
        from_message(resource)
