"""PURE. What both ends share: limits, credit, and the cutting of transfers into parts."""

from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from casemate_core.errors import CallerError
from casemate_core.spec.instance import DesiredInstance
from casemate_wire.stream import (
    Credit,
    Desired,
    Facts,
    HostEvent,
    Inventory,
    Measurement,
    OpenChannel,
    Operate,
    Outcome,
)

T = TypeVar("T")

#: Messages that use up credit.
COUNTED: Final = (Inventory, Facts, Outcome, HostEvent, Measurement, Desired, Operate, OpenChannel)

#: Counted messages that an end lets the other have in flight.
WINDOW: Final = 64

#: Parts of a transfer: at most so many records, and about so many characters of their free text; well under the 4 MiB
#: that gRPC takes by default.
PART_RECORDS: Final = 64
PART_CHARACTERS: Final = 512 * 1024

#: Events and outcomes kept for a manager that is away; the oldest events go first.
OUTBOX_LIMIT: Final = 1000

#: Operations and channel tickets that wait for credit.
ONCE_LIMIT: Final = 256


class ProtocolError(CallerError):
    """The other end broke the stream's rules: the session ends."""

    reason = "Protocol"


class Busy(CallerError):
    """The other end does not take more at the moment; nothing was sent."""

    reason = "Busy"


class Credits:
    """Credit of one direction at the sender, and the grants owed at the receiver."""

    def __init__(self, window: int) -> None:
        self.window = window
        #: What we may still send.
        self.may_send = 0
        #: What the other may still send.
        self.granted = 0
        self._consumed = 0

    def arrived(self) -> None:
        if self.granted <= 0:
            raise ProtocolError("message beyond the credit given")
        self.granted -= 1

    def consumed(self, messages: int) -> None:
        self._consumed += messages

    @property
    def owed(self) -> bool:
        """Whether there is a grant to be made: in steps of half a window, so that grants are few."""
        return self._consumed >= max(1, self.window // 2)

    def grant(self) -> Credit | None:
        """Give back what was consumed, where enough is owed."""
        if not self.owed:
            return None
        given, self._consumed = self._consumed, 0
        self.granted += given
        return Credit(given)


def weight(record: DesiredInstance) -> int:
    texts = sum(len(place) + 80 + len(secret.text or "") for place, secret in record.secrets.items())
    return 2048 + len(record.user_data) + sum(len(repr(pod)) for pod in record.pods) + texts


def cut_parts(records: Sequence[T], weights: Iterable[int]) -> list[tuple[T, ...]]:
    """Cut into runs within PART_RECORDS and PART_CHARACTERS, at least one (it may be empty)."""
    parts: list[tuple[T, ...]] = []
    part: list[T] = []
    total = 0
    for record, weight in zip(records, weights, strict=True):
        if part and (len(part) >= PART_RECORDS or total + weight > PART_CHARACTERS):
            parts.append(tuple(part))
            part, total = [], 0
        part.append(record)
        total += weight
    parts.append(tuple(part))
    return parts
