"""What all streams share: a number, credit, and an end."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .helper import Helper


class Stream:
    """Something that the host opened under a number: it sends within the credit that it was granted."""

    def __init__(self, helper: Helper, number: int, credit: int) -> None:
        self.helper, self.number, self.credit = helper, number, credit
        self.closed = False

    def pull(self) -> bool:
        """Send at most one chunk, if there is credit and something to send; whether it did."""
        return False

    def grant(self, amount: int) -> None:
        """The host can take ``amount`` bytes more."""
        self.credit = min(self.credit + amount, 1 << 30)
        self.helper.fill()

    def data(self, payload: bytes) -> None:
        """Bytes from the host."""

    def eof(self) -> None:
        """The host sends no more."""

    def end(self, **result: Any) -> None:
        """Close, and tell the host how it ended."""
        if not self.closed:
            self.close()
            self.helper.tell({"t": "end", "s": self.number, **result})

    def close(self) -> None:
        """Let go of everything; nothing is sent."""
        self.closed = True
        self.helper.streams.pop(self.number, None)
