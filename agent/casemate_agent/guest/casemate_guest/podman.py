"""podman, asked for one thing at a time and two at once."""

from __future__ import annotations

import json
from collections import deque

from .children import run
from .files import log
from .loop import Future

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .children import Ended
    from .frames import Message
    from .loop import Loop

PODMAN_TIMEOUT_S = 600.0


class Podman:
    """podman's commands, two at once at most: each costs a core for a while."""

    def __init__(self, loop: Loop, program: str) -> None:
        self.loop, self.program = loop, program
        self._free = deque([0, 1])
        self._waiters: deque[Future] = deque()

    async def run(self, words: list[str], stdin: bytes = b"") -> Ended:
        """Run one, when it is its turn."""
        while not self._free:
            future = Future()
            self._waiters.append(future)
            await future
        slot = self._free.popleft()
        try:
            return await run(self.loop, [self.program, *words], stdin, PODMAN_TIMEOUT_S)
        finally:
            self._free.append(slot)
            if self._waiters:
                self._waiters.popleft().set()

    async def inspect(self, names: list[str]) -> dict[str, Message]:
        """Facts of containers by id; those that are gone are left out.

        That podman fails is not that they are gone: it is asked again until it answers.
        """
        while True:
            ended = await self.run(["container", "inspect", *names])
            try:
                # It prints what it found, and fails, when one of them is missing.
                return {str(fact["Id"]): fact for fact in json.loads(ended.out)}
            except (ValueError, KeyError, TypeError):
                log(f"podman inspect: {ended.reason()}")
                await self.loop.sleep(1.0)
