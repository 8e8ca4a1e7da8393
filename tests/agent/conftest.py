"""Fixtures of the agent's tests."""

from support.real_host import real_host

__all__ = ["real_host"]
