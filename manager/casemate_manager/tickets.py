"""Tickets of users: each opens one stream to a guest, once, within `LIFE_S`, for one user, one action and one instance.

Theory of operation. A ticket is a random word that the manager gives out after it has judged the caller, and keeps as a
digest, in memory alone: a manager that starts anew knows none, and callers ask again. Whoever opens a stream shows one beside his
identity. It is taken out of the table before anything of it is compared, so that of any number who show it at once one gets
in, and a ticket that was shown by the wrong user or for another purpose is spent. What is written down of it is its `id`, of
which the ticket cannot be made.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from casemate_core.errors import CallerError, Unavailable

PREFIX: Final = "ctk_"
LIFE_S: Final = 30.0
#: Tickets that wait to be used: of one user (the oldest gives way), and of all.
MOST_OF_ONE: Final = 128
MOST: Final = 16_384
MAX_LENGTH: Final = 128


class TicketRefused(CallerError):
    """The ticket does not open this."""

    reason = "TicketRefused"


@dataclass(frozen=True, slots=True)
class _Waiting:
    user: str
    action: str
    instance: str
    expires_s: float


def id_of(ticket: str) -> str:
    """What a ticket is called where it is written down."""
    return _digest(ticket)[:12]


def _digest(ticket: str) -> str:
    return hashlib.sha256(ticket.encode(errors="surrogatepass")).hexdigest()


class Tickets:
    """See the module. ``clock`` gives seconds since the epoch."""

    def __init__(
        self, clock: Callable[[], float], random: Callable[[], str] = lambda: secrets.token_urlsafe(24)
    ) -> None:
        self._clock = clock
        self._random = random
        #: By digest, in the order in which they were made, which is that in which they end.
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._of: dict[str, OrderedDict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def issue(self, user: str, action: str, instance: str) -> tuple[str, float]:
        """A ticket and when it ends. Raises Unavailable where too many wait."""
        now_s = self._clock()
        self._forget(now_s)
        mine = self._of.setdefault(user, OrderedDict())
        if len(mine) >= MOST_OF_ONE:
            self._take(next(iter(mine)))
            mine = self._of.setdefault(user, OrderedDict())
        if len(self._waiting) >= MOST:
            raise Unavailable("too many tickets wait to be used; try again in a few seconds")
        ticket = PREFIX + self._random()
        digest = _digest(ticket)
        self._waiting[digest] = _Waiting(user, action, instance, now_s + LIFE_S)
        mine[digest] = None
        return ticket, now_s + LIFE_S

    def redeem(self, ticket: str, user: str, action: str, instance: str) -> str:
        """Use it up; its id. Raises TicketRefused."""
        if not ticket:
            raise TicketRefused(f"a ticket is needed to {action}: ask Channels.Admit for one, or use a newer casemate")
        found = self._take(_digest(ticket)) if len(ticket) <= MAX_LENGTH else None
        if found is None:
            raise TicketRefused("no such ticket, or it was used, or its time is over: ask for another")
        if self._clock() >= found.expires_s:
            raise TicketRefused(f"the ticket's time is over: use it within {LIFE_S:g} s")
        if found.user != user:
            raise TicketRefused("the ticket was given to somebody else, and is spent: ask for one of your own")
        if (found.action, found.instance) != (action, instance):
            raise TicketRefused(f"the ticket is not for {action} at this instance, and is spent: ask for another")
        return id_of(ticket)

    def _take(self, digest: str) -> _Waiting | None:
        found = self._waiting.pop(digest, None)
        if found is not None:
            mine = self._of[found.user]
            del mine[digest]
            if not mine:
                del self._of[found.user]
        return found

    def _forget(self, now_s: float) -> None:
        """Drop what has ended."""
        while self._waiting:
            digest, first = next(iter(self._waiting.items()))
            if first.expires_s > now_s:
                return
            self._take(digest)
