"""Files of root or of the relay that hold keys, or say whom to believe: replaced as a whole, for their owner alone.

What may live here: how such a file is written. What is in it is known to :mod:`casemate_agent.enrolment.identity` and
:mod:`casemate_agent.relay.trust`.
"""

import os
from pathlib import Path


def write_private(folder: Path, name: str, data: bytes) -> None:
    """Write it, whole or not at all, with mode 0600; durable when this returns. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = folder / f"{name}.new"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(folder / name)
    entries = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entries)
    finally:
        os.close(entries)
