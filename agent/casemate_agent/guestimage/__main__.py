"""Command line of the image builder. Progress goes to standard error, the path of the manifest to standard output."""

import argparse
import subprocess
import sys
from pathlib import Path

from casemate_agent.guestimage import build, kernel, mirror

DEFAULT_OUT = Path("/var/cache/casemate/guest")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 built or found, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m casemate_agent.guestimage", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="build the Debian guest image unless it is in the cache")
    builder.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"cache folder (default {DEFAULT_OUT})")
    builder.add_argument("--quiet", action="store_true", help="no progress lines")
    options = parser.parse_args(arguments)

    def say(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    try:
        folder = build.build(options.out.absolute(), say)
    except (build.BuildFailed, mirror.NoMirror, kernel.BadKernel, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"guest image: {error}\n")
        return 1
    sys.stdout.write(f"{folder / 'image.yaml'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
