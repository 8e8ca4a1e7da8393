"""PURE. A join token as text: ``cmt1.HOST.ID.SECRET.PIN``, one word that survives a shell and a chat.

``HOST`` and ``ID`` say whom it lets in and under what name operators list it; ``PIN`` is SHA-256 of the authority's certificate
in hex, by which the machine knows the manager before it says anything.
"""

import re
from dataclasses import dataclass, field
from typing import Final

from casemate_core.errors import CallerError

_FORM: Final = re.compile(r"cmt1\.([a-z0-9-]{1,63})\.([0-9a-f]{12})\.([A-Za-z0-9_-]{32})\.([0-9a-f]{64})")


class BadToken(CallerError):
    """What was given is no join token."""

    reason = "BadToken"


@dataclass(frozen=True, slots=True)
class Token:
    """A join token. ``secret`` is not in its repr."""

    id: str
    secret: str = field(repr=False)
    host: str
    pin: str

    def __str__(self) -> str:
        return f"cmt1.{self.host}.{self.id}.{self.secret}.{self.pin}"


def parse(text: str) -> Token:
    """A token from text. Raises BadToken, which does not repeat what was given."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise BadToken(
            "this is no join token: it begins with cmt1. and is one word; make one: casemate host token create"
        )
    return Token(found[2], found[3], found[1], found[4])
