"""Groups of tests: the order they run in, the time each takes, and that none is skipped.

A test belongs to the group of its marker (libvirt, lab, browser, etcd), or else of its folder. Cheap groups run first, so
that a slip in the arithmetic is told in seconds. A skipped test counts as failed: what cannot run here is deselected by
its marker, by hand and in sight.
"""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

SLOW = ("browser", "etcd", "libvirt", "lab")
"""Groups by marker, in the order they run, after everything unmarked."""

TESTS = Path(__file__).resolve().parent.parent


def group_of(item: pytest.Item) -> str:
    for marker in SLOW:
        if item.get_closest_marker(marker) is not None:
            return marker
    try:
        return item.path.parent.relative_to(TESTS).parts[0]
    except (ValueError, IndexError):
        return "other"


class Groups:
    """Counts and times of one session, by group."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.tests: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.of = {item.nodeid: group_of(item) for item in items}
        rank = {marker: place for place, marker in enumerate(SLOW, start=1)}
        items.sort(key=lambda item: rank.get(self.of[item.nodeid], 0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
        report = yield
        if report.skipped and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, and here nothing may be: {report.longrepr}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        group = self.of.get(report.nodeid, "other")
        self.seconds[group] += report.duration
        self.tests[group] += report.when == "call"
        self.failed[group] += report.failed

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.seconds:
            return
        terminalreporter.section("groups")
        for group in sorted(self.seconds, key=lambda name: (name in SLOW, name)):
            failed = f"  {self.failed[group]} failed" if self.failed[group] else ""
            terminalreporter.line(f"{group:<12} {self.tests[group]:>6} tests {self.seconds[group]:>8.1f} s{failed}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Groups(), "casemate-groups")
