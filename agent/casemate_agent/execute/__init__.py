"""Carries plans out: one call of a driver for each action, each behind its durable record."""
