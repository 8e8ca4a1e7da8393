"""PURE. Request keys: the same key again gets the same answer."""

from typing import Any, Final

from casemate_core.errors import CallerError, InvalidSpec, Violation, shown
from casemate_manager.fleet.records import RequestRecord

MAX_KEY: Final = 128


class KeyReused(CallerError):
    """The request key was used for another request."""

    reason = "RequestKeyReused"


def check_key(key: str) -> None:
    """Raises InvalidSpec for what is no key."""
    if not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidSpec((Violation("requestKey", shown(key), "is not 1 to 128 printable characters", "send a UUID"),))


def answered(known: RequestRecord, digest: str) -> Any:
    """The answer that was given. Raises KeyReused where the request was another one."""
    if known.digest != digest:
        raise KeyReused(f"request key {shown(known.key)!r} was used for another request")
    return known.answer
