"""PURE. The fleet as a state machine. See `machine` (the door), `state` (records in memory)."""
