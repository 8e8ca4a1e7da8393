"""Fixtures of the agent's tests."""

from support.real_host import real_host, sandbox

__all__ = ["real_host", "sandbox"]
