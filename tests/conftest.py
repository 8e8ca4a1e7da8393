"""What every test gets: guards against leaks, golden files, groups with their times, and a private libvirtd.

The plug-ins below each own one of these; fixtures that a single package needs live beside its tests.
"""

import os
import signal

import hypothesis
import pytest

from casemate_wire.tls import only_tls13

only_tls13()  # a test may import gRPC before the packages that hold it to TLS 1.3
# Started in the background by a shell, we ignore the interrupt, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
pytest_plugins = ["support.guards", "support.golden", "support.groups", "support.libvirtd"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which library of GPUs ``tests/contract/test_nvml.py`` runs on."""
    parser.addoption("--real-gpu", action="store_true", help="run the suite of NVML on this machine's own library")


# A property test that fails says how to replay itself. In CI the examples are the same on each run, so that a change is
# never blamed for what another seed would have found yesterday; by hand, each run looks at new ones.
hypothesis.settings.register_profile("casemate", deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile(
    "casemate-ci", parent=hypothesis.settings.get_profile("casemate"), derandomize=True
)
hypothesis.settings.load_profile("casemate-ci" if os.environ.get("CI") == "true" else "casemate")
