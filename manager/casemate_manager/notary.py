"""Signs the head of the audit chain from time to time, keeps that in the store, and has it witnessed by all hosts.

What may live here: the task, and its look at the chain when it begins. Theory of operation. The key is derived from the manager's
own, which is not in the store. Before the first place is signed, the newest one that the store keeps is compared with the
chain beside it: a chain that contradicts it was written to by somebody else, and this manager lends it no signature. What is
signed is committed first and sent then, so that a host never has what the manager has forgotten by a crash alone.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from casemate_core.checkpoint import Checkpoint
from casemate_core.errors import CasemateError
from casemate_manager.fleet.auditing import begin_of, last_checkpoint
from casemate_manager.fleet.commands import KeepCheckpoint
from casemate_manager.writer import Writer
from casemate_wire.signing import Notary, is_genuine

log = logging.getLogger("casemate.notary")

#: Between two places that are signed; so much of the chain's end nobody has witnessed.
EVERY_S: Final = 60.0


async def doubt_of(writer: Writer, notary: Notary) -> str:
    """What the newest checkpoint in the store says against the chain beside it; empty where nothing. Raises StoreFailed."""
    state = writer.state
    newest, begin = last_checkpoint(state), begin_of(state)
    if newest is None:
        return ""
    if not is_genuine(newest):
        return f"checkpoint {newest.sequence} in the store is not signed"
    if newest.key != notary.public:
        return f"checkpoint {newest.sequence} in the store is signed by another key than this manager's"
    if newest.sequence > state.audit.sequence:
        return f"record {newest.sequence} was signed, and the chain in the store ends at {state.audit.sequence}"
    if newest.sequence <= begin.sequence:
        return "" if newest.sequence < begin.sequence or newest.digest == begin.digest else "the chain begins otherwise"
    found = await writer.audit(newest.sequence - 1, 1)
    if not found or found[0].link != newest.link:
        return f"record {newest.sequence} in the store is not the one that was signed"
    return ""


async def sign_on(
    writer: Writer,
    notary: Notary,
    send: Callable[[Checkpoint], None],
    clock: Callable[[], float],
    every_s: float = EVERY_S,
) -> None:
    """Sign the head whenever it has moved, until cancelled; nothing, ever, where the store contradicts itself."""
    checked = False
    while True:
        try:
            if not checked:
                if doubt := await doubt_of(writer, notary):
                    log.error("the audit chain is signed no more: %s; casemate audit --verify says where", doubt)
                    return
                checked = True
            newest = last_checkpoint(writer.state)
            if writer.state.audit.sequence > (newest.sequence if newest else 0):
                await writer.submit(KeepCheckpoint(notary.sign(writer.state.audit, clock())))
                newest = last_checkpoint(writer.state)
            if newest is not None:
                send(newest)
        except CasemateError as error:
            log.warning("the head of the audit chain is not signed: %s", error)
        await asyncio.sleep(every_s)
