"""The suites of this folder say what a port means. Each runs on the simulated driver and, marked libvirt, on the real one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.contract import Bench, real_bench, simulated_bench


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The private libvirtd lives as long as the session: it is started before a test takes stock of what is there."""
    for item in items:
        if isinstance(item, pytest.Function) and "bench" in item.fixturenames and item.get_closest_marker("libvirt"):
            item.fixturenames.insert(0, "sandbox")


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.libvirt)])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """A host with nothing on it."""
    making = (
        simulated_bench() if request.param == "simulated" else real_bench(request.getfixturevalue("sandbox"), tmp_path)
    )
    async with making as made:
        yield made
