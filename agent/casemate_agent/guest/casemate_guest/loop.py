"""The loop: one thread, one epoll, coroutines, and what they wait for."""

from __future__ import annotations

import heapq
import select
import time

from .files import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from typing import Any

    Task = Coroutine["Future", None, Any]


class Future:
    """A value that comes later. Await it, or add a callback."""

    __slots__ = ("_callbacks", "done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self._callbacks: list[Callable[[], None]] = []

    def set(self, value: Any = None) -> None:
        """Give the value; the second and later ones are ignored."""
        if not self.done:
            self.done, self.value = True, value
            for callback in self._callbacks:
                callback()

    def then(self, callback: Callable[[], None]) -> None:
        """Call back once there is a value."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[Future, None, Any]:
        if not self.done:
            yield self
        return self.value


class Loop:
    """Descriptors, timers and children of one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._timer_count = 0
        self.stopping = False

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler(events)`` when ``fd`` is ready; replaces what was asked for it before.

        No events means not to watch: epoll reports errors even to those who asked for nothing.
        """
        if not events:
            self.unwatch(fd)
            return
        known = fd in self._handlers
        self._handlers[fd] = handler
        (self._epoll.modify if known else self._epoll.register)(fd, events)

    def unwatch(self, fd: int) -> None:
        """No longer watch ``fd``; call it before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        """Call back later; returns a number for `cancel`."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_count, callback))
        return self._timer_count

    def _soon(self, callback: Callable[[], None]) -> None:
        self.after(0.0, callback)

    def cancel(self, timer: int) -> None:
        """Cancel a timer that may still be pending."""
        if any(number == timer for _, number, _ in self._timers):
            self._cancelled.add(timer)

    def start(self, task: Task) -> Future:
        """Run a coroutine; the future has its result, or None when it raised (which is logged)."""
        result = Future()

        def step() -> None:
            try:
                waited = task.send(None)
            except StopIteration as stop:
                result.set(stop.value)
            except Exception:
                import traceback  # here, since it costs an emulated boot a tenth of a second

                log("task failed:\n" + traceback.format_exc())
                result.set(None)
            else:
                # Through the timers and not at once: a future that is set deep in a handler must not run tasks there.
                waited.then(lambda: self._soon(step))

        step()
        return result

    def sleep(self, seconds: float) -> Future:
        """A future for later."""
        future = Future()
        self.after(seconds, future.set)
        return future

    def ready(self, fd: int, events: int, timeout_s: float) -> Future:
        """The events of ``fd``, or 0 after the timeout."""
        future = Future()
        timer = self.after(timeout_s, lambda: future.set(0))

        def done() -> None:
            self.unwatch(fd)
            self.cancel(timer)

        future.then(done)
        self.watch(fd, events, future.set)
        return future

    def run(self) -> None:
        """Run until `stopping` is set."""
        while not self.stopping:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, number, callback = heapq.heappop(self._timers)
                if number in self._cancelled:
                    self._cancelled.discard(number)
                else:
                    callback()
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
            for fd, events in self._epoll.poll(wait):
                handler = self._handlers.get(fd)  # an earlier handler of this round may have removed it
                if handler is not None:
                    handler(events)


class Signal:
    """Something happened; one waiter."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._future = Future()

    def set(self) -> None:
        """Wake the waiter, or let its next wait return at once."""
        self._future.set()

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for the next `set`, or for the timeout."""
        future = self._future
        timer = None if timeout_s is None else self._loop.after(timeout_s, future.set)
        await future
        if timer is not None:
            self._loop.cancel(timer)
        self._future = Future()
