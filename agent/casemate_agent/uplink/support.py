"""An agent's part of a support bundle: files of text, secrets left out, bounded in size.

What may live here: asking, leaving out, and cutting. A part that cannot be had is a file that says why; the others go on.
"""

import json
import platform
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from xml.etree.ElementTree import ParseError, fromstring, tostring

from casemate_agent.doctor.verdicts import diagnose, plain
from casemate_agent.drivers.ports import Drivers
from casemate_agent.ledger.store import Ledger
from casemate_core import redact
from casemate_core.errors import CasemateError
from casemate_core.metrics import Rows
from casemate_core.plain import to_plain
from casemate_wire import logtail
from casemate_wire.exposition import rendered

#: One file, and all files of one host.
MOST_FILE: Final = 1024 * 1024
MOST_HOST: Final = 4 * 1024 * 1024
MOST_DOMAINS: Final = 200
DEADLINE_S: Final = 20.0
_SECRET_ATTRIBUTE: Final = re.compile(r"passwd|password|secret|token", re.IGNORECASE)


class HostSupport:
    """Collects what one host knows of itself. ``rows``: its metrics."""

    def __init__(
        self, drivers: Drivers, ledger: Ledger, rows: Callable[[], Awaitable[list[Rows]]], version: str
    ) -> None:
        self._drivers = drivers
        self._ledger = ledger
        self._rows = rows
        self._version = version

    async def files(self) -> dict[str, str]:
        """Name -> text."""
        asked: dict[str, Callable[[], Awaitable[str | dict[str, str]]]] = {
            "versions.json": self._versions,
            "doctor.json": self._doctor,
            "ledger.json": self._the_ledger,
            "metrics.txt": self._metrics,
            "log.txt": self._log,
            "domains": self._domains,
        }
        found: dict[str, str] = {}
        for name, ask in asked.items():
            try:
                answer = await ask()
            except CasemateError as error:
                answer = f"not to be had: {redact.text(str(error))}\n"
            found |= answer if isinstance(answer, dict) else {name: answer}
        return bounded(found)

    async def _versions(self) -> str:
        machine = await self._drivers.machine.observe(DEADLINE_S)
        told = {
            "agent": self._version, "python": platform.python_version(), "kernel": machine.kernel,
            "hostname": machine.hostname, "bootId": machine.boot_id,
        }  # fmt: skip
        return _json(told)

    async def _doctor(self) -> str:
        survey = await self._drivers.survey.look(DEADLINE_S)
        return _json(redact.plain({"findings": plain(diagnose(survey)), "survey": to_plain(survey)}))

    async def _the_ledger(self) -> str:
        book = self._ledger.book
        told: Mapping[str, Any] = {
            "host": to_plain(book.host),
            "damage": list(book.damage),
            "instances": {uid: to_plain(record) for uid, record in book.instances.items()},
        }
        return _json(redact.plain(told))

    async def _metrics(self) -> str:
        return rendered(await self._rows()).decode()

    async def _log(self) -> str:
        return redact.text(logtail.kept())

    async def _domains(self) -> dict[str, str]:
        xmls = await self._drivers.hypervisor.descriptions(DEADLINE_S)
        return {f"domains/{safe(name)}.xml": redacted_xml(xml) for name, xml in list(xmls.items())[:MOST_DOMAINS]}


def redacted_xml(xml: str) -> str:
    """A domain's XML without our metadata, which has the tenant's record, and without passwords."""
    try:
        domain = fromstring(xml)
    except ParseError:
        return f"{redact.LEFT_OUT}: it is no XML\n"
    for metadata in domain.findall("metadata"):
        # libvirt puts our name space on the element itself, so it is found as an element and not as text
        metadata.clear()
    for element in domain.iter():
        for name in element.attrib:
            if _SECRET_ATTRIBUTE.search(name):
                element.set(name, redact.LEFT_OUT)
    return redact.text(tostring(domain, encoding="unicode")) + "\n"


def safe(name: str) -> str:
    """A name that is a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:100] or "unnamed"


def bounded(files: Mapping[str, str], most_file: int = MOST_FILE, most: int = MOST_HOST) -> dict[str, str]:
    """Files that fit: of one that is too large its end is kept, of those that come last nothing."""
    found: dict[str, str] = {}
    left = most
    for name, text in files.items():
        data = text.encode("utf-8", "replace")
        if len(data) > most_file:
            note = f"(the first {len(data) - most_file} bytes were cut off)\n"
            text = note + data[-most_file:].decode("utf-8", "replace")
        size = len(text.encode("utf-8", "replace"))
        if size > left:
            found.setdefault("cut-off.txt", "")
            found["cut-off.txt"] += f"{name}: {size} bytes did not fit\n"
            continue
        found[name] = text
        left -= size
    return found


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"
