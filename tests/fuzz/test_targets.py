"""Each parser of foreign bytes on its seeds, on small changes of them, and on everything that ever broke one."""

import random
from pathlib import Path

import pytest

from fuzz.targets import TARGETS, changed, tried

HERE = Path(__file__).parent
#: Inputs that broke a target once, each in a folder of its target's name.
FOUND = sorted((HERE / "found").rglob("*.bin"))


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_begins_with_is_read(name: str) -> None:
    """At least one seed is taken whole: a target that refuses everything tests nothing behind its first check."""
    target, seeds = TARGETS[name]
    taken = 0
    for data in seeds():
        tried(name, data)
        try:
            target(data)
        except Exception:  # a refusal, or the line before would have failed
            continue
        taken += 1
    # A certificate alone leads to no authority, and a message signed by nobody is none: refused late, not early.
    assert taken or name in {"certificate", "signed"}


@pytest.mark.parametrize("name", TARGETS)
def test_small_changes_are_taken_or_refused(name: str) -> None:
    random_ = random.Random(name)
    seeds = TARGETS[name][1]()
    for _ in range(300):
        data = random_.choice(seeds)
        for _ in range(random_.randint(1, 4)):
            data = changed(data, random_)
        tried(name, data)


def test_what_broke_a_target_once_does_not_again() -> None:
    for path in FOUND:
        tried(path.parent.name, path.read_bytes())
