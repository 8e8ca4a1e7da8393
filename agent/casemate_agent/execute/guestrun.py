"""Runs a command in a guest by its helper, and takes no more of what it says than was asked for.

What may live here: the running, and its bounds; what a command says means something to whoever asked for it.
"""

import asyncio
from collections.abc import Mapping

from casemate_agent.drivers.ports import ExecRequest, GuestRefused, Guests
from casemate_agent.gpu.guestside import ARGV, MAX_ANSWER_BYTES, GivenGpu, readings
from casemate_agent.gpu.readings import GpuReading
from casemate_core.errors import CallerError

#: What a shell answers where there is no such program.
NOT_FOUND = 127


class GuestSaysTooMuch(CallerError):
    """A command in a guest says more than is taken of it."""

    reason = "GuestSaysTooMuch"


async def run_in_guest(
    guests: Guests, uid: str, argv: tuple[str, ...], deadline_s: float, most_bytes: int
) -> tuple[int | None, str, str]:
    """Exit code, output and errors of a command in the guest itself. Raises GuestRefused, Unavailable, GuestSaysTooMuch,
    TimeoutError."""
    async with asyncio.timeout(deadline_s):
        session = await guests.exec(uid, ExecRequest(argv), deadline_s)
        try:
            await session.close_stdin()
            found = {"stdout": bytearray(), "stderr": bytearray()}
            async for stream, data in session.output():
                found[stream] += data
                if len(found[stream]) > most_bytes:
                    raise GuestSaysTooMuch(f"{argv[0]} says more than {most_bytes} bytes")
            texts = {name: bytes(data).decode(errors="replace") for name, data in found.items()}
            return session.exit_code, texts["stdout"], texts["stderr"]
        finally:
            await session.close()


async def gpus_in_guest(
    guests: Guests, uid: str, given: Mapping[str, GivenGpu], deadline_s: float
) -> tuple[GpuReading, ...]:
    """What a guest tells of its GPUs; nothing where it has no program for that. Raises as `run_in_guest`."""
    try:
        code, output, _ = await run_in_guest(guests, uid, ARGV, deadline_s, MAX_ANSWER_BYTES)
    except GuestRefused:
        return ()
    return readings(output, given) if code == 0 else ()
