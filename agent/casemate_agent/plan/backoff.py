"""When a failed attempt is made again. PURE.

Exponential back-off with a spread that follows from the instance's uid, so that many instances that failed together do
not come back together, and the same incident replays the same way.
"""

import hashlib

BASE_S = 1.0
CAP_S = 300.0


def delay_s(count: int, key: str, base_s: float = BASE_S, cap_s: float = CAP_S) -> float:
    """Seconds to wait after ``count`` failures in a row (1 or more): doubling, between half and the whole of it."""
    if count < 1:
        return 0.0
    full = min(cap_s, base_s * 2.0 ** min(count - 1, 40))
    digest = hashlib.blake2b(f"{key}/{count}".encode(), digest_size=4).digest()
    spread = int.from_bytes(digest, "big") / 2**32
    return full * (0.5 + spread / 2)
