"""Blocking library calls with a deadline.

For: drivers of libraries that block (libvirt, netlink, files). What may live here: the threads that run such calls, and
nothing about what they call.

Theory of operation. A call is a job on a queue that a few daemon threads serve. Whoever asked waits for it on the event
loop for as long as its deadline says. A thread cannot be ended, so a call that is late is *abandoned*: the caller gets
DeadlineExceeded at once, another thread takes the place of the stuck one, and when the late call returns in the end its
thread ends with it and its result is given to ``discard``. The number of stuck threads is bounded: beyond it calls are
refused with Unavailable, because a library that hangs that often hangs for all. A job that is abandoned before any thread
took it never runs.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from casemate_core.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")
#: Told of each call: what it was, how long it took, and its error; empty where it returned.
Observe = Callable[[str, float, str], None]


def unobserved(what: str, took_s: float, error: str) -> None:
    """Nobody measures."""


@dataclass(slots=True, eq=False)
class _Job:
    call: Callable[[], Any]
    discard: Callable[[Any], None] | None
    unused: Callable[[], None] | None
    future: Future[Any] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: bool = False
    finished: bool = False
    abandoned: bool = False


class DeadlineExecutor:
    """A few threads for blocking calls of one library. Not for use from several event loops."""

    def __init__(self, name: str, threads: int = 4, max_stuck: int = 8, observe: Observe = unobserved) -> None:
        self._name = name
        self._max_threads = threads
        self._max_stuck = max_stuck
        self._observe = observe
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._waiting = 0  # jobs put and not yet counted off by the thread that took them
        self._stuck = 0
        self._closed = False

    @property
    def stuck(self) -> int:
        """How many threads are inside a call that is past its deadline."""
        return self._stuck

    async def run(
        self,
        what: str,
        call: Callable[[], T],
        deadline_s: float,
        discard: Callable[[T], None] | None = None,
        unused: Callable[[], None] | None = None,
    ) -> T:
        """What ``call`` returns. Raises what it raises; DeadlineExceeded after ``deadline_s``; Unavailable when too many hang.

        When the waiting task is cancelled the call is abandoned too. ``discard`` gets the result of an abandoned call, in
        its thread. ``unused`` is called on the event loop where ``call`` never begins.
        """
        job = _Job(call, discard, unused)
        try:
            with self._lock:
                if self._closed:
                    raise Unavailable(f"{self._name} is closed")
                if self._stuck >= self._max_stuck:
                    raise Unavailable(f"{what}: {self._stuck} calls of {self._name} hang already")
                self._jobs.put(job)
                self._waiting += 1
                self._spawn_if_short()
        except Unavailable:
            if unused is not None:
                unused()
            raise
        limit = asyncio.timeout(deadline_s)
        begun_s, error = asyncio.get_running_loop().time(), ""
        try:
            async with limit:
                result: T = await asyncio.wrap_future(job.future)
                return result
        except TimeoutError:
            error = "late"
            if not limit.expired():
                raise  # the call's own
            raise DeadlineExceeded(f"{what}: no answer of {self._name} within {deadline_s:g} s") from None
        except BaseException as failed:
            error = type(failed).__name__
            raise
        finally:
            self._observe(what, asyncio.get_running_loop().time() - begun_s, error)
            self._abandon(job)

    def close(self) -> None:
        """Let idle threads end; a stuck one ends with its call."""
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._jobs.put(None)

    def _abandon(self, job: _Job) -> None:
        with job.lock:
            if job.finished or job.abandoned:
                return
            job.abandoned = True
            began = job.started
        if not began:
            if job.unused is not None:
                job.unused()
            return
        with self._lock:
            self._stuck += 1
            self._spawn_if_short()

    def _spawn_if_short(self) -> None:
        """One thread more where jobs wait and the bound allows it. Called with the lock held."""
        if self._waiting > self._idle and self._threads - self._stuck < self._max_threads:
            self._threads += 1
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                # Both in one step: a job that left the queue while its thread still counted as idle would hide the next one.
                self._idle -= 1
                if job is None:
                    self._threads -= 1
                    return
                self._waiting -= 1
            if self._run(job):
                with self._lock:
                    self._threads -= 1
                    self._stuck -= 1
                return

    @staticmethod
    def _run(job: _Job) -> bool:
        """Run a job; True when it was abandoned meanwhile, and its thread replaced."""
        with job.lock:
            if job.abandoned:
                return False
            job.started = True
            # From here on the waiting side cannot cancel the future, only stop waiting for it.
            if not job.future.set_running_or_notify_cancel():
                return False
        result: Any = None
        error: BaseException | None = None
        try:
            result = job.call()
        except BaseException as raised:
            error = raised
        with job.lock:
            job.finished = True
            late = job.abandoned
        if late:
            if error is None and job.discard is not None:
                job.discard(result)
        elif error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        # The exception's traceback holds this frame, and the frame would hold the job: let neither outlive the call.
        del job, result, error
        return late
