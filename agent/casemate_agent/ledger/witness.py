"""Keeps signed places of the manager's audit chain, as a witness that the manager's store cannot reach.

What may live here: one file beside the ledger, and what is said of it. What is kept and what is a break is decided in
:mod:`casemate_core.checkpoint`. The file is read anew for each checkpoint, one a minute at most: so that who looks into a break
(``casemate-agent witness --accept``) may put it away while the agent runs. It is replaced as a whole and fsynced before a
checkpoint counts as kept; where that fails, the old one stays, and the next checkpoint is a new try.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from casemate_agent.config import Config, load
from casemate_agent.ledger.files import Files, OsFiles
from casemate_agent.ledger.records import HOST, Note
from casemate_agent.ledger.store import Offload, write_whole
from casemate_core.checkpoint import Checkpoint, Witnessed, witnessed, witnessed_from_json, witnessed_to_json
from casemate_core.errors import CasemateError
from casemate_wire.signing import is_genuine

log = logging.getLogger("casemate.agent.witness")

FILE: Final = "witness.json"
FOLDER: Final = "ledger"


class Witness:
    """See the module. ``tell`` is told each new break, in words."""

    def __init__(self, files: Files, offload: Offload, now: Callable[[], float], tell: Callable[[str], None]) -> None:
        self._files = files
        self._offload = offload
        self._now = now
        self._tell = tell
        self._lock = asyncio.Lock()
        #: What is doubtful about the audit chain, in words; empty where nothing is.
        self.doubt = ""

    async def take(self, seen: Checkpoint) -> None:
        """Keep a checkpoint, or write down why not. Raises OSError where the disk does not take it."""
        async with self._lock:
            old, damage = await self._offload(lambda: read(self._files))
            found, wrong = witnessed(old, seen, self._now(), genuine=is_genuine(seen))
            if found != old or damage:
                data = witnessed_to_json(found)
                await self._offload(lambda: write_whole(self._files, "", FILE, data))
            before, self.doubt = self.doubt, wrong or damage or _doubt(found)
            if self.doubt and self.doubt != before:
                self._tell(self.doubt)

    async def kept(self) -> Witnessed:
        """What is on disk now. Raises OSError."""
        async with self._lock:
            found, _ = await self._offload(lambda: read(self._files))
            return found  # type: ignore[no-any-return]


def chain_broken(doubt: str) -> Note:
    """The event of a host that does not believe the audit chain."""
    return Note(HOST, "AuditChainBroken", doubt, "Warning")


def _doubt(found: Witnessed) -> str:
    return found.breaks[-1].reason if found.breaks else ""


def read(files: Files) -> tuple[Witnessed, str]:
    """What is kept, and what was wrong with the file, which is set aside then. Raises OSError."""
    if FILE not in files.listing(""):
        return Witnessed(), ""
    try:
        return witnessed_from_json(files.read(FILE)), ""
    except CasemateError as error:
        log.error("%s is damaged and set aside: %s", FILE, error)
        files.rename(FILE, f"{FILE}.damaged")
        return Witnessed(), f"what this host had witnessed of the audit chain is damaged, and set aside: {error}"


def add_parser(verbs: Any) -> None:
    """Its place among the agent's verbs."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        "witness",
        help="show what this host keeps of the manager's audit chain",
        description="Shows the signed places of the audit chain that this host keeps, and where the chain did not go on from "
        "them. Exit codes: 0 nothing is doubtful, 1 something is, 2 wrong flags.",
    )
    verb.add_argument(
        "--accept",
        action="store_true",
        help="put what is kept away under another name and begin anew, as after a store was restored from a backup",
    )
    verb.add_argument("--config", default="", help="TOML file with the agent's settings")
    verb.add_argument("--state-dir", help="where the ledger is (default /var/lib/casemate)")


def main(flags: dict[str, Any]) -> int:
    """Run it. Raises OSError."""
    accept = flags.pop("accept")
    config: Config = load(flags.pop("config"), flags, needs_name=False)
    folder = Path(config.state_dir) / FOLDER
    files = OsFiles(folder)
    found, damage = read(files)
    lines = [f"record {c.sequence}:{c.digest} signed by {c.key}" for c in found.kept]
    lines += [f"doubtful: {b.reason}" for b in found.breaks] + ([f"doubtful: {damage}"] if damage else [])
    sys.stdout.write("".join(f"{line}\n" for line in lines or ["nothing is kept"]))
    if accept and found.kept:
        away = f"witness-{int(time.time())}.json"
        files.rename(FILE, away)
        files.sync_folder("")
        sys.stdout.write(f"put away as {folder / away}\n")
        return 0
    return 1 if found.breaks or damage else 0
