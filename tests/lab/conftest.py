"""Tests on the emulated server (marker ``lab``): one server for all of them, with our agent in it, joined to a manager.

Each test leaves the server as it found it: no environments, no agent that is stopped, no VM.
"""

from collections.abc import Iterator

import pytest

from support.hostlab.server import Server, server_up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The server outlives the tests: it is started before the first one takes stock of what is there."""
    for item in items:
        if isinstance(item, pytest.Function) and "server" in item.fixturenames:
            item.fixturenames.insert(0, "server")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The server, for the session."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")

    def say(text: str) -> None:
        if reporter is not None:
            reporter.write_line(f"lab: {text}")

    with server_up(tmp_path_factory.mktemp("lab"), say) as made:
        yield made
