"""Fixtures of the journeys."""

from support.realfleet import real_fleet

__all__ = ["real_fleet"]
