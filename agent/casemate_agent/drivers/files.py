"""Files that are there as a whole or not at all."""

import os
import tempfile
from pathlib import Path

#: Ending of files under way; whoever lists a folder takes them for strays.
UNFINISHED = ".part"


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: written beside it, synced, renamed, the folder synced. Raises OSError."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
