"""A program of the host that makes a file, and ends.

What may live here: running it within a deadline, with nothing on its input; and the words for what went wrong.
"""

import subprocess
from collections.abc import Mapping, Sequence

from casemate_core.errors import DeadlineExceeded, MachineError, shown


def run_tool(
    argv: Sequence[str],
    package: str,
    failed: type[MachineError],
    deadline_s: float,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run it to its end; it blocks. Raises DeadlineExceeded; ``failed`` where ``package`` is missing or it failed itself."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
            env=env,
        )
    except FileNotFoundError:
        raise failed(f"{argv[0]} is not installed (package {package})") from None
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{argv[0]} did not end within {deadline_s:g} s") from None
    if done.returncode != 0:
        raise failed(f"{argv[0]}: {shown(' '.join(done.stderr.split()))}")
