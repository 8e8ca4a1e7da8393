"""Keeps a host's certificate fresh for as long as the agent runs.

What may live here: one task, and who waits for it. Clock, randomness, the asking and the saving are given.

Theory of operation. The certificate is renewed after two thirds of its life. A manager that is away or busy is asked again
with full jitter, less and less often; the third of the life that is left is time enough for any repair. An agent that starts
with a certificate that is past its time (the host was away for long) renews before it dials: its key is its identity, the
certificate only says so for a day. Where the manager says no (the host was revoked), it is asked again rarely: someone may act.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final

from casemate_agent.enrolment.identity import Identity
from casemate_core.errors import CallerError, CasemateError, Unavailable

log = logging.getLogger("casemate.agent.renewal")

#: Windows in seconds: of the first further try, and the longest.
FIRST_S: Final = 5.0
LONGEST_S: Final = 300.0
REFUSED_S: Final = 600.0
#: The loop looks at the clock at least so often: a machine that slept finds out soon.
LOOK_S: Final = 60.0
#: A certificate with less than this left is not dialled with.
SPARE_S: Final = 30.0
#: So long a dial waits for a renewal.
WAIT_S: Final = 30.0


class Renewal:
    """See the module."""

    def __init__(
        self,
        identity: Identity,
        renew: Callable[[Identity], Awaitable[Identity]],
        save: Callable[[Identity], Awaitable[None]],
        now: Callable[[], float],
        random: Random,
    ) -> None:
        self.identity = identity
        self._renew = renew
        self._save = save
        self._now = now
        self._random = random
        self._fresh = asyncio.Event()

    def _is_good(self) -> bool:
        return self._now() < self.identity.not_after_s - SPARE_S

    async def current(self) -> Identity:
        """The identity with a certificate that is still good. Raises Unavailable where none comes in time."""
        if not self._is_good():
            self._fresh.clear()
            try:
                async with asyncio.timeout(WAIT_S):
                    await self._fresh.wait()
            except TimeoutError:
                raise Unavailable("the certificate is past its time, and no manager has renewed it") from None
        return self.identity

    async def run(self) -> None:
        """Until cancelled."""
        due_s = self.identity.renewal_s(self._random)
        window_s = FIRST_S
        while True:
            left_s = due_s - self._now()
            if left_s > 0:
                await asyncio.sleep(min(left_s, LOOK_S))
                continue
            try:
                self.identity = await self._renew(self.identity)
                await self._save(self.identity)
            except CallerError as error:
                log.warning("the manager does not renew the certificate: %s", error)
                due_s = self._now() + self._random.uniform(0, REFUSED_S)
            except (CasemateError, OSError) as error:
                log.warning("the certificate is not renewed yet: %s", error)
                due_s = self._now() + self._random.uniform(0, window_s)
                window_s = min(window_s * 2, LONGEST_S)
            else:
                log.info("the certificate is renewed, until %d", self.identity.not_after_s)
                due_s, window_s = self.identity.renewal_s(self._random), FIRST_S
                self._fresh.set()
