"""What an administrator asks of GPUs: the settings' table ``[gpu]``. PURE.

What may live here: the reading of that table into :class:`~casemate_agent.gpu.records.GpuPolicy`.
"""

from collections.abc import Mapping
from typing import Any

from casemate_agent.gpu.passport import Hygiene
from casemate_agent.gpu.records import DEFAULT_POLICY, GpuPolicy, Response
from casemate_core.gpu import Rung

CHECKS = frozenset(
    {
        "reachable", "xid", "ecc", "rows", "link-width", "pcie-replays", "pcie-fatal", "pcie-nonfatal", "temperature", "idle",
        "reset-seen", *(rung.value for rung in Rung),
    }
)  # fmt: skip
"""What may be required of a passport."""

_KNOWN = (
    "scrub", "driver_checks", "required", "broken", "suspect", "held_limit_s", "guest", "guest_health_s", "hot_c",
)  # fmt: skip
MAX_HELD_LIMIT_S = 600


def gpu_policy(table: Any) -> GpuPolicy:
    """The policy that a table says. Raises ValueError that names the field, the value and the remedy."""
    if not isinstance(table, dict):
        raise ValueError("gpu: expected a table; begin it with [gpu]")
    if "scrub_image" in table:
        raise ValueError(
            "gpu.scrub_image: a scrubber that runs in a guest is not served; name a program of the host as gpu.scrub"
        )
    for key in table:
        if key not in _KNOWN:
            raise ValueError(f"gpu.{key}: there is no such setting; there are {', '.join(_KNOWN)}")
    scrub = _words(table, "scrub", 'write scrub = ["/usr/local/sbin/scrub-gpu"]')
    if scrub and not scrub[0].startswith("/"):
        raise ValueError(f"gpu.scrub: {scrub[0]!r} is no absolute path; write the whole path of the program")
    required = _words(table, "required", 'write required = ["scrub", "ecc"]')
    for name in required:
        if name not in CHECKS:
            raise ValueError(f"gpu.required: {name!r} is no check and no step; there are {', '.join(sorted(CHECKS))}")
    driver_checks = table.get("driver_checks", True)
    if not isinstance(driver_checks, bool):
        raise ValueError(f"gpu.driver_checks: {driver_checks!r} is neither true nor false")
    limit_s = table.get("held_limit_s", 60)
    if isinstance(limit_s, bool) or not isinstance(limit_s, int | float) or not 0 <= limit_s <= MAX_HELD_LIMIT_S:
        raise ValueError(f"gpu.held_limit_s: {limit_s!r} is not a number of seconds from 0 to {MAX_HELD_LIMIT_S}")
    every_s = table.get("guest_health_s", DEFAULT_POLICY.guest_health_s)
    if (
        isinstance(every_s, bool)
        or not isinstance(every_s, int | float)
        or not (every_s == 0 or 5 <= every_s <= 86_400)
    ):
        raise ValueError(f"gpu.guest_health_s: {every_s!r} is not a number of seconds from 5 to 86400, or 0 for never")
    hot_c = table.get("hot_c", DEFAULT_POLICY.hot_c)
    if isinstance(hot_c, bool) or not isinstance(hot_c, int) or not 40 <= hot_c <= 120:
        raise ValueError(f"gpu.hot_c: {hot_c!r} is not a temperature from 40 to 120 degrees Celsius")
    return GpuPolicy(
        Hygiene(scrub=bool(scrub), driver_checks=driver_checks, required=frozenset(required)),
        broken=_response(table, "broken", DEFAULT_POLICY.broken),
        suspect=_response(table, "suspect", DEFAULT_POLICY.suspect),
        held_limit_s=float(limit_s),
        scrubber=scrub,
        guest=_response(table, "guest", DEFAULT_POLICY.guest),
        guest_health_s=float(every_s),
        hot_c=hot_c,
    )


def _words(table: Mapping[str, Any], name: str, remedy: str) -> tuple[str, ...]:
    words = table.get(name, [])
    if not isinstance(words, list) or len(words) > 32 or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"gpu.{name}: {words!r} is not a list of words; {remedy}")
    return tuple(words)


def _response(table: Mapping[str, Any], name: str, default: Response) -> Response:
    try:
        return Response(table.get(name, default))
    except ValueError:
        words = ", ".join(Response)
        raise ValueError(f"gpu.{name}: {table[name]!r} is not known; write one of {words}") from None
