"""Telling systemd how a service does: that it is ready, that it makes progress, that it stops.

What may live here: the protocol of sd_notify(3), one datagram to the socket that ``NOTIFY_SOCKET`` names, and the task that
feeds the watchdog. Without systemd nothing is sent and nothing fails.

Theory of operation. A watchdog that is fed by a timer says only that the timer runs. `feed` asks for a count of progress (the
rounds of the agent's loop, the commits and idle rounds of the manager's writer) and says so only where it has moved since it
last said it; a loop that hangs is not helped over the end of its time. The count may stand still for a while by right, so it is
asked for four times in a watchdog's time.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping


class Notifier:
    """The socket of this process's supervisor; where there is none, words go nowhere."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        named = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the null byte of an abstract address.
        self._address = "\0" + named[1:] if named.startswith("@") else named
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        stated = environ.get("WATCHDOG_USEC", "") if ours else ""
        #: Within so many seconds progress must be told; 0: nobody waits for it.
        self.watchdog_s = int(stated) / 1e6 if stated.isdecimal() else 0.0

    def _say(self, words: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto(words.encode(), self._address)
        except OSError:
            return  # a supervisor that is away or busy is asked again soon; the service goes on

    def ready(self, status: str = "") -> None:
        """The service does its work from now on."""
        self._say("READY=1" + (f"\nSTATUS={status}" if status else ""))

    def stopping(self) -> None:
        """The service ends by itself or as asked."""
        self._say("STOPPING=1")

    async def feed(self, progress: Callable[[], int]) -> None:
        """Feed the watchdog while ``progress`` moves; until cancelled. Returns at once where nobody waits."""
        if not self._address or not self.watchdog_s:
            return
        seen = -1
        while True:
            now = progress()
            if now != seen:
                seen = now
                self._say("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 4)
