"""What an instance wrote to its serial console, printed as lines.

What a guest writes is hostile: sequences that move a cursor or change a colour are left out, and what else a terminal would
obey is written as an escape.
"""

import codecs
import re
import time
from typing import TYPE_CHECKING

from casemate_cli import term
from casemate_cli.failure import Exit

if TYPE_CHECKING:
    from casemate_cli.client import Client

#: Control sequences of ECMA-48 (CSI), commands of a terminal (OSC) up to their end, and two-character escapes.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])")
#: A line that is longer is printed in pieces.
MAX_LINE = 64 * 1024


class Lines:
    """Bytes of a serial console in, printable lines out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes, final: bool = False) -> list[str]:
        """The lines that ``data`` completes; with ``final`` what is left, too."""
        *lines, self._rest = (self._rest + self._decoder.decode(data, final)).split("\n")
        while len(self._rest) > MAX_LINE:
            lines.append(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]
        if final and self._rest:
            lines.append(self._rest)
            self._rest = ""
        return [printable(line) for line in lines]


def printable(line: str) -> str:
    """A line without what a terminal would obey."""
    # A carriage return at the end belongs to the line's end; within it, it was written over what stood there.
    return term.clean(_SEQUENCE.sub("", line).rstrip("\r").rpartition("\r")[2], keep="\t")


def print_log(client: "Client", instance: str, since_s: float | None) -> int:
    """Print the log of an instance's console. Raises Failure."""
    from casemate_wire.v1 import seriallog_pb2 as pb

    request = pb.ConsoleLogRequest(tenant=client.settings.tenant, instance=instance)
    if since_s is not None:
        request.since.FromNanoseconds(int((time.time() - since_s) * 1e9))
    lines, empty = Lines(), True
    for part in client.stream(client.channels.ConsoleLog, request, f"console log of {instance}"):
        empty = False
        for line in lines.feed(part.data):
            term.out(line)
    for line in lines.feed(b"", final=True):
        term.out(line)
    if empty:
        term.say(f"nothing is kept of the console of {instance}" + (" since then" if since_s is not None else ""))
    return Exit.OK
