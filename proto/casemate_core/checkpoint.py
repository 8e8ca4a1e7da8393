"""Signed places of the audit chain, and what they say of a chain that is shown later.

Theory of operation. The manager signs the chain's head from time to time with a key that is not in its store: a *checkpoint*. It
keeps the last ones in the store, and sends each to every host that is connected; agents keep them where the manager cannot
reach. Whoever rewrites the chain in the store, digests and all, has no signature for what he made; whoever cuts its end off,
signed places and all, is contradicted by the hosts. `contradictions` is that comparison, for a client that believes nobody.

`witnessed` is an agent's part: what it keeps, and what it refuses. A checkpoint that goes back, forks, or is signed by another
key is a *break*: it is written down beside the checkpoints, which stay.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from casemate_core.audit import Link
from casemate_core.errors import CallerError
from casemate_core.plain import from_plain, to_plain

#: Checkpoints that a witness keeps, and breaks that it writes down: the first of them and the last.
KEPT: Final = 256
BREAKS: Final = 16
#: Of what a witness keeps, as JSON: more than it can be.
MAX_BYTES: Final = 512 * 1024
MAX_REASON: Final = 300
DIGEST_LENGTH: Final = 64
SIGNATURE_LENGTH: Final = 128


class BadWitness(CallerError):
    """What is said to be kept by a witness has not its form."""

    reason = "BadWitness"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The chain ended in ``digest`` when it was signed. ``key`` (Ed25519, public) and ``signature`` in hex."""

    sequence: int
    digest: str
    time_s: int
    key: str
    signature: str

    @property
    def link(self) -> Link:
        """Its place in the chain."""
        return Link(self.sequence, self.digest)


def statement(link: Link, time_s: int) -> bytes:
    """What is signed."""
    return f"casemate audit checkpoint 1\n{link.sequence}\n{link.digest}\n{time_s}\n".encode()


@dataclass(frozen=True, slots=True)
class Break:
    """A checkpoint that does not go on from what a witness keeps: when it came, and why, in words."""

    time_s: float
    reason: str
    seen: Checkpoint


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What one witness keeps: the key that it saw first, checkpoints in the order of the chain, and breaks."""

    key: str = ""
    kept: tuple[Checkpoint, ...] = ()
    breaks: tuple[Break, ...] = ()


def is_formed(seen: Checkpoint) -> bool:
    """Whether it has the form of a checkpoint: what comes from another machine is bounded before it is kept."""
    return (
        0 < seen.sequence < 2**63
        and all(c in "0123456789abcdef" for c in seen.digest + seen.key + seen.signature)
        and (len(seen.digest), len(seen.key), len(seen.signature)) == (DIGEST_LENGTH, DIGEST_LENGTH, SIGNATURE_LENGTH)
    )


def witnessed(old: Witnessed, seen: Checkpoint, now_s: float, *, genuine: bool) -> tuple[Witnessed, str]:
    """What is kept after a checkpoint came, and what is wrong with it (empty: nothing).

    ``genuine``: the key that it names has signed it.
    """
    last = old.kept[-1] if old.kept else None
    if not genuine:
        wrong = f"checkpoint {seen.sequence} is not signed by the key that it names"
    elif old.key and seen.key != old.key:
        wrong = f"checkpoint {seen.sequence} is signed by another key than the {len(old.kept)} before it"
    elif last is None or seen.sequence > last.sequence:
        kept = (*old.kept, seen)
        if len(kept) > KEPT:
            kept = (kept[0], *kept[2:])  # the first one of all stays
        return replace(old, key=seen.key, kept=kept), ""
    elif seen.link == last.link:
        return old, ""
    elif seen.sequence < last.sequence:
        wrong = f"the audit chain went back from record {last.sequence} to {seen.sequence}"
    else:
        wrong = f"record {seen.sequence} of the audit chain has become another"
    if any(b.reason == wrong for b in old.breaks):
        return old, wrong
    breaks = (*old.breaks, Break(now_s, wrong, seen))
    half = BREAKS // 2
    return replace(old, breaks=(*breaks[:half], *breaks[half:][-half:])), wrong


def witnessed_to_json(found: Witnessed) -> bytes:
    """As it is kept, and as it is told."""
    return json.dumps(to_plain(found), sort_keys=True).encode() + b"\n"


def witnessed_from_json(data: bytes) -> Witnessed:
    """What a host kept or told. Raises BadWitness for what has not its form and bounds."""
    if len(data) > MAX_BYTES:
        raise BadWitness(f"what a witness keeps has {len(data)} bytes")
    try:
        plain: Any = json.loads(data)
        found: Witnessed = from_plain(Witnessed, plain)
    except (ValueError, TypeError, KeyError, RecursionError, CallerError) as error:
        raise BadWitness(f"no witness keeps this: {type(error).__name__}") from error
    if len(found.kept) > KEPT or len(found.breaks) > BREAKS:
        raise BadWitness("a witness keeps fewer checkpoints")
    if not all(map(is_formed, (*found.kept, *(b.seen for b in found.breaks)))) or any(
        len(b.reason) > MAX_REASON for b in found.breaks
    ):
        raise BadWitness("what a witness keeps are checkpoints")
    return found


def contradictions(
    chain: Mapping[int, str], begin: Link, head: Link, said: Iterable[tuple[str, Checkpoint]]
) -> Iterator[str]:
    """What checkpoints say against a chain, in words. ``chain``: digests by sequence, of those that are named at least.

    ``said``: who keeps it, and the checkpoint. What is before ``begin`` was forgotten by retention, and is not judged.
    """
    for who, checkpoint in said:
        sequence = checkpoint.sequence
        if sequence > head.sequence:
            yield f"{who} has record {sequence} signed, and the chain ends at {head.sequence}: its end was cut off"
        elif sequence < begin.sequence:
            continue
        elif (begin.digest if sequence == begin.sequence else chain.get(sequence)) != checkpoint.digest:
            yield f"{who} has another record {sequence} signed: the chain was rewritten there or before it"
