"""An event loop on virtual time: sleeping costs nothing, and the same program runs the same way each time.

May live here: the loop. Theory of operation: the clock stands still while anything can run, and jumps to the next timer when
nothing can. Work that asyncio would give to a thread is done at once, so that a writer and its store run on it unchanged.
Nothing may wait for a process or a socket on it.
"""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

#: Wall clock at the beginning of a virtual loop, in seconds since the epoch.
EPOCH_S = 1_800_000_000.0


class _JumpingSelector(selectors.SelectSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # What could make a file ready is not on this loop, so the system is not even asked.
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time`` starts at 0; ``wall`` is the wall clock that goes with it."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now_s

    def wall(self) -> float:
        """Virtual seconds since the epoch."""
        return EPOCH_S + self._jumping.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Do the work now. What it raises is the future's; what ends a process is raised here."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future
