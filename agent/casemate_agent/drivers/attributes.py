"""Writing a file that the kernel serves.

What may live here: the write itself, whose refusal is the caller's kind of failure. It blocks.
"""

import os
from pathlib import Path

from casemate_core.errors import MachineError


def write_attribute(path: Path, text: str, failed: type[MachineError]) -> None:
    """Write in one call. What is not there does not become a file. Raises ``failed``, with the file and what the kernel said."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)  # as a shell does it
    except OSError as error:
        raise failed(f"{path}: {error.strerror}") from error
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise failed(f"writing {text.strip()!r} to {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
