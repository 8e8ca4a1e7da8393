"""The host's devices as values: functions, their places on the bus, fabric partitions, and the administrator's rules. PURE."""
