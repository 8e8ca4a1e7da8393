"""The session's private libvirtd, for every folder of tests. A plug-in, which tests/conftest.py names.

It is a plug-in because a session's fixture that two conftest.py import is two fixtures to pytest, and both would start.
libvirt is imported when a test first asks for it, since most runs never do.
"""

from collections.abc import Iterator

import pytest

from casemate_agent import sandbox as sandboxes


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sandboxes.Sandbox]:
    """A libvirtd that nothing runs on yet; everything of it is ended with the session."""
    from casemate_agent.drivers.virtlines import EventLoop

    folder = tmp_path_factory.mktemp("v") / "lv"
    EventLoop.ensure()  # its thread stays: it starts before a test takes stock of what is there
    try:
        yield sandboxes.up(folder)
    finally:
        sandboxes.down(folder)
