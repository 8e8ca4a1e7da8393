"""What an event follows from. Standard library only.

A request that changes something is known by its key, which its client chose. Whatever follows from it, at the manager, on
hosts and in guests, carries the request's *cause*: a short name made from the key, so that it is the same wherever it is
made, can be typed, and carries nothing that a client wrote. What happens by itself (a guest that crashes at night) has none.
"""

import hashlib
from typing import Final

PREFIX: Final = "r-"
_DIGITS: Final = 12


def cause_of(request_key: str) -> str:
    """The cause of everything that follows from the request with this key."""
    return PREFIX + hashlib.sha256(f"cause\0{request_key}".encode()).hexdigest()[:_DIGITS]
