"""The record of an instance as its domain carries it: values only. PURE.

What may live here: the two directions between a desired instance and the text in a domain's metadata.
"""

import json
from dataclasses import replace
from functools import lru_cache

from casemate_core.errors import CallerError
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.instance import DesiredInstance


def bare(desired: DesiredInstance) -> DesiredInstance:
    """The record without its order and secrets: what a domain is made from, and may be rebuilt from, without doing anything
    again."""
    return desired if desired.order is None and not desired.secrets else replace(desired, order=None, secrets={})


def to_metadata(desired: DesiredInstance) -> str:
    """The record as a domain's metadata carries it: JSON, whole, so that a lost ledger is rebuilt from the domain."""
    return json.dumps(to_plain(bare(desired)), sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=1024)
def from_metadata(text: str) -> DesiredInstance | None:
    """The record that a domain's metadata carries; None where it is not readable."""
    try:
        return from_plain(DesiredInstance, json.loads(text), ignore_unknown=True)
    except (ValueError, TypeError, CallerError):
        return None
