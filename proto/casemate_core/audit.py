"""What was done, by whom, from where: one record an act, each carrying the digest of the one before.

Theory of operation. A record's digest is SHA-256 over its canonical JSON, its predecessor's digest included. So whoever has
the digest of one record has all before it: nothing can be altered, dropped, put in another order or cut off before that
record without the digests telling. What stands at the two ends is a `Link`: where the chain begins (the last record that
retention forgot), and its head, which is kept beside it. `verify` walks from one to the other and names every break.

Here are the record and the arithmetic, for the manager that writes and the client that does not believe it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

MAX_TARGETS: Final = 16
MAX_DETAIL: Final = 1024
#: What a person reads of breaks: the first ones.
MAX_BREAKS: Final = 20


@dataclass(frozen=True, slots=True)
class Link:
    """A place in the chain. Sequence 0 with no digest: before the first record."""

    sequence: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One act. ``targets`` are what it touched, as ``environment/tenant/name created``; ``tenants`` whom it concerns."""

    sequence: int
    time_s: float
    actor: str
    how: str
    act: str
    outcome: str
    targets: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()
    detail: str = ""
    address: str = ""
    client: str = ""
    request: str = ""
    #: The store's revision that the act is part of.
    revision: int = 0
    previous: str = ""
    digest: str = ""

    @property
    def link(self) -> Link:
        """Its place in the chain."""
        return Link(self.sequence, self.digest)


def digest_of(record: AuditRecord) -> str:
    """The digest that the record must carry."""
    fields = asdict(record)
    del fields["digest"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def chained(record: AuditRecord, after: Link) -> AuditRecord:
    """The record as the next one of the chain."""
    record = replace(record, sequence=after.sequence + 1, previous=after.digest, digest="")
    return replace(record, digest=digest_of(record))


def breaks(records: Iterable[AuditRecord], begin: Link, head: Link | None) -> Iterator[str]:
    """Every break between two places of the chain, in words. ``head`` None: the end is not judged."""
    at = begin
    for record in records:
        if record.sequence <= at.sequence:
            yield f"record {record.sequence} stands after record {at.sequence}"
        elif record.sequence > at.sequence + 1:
            missing = f"{at.sequence + 1} to {record.sequence - 1}"
            yield (
                f"records {missing} are missing"
                if record.sequence > at.sequence + 2
                else f"record {at.sequence + 1} is missing"
            )
        elif record.previous != at.digest:
            yield f"record {record.sequence} does not follow record {at.sequence}: one of them was altered"
        if digest_of(record) != record.digest:
            yield f"record {record.sequence} was altered"
        at = record.link
    if head is not None and at != head:
        if at.sequence < head.sequence:
            yield f"the end is cut off: the last record is {at.sequence}, and {head.sequence} were written"
        else:
            yield f"the last record {at.sequence} is not the one that was written as the head"


def verify(records: Iterable[AuditRecord], begin: Link, head: Link | None) -> list[str]:
    """The first breaks; empty where the chain is whole."""
    found: list[str] = []
    for one in breaks(records, begin, head):
        found.append(one)
        if len(found) == MAX_BREAKS:
            break
    return found
