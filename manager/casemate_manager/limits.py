"""PURE. How often a caller may ask: a token bucket for each tenant, and places in flight of which some are kept for operators.

Theory of operation. A bucket fills by ``rate`` a second up to ``burst``; a call takes a token or is told when there will be one.
Calls of tenants may fill only a part of the places in flight: whoever runs the fleet gets through while tenants storm.
Time is a parameter. Buckets that are full again are forgotten, so that what is kept stays bounded.
"""

from dataclasses import dataclass
from typing import Final

#: Sustained calls a second and burst of one tenant.
RATE: Final = 100.0
BURST: Final = 400.0
#: Calls in flight: all of them, those of all tenants together, those of one tenant.
IN_FLIGHT: Final = 512
TENANTS_IN_FLIGHT: Final = 384
TENANT_IN_FLIGHT: Final = 128
#: Buckets kept before full ones are looked for.
BUCKETS: Final = 4096


@dataclass(slots=True)
class Bucket:
    """Tokens at a time."""

    tokens: float
    at_s: float


class Limiter:
    """All callers of one manager."""

    def __init__(
        self,
        rate: float = RATE,
        burst: float = BURST,
        in_flight: int = IN_FLIGHT,
        tenants_in_flight: int = TENANTS_IN_FLIGHT,
        tenant_in_flight: int = TENANT_IN_FLIGHT,
    ) -> None:
        self._rate, self._burst = rate, burst
        self._most, self._most_tenants, self._most_tenant = in_flight, tenants_in_flight, tenant_in_flight
        self._buckets: dict[str, Bucket] = {}
        self._flying: dict[str, int] = {}
        self._tenants_flying = 0
        self._operators_flying = 0

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, key: str, now_s: float) -> float:
        """Take a token of ``key``'s bucket: 0.0, or the seconds until there is one (and none is taken)."""
        bucket = self._buckets.get(key)
        if bucket is None:
            self._forget(now_s)
            bucket = self._buckets[key] = Bucket(self._burst, now_s)
        bucket.tokens = min(self._burst, bucket.tokens + max(0.0, now_s - bucket.at_s) * self._rate)
        bucket.at_s = max(bucket.at_s, now_s)
        if bucket.tokens < 1.0:
            return (1.0 - bucket.tokens) / self._rate
        bucket.tokens -= 1.0
        return 0.0

    def _forget(self, now_s: float) -> None:
        if len(self._buckets) < BUCKETS:
            return
        full_s = self._burst / self._rate
        self._buckets = {k: b for k, b in self._buckets.items() if now_s - b.at_s < full_s}

    def enter(self, key: str, *, operator: bool) -> bool:
        """Take a place in flight; False where there is none for this caller. Give it back with `leave`."""
        if self._tenants_flying + self._operators_flying >= self._most:
            return False
        if operator:
            self._operators_flying += 1
            return True
        if self._tenants_flying >= self._most_tenants or self._flying.get(key, 0) >= self._most_tenant:
            return False
        self._tenants_flying += 1
        self._flying[key] = self._flying.get(key, 0) + 1
        return True

    def leave(self, key: str, *, operator: bool) -> None:
        """Give the place back."""
        if operator:
            self._operators_flying -= 1
            return
        self._tenants_flying -= 1
        self._flying[key] -= 1
        if not self._flying[key]:
            del self._flying[key]
