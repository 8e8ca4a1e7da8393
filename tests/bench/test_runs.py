"""That the measurements run, on small fleets, and say what they promise; the figures come from ``make bench-NAME``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
#: Several processes start one after the other in each; on a machine with other work that takes a while.
pytestmark = pytest.mark.timeout(300)


def measured(program: str, *options: str) -> dict[str, Any]:
    """The JSON of the last line."""
    done = subprocess.run(
        [sys.executable, str(HERE / f"{program}.py"), *options],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("program", "options", "keys"),
    [
        (
            "placement",
            ("--hosts", "20", "--count", "100"),
            {"hosts", "placements_per_s", "durable_placements_per_s", "p50_ms", "p99_ms", "many_cells_ms"},
        ),
        ("million", ("--count", "200", "--hosts", "6", "--trouble", "2"), {"placements", "refused_by_hosts", "digest"}),
        (
            "joins",
            ("--agents", "12", "--seconds", "1", "--rate", "50"),
            {
                "joins_per_s",
                "kb_per_stream",
                "delta_p99_ms",
                "deltas_per_manager_cpu_s",
                "all_back_s",
                "operator_p99_ms",
            },
        ),
        ("relay", ("--changes", "5"), {"alone_mb", "root_mb", "relay_mb", "direct_p50_ms", "relayed_p50_ms"}),
        ("signed", ("--seconds", "0.02"), {"sign_us", "verify_us", "stream_begins_us"}),
        ("why", ("--hosts", "40", "--rounds", "2"), {"hosts", "warming_s", "worst_s", "worst_stall_ms"}),
    ],
)
def test_it_runs(program: str, options: tuple[str, ...], keys: set[str]) -> None:
    assert keys <= measured(program, *options).keys()


def test_a_run_that_is_cut_short_settles_and_tells_what_it_got() -> None:
    found = measured("million", "--count", "1000000", "--hosts", "6", "--minutes", "0.02")
    assert 0 < found["placements"] < 1_000_000
    assert found["refused_by_hosts"] == found["invariants_broken"] == 0
