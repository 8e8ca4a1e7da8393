"""Tests on the emulated server (marker ``lab``): one server for all of them, with our agent in it, joined to a manager.

Each test leaves the server as it found it: no environments, no agent that is stopped, no VM. One that fails says what agent,
relay, kernel and manager said last.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from support.hostlab import mortal
from support.hostlab.build import Say
from support.hostlab.server import Server, server_up, servers_up

SESSION = ("server", "servers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The server outlives the tests: it is started before the first one takes stock of what is there."""
    for item in items:
        if isinstance(item, pytest.Function):
            for name in set(SESSION) & set(item.fixturenames):
                item.fixturenames.insert(0, name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """The story of a failure, within its report."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for name in SESSION:
            found: Any = item.funcargs.get(name, [])
            for server in [found] if isinstance(found, Server) else found:
                report.sections.append((f"emulated server {server.host}", server.story()))
    return report


def sayer(request: pytest.FixtureRequest) -> Say:
    """Progress, on the terminal of whoever runs this, and not into what is captured of a test."""
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
            sys.stdout.write(f"\nlab: {text}")
            sys.stdout.flush()

    return say


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The server, for the session."""
    with server_up(tmp_path_factory.mktemp("lab"), sayer(request)) as made:
        yield made


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[list[Server]]:
    """Two servers on one wire, joined to one manager, for the session (marker ``two_labs``)."""
    with servers_up(tmp_path_factory.mktemp("labs"), sayer(request), count=2) as made:
        yield made


@pytest.fixture
def mortal_agent(server: Server) -> Iterator[None]:
    """Its agent can be told where to die (`hostlab.mortal`)."""
    mortal.prepare(server)
    yield
    mortal.undo(server)
