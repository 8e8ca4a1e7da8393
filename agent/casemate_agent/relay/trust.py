"""Whom root believes to be the manager, where it does not hold the stream itself; and streams on which that is checked.

What may live here: the file of pinned authorities, and the two kinds of streams that pass a relay. What a signature is worth is
:mod:`casemate_wire.signed`; the relay's socket is :mod:`casemate_agent.relay.pipe`.

Theory of operation. A token names the authority of its fleet. Root reads the token before it hands it to the relay's user, and
keeps that pin, and the host's name, in a file of its own that the relay can neither read nor write. It makes a key (X25519)
beside it and enrols that with the token: what it is told is encrypted for this key. For each stream root draws
a nonce; what a host acts upon counts only where the manager has signed it for that nonce. A manager that is welcomed says, in
the same way, which authorities are trusted now: so a roll-over reaches root, and a retired authority is forgotten. The file is
replaced as a whole and fsynced.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from casemate_agent.enrolment.privatefile import write_private
from casemate_agent.uplink.transport import BrokenOff, Stream
from casemate_core.errors import CallerError, MachineError, shown
from casemate_core.spec.meta import NAME
from casemate_wire.channel import Frame, Ticket
from casemate_wire.signed import MOST_PINS, NONCE_BYTES, PIN, Opener, Purpose
from casemate_wire.stream import Credit, FactsAck, FromHost, Hello, Rejected, ToHost, Welcome

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

log = logging.getLogger("casemate.agent.trust")

FILE: Final = "authorities.json"
SEALING: Final = "sealing.key"
MAX_BYTES: Final = 16 * 1024
#: What keeps a stream going, or ends it: who forges it gains no more than who cuts the stream.
UNSIGNED: Final = (Credit, FactsAck, Rejected)


class NoAuthority(CallerError):
    """This host does not know whom it may believe."""

    reason = "NoAuthority"


class TrustDamaged(MachineError):
    """The file cannot be read as it was written."""

    reason = "TrustDamaged"


@dataclass(frozen=True, slots=True)
class Trusted:
    """The host's name, and SHA-256 in hex of the authorities that may vouch for its manager."""

    host: str
    pins: tuple[str, ...]


def load(folder: Path) -> Trusted | None:
    """What is pinned in a state folder; None where nothing is. Raises TrustDamaged."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_BYTES))
        trusted = Trusted(found["host"], tuple(found["pins"]))
        if not (isinstance(trusted.host, str) and NAME.match(trusted.host)):
            raise ValueError("host: no name of a host")
        if not 1 <= len(trusted.pins) <= MOST_PINS or not all(
            isinstance(p, str) and PIN.match(p) for p in trusted.pins
        ):
            raise ValueError("pins: SHA-256 of certificates, in hex")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrustDamaged(
            f"{path}: {error}; write it anew: casemate-agent trust HOST PIN (casemate ca list --no-trunc)"
        ) from error
    return trusted


def save(folder: Path, trusted: Trusted) -> None:
    """Durable when this returns. Raises OSError."""
    write_private(folder, FILE, json.dumps({"host": trusted.host, "pins": trusted.pins}).encode())


def sealing_key(folder: Path) -> "X25519PrivateKey":
    """The key of this host's root, made where there is none. Raises OSError, TrustDamaged."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    found = load_sealing(folder)
    if found is None:
        found = X25519PrivateKey.generate()
        write_private(folder, SEALING, found.private_bytes_raw())
    return found


def load_sealing(folder: Path) -> "X25519PrivateKey | None":
    """The same; None where there is none. Raises TrustDamaged."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    path = folder / SEALING
    try:
        return X25519PrivateKey.from_private_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrustDamaged(f"{path}: {error}; remove it and join again by a new token") from error


def checked(host: str, pin: str) -> Trusted:
    """What an operator types. Raises NoAuthority."""
    if not NAME.match(host):
        raise NoAuthority(f"host: {shown(host)} is no name of a host")
    if not PIN.match(pin):
        raise NoAuthority(
            f"pin: {shown(pin)} is not SHA-256 of a certificate, 64 hex digits (casemate ca list --no-trunc)"
        )
    return Trusted(host, (pin,))


class Trust:
    """What is pinned for one host, and streams that keep to it. ``folder`` is the agent's state folder."""

    def __init__(self, folder: Path, now: Callable[[], float]) -> None:
        self._folder = folder
        self._now = now

    def _pinned(self) -> Trusted:
        trusted = load(self._folder)
        if trusted is None:
            raise NoAuthority(
                f"{self._folder / FILE} is not there, so root knows no authority to believe: the host joined before it was kept,"
                " or has not joined (casemate-agent trust HOST PIN, with a pin of casemate ca list --no-trunc)"
            )
        return trusted

    def session(self, raw: "RawStream") -> "SignedSession":
        """A session over a stream of messages that a relay passes on. Raises NoAuthority, TrustDamaged."""
        return SignedSession(raw, self._pinned(), load_sealing(self._folder), self._now, self._welcomed)

    def channel(self, raw: "RawStream") -> "SignedChannel":
        """The same for a channel."""
        return SignedChannel(raw, self._pinned(), load_sealing(self._folder), self._now)

    async def _welcomed(self, trusted: Trusted) -> None:
        try:
            await asyncio.to_thread(save, self._folder, trusted)
        except OSError as error:
            log.error("the authorities that are trusted now are not kept: %s", error)
        else:
            log.info("authorities of the fleet: %s", ", ".join(pin[:16] for pin in trusted.pins))


RawStream = Stream[bytes, bytes]


class SignedSession:
    """A session whose messages count only as the manager has signed them."""

    def __init__(
        self,
        raw: RawStream,
        trusted: Trusted,
        sealing: "X25519PrivateKey | None",
        now: Callable[[], float],
        welcomed: Callable[[Trusted], Any],
    ) -> None:
        from casemate_agent.uplink.transport import session_codec
        from casemate_wire.codec.signed import sealed_in_session

        self._sealed_in = sealed_in_session
        self._raw = raw
        self._trusted = trusted
        self._now = now
        self._welcomed = welcomed
        self._codec = session_codec()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._opener = Opener(Purpose("session", trusted.host, "", self._nonce), trusted.pins, sealing)

    async def send(self, message: FromHost) -> None:
        if isinstance(message, Hello):
            message = replace(message, nonce=self._nonce)
        await self._raw.send(self._codec.encode(message))

    async def receive(self) -> ToHost | None:
        data = await self._raw.receive()
        if data is None:
            return None
        sealed = self._sealed_in(data)
        value = self._codec.decode(data if sealed is None else self._opener.open(sealed, self._now()))
        if sealed is None and not isinstance(value, UNSIGNED):
            raise BrokenOff(f"{type(value).__name__} came unsigned: it is not believed to be the manager's")
        if isinstance(value, Welcome) and value.authorities and set(value.authorities) != set(self._trusted.pins):
            await self._welcomed(Trusted(self._trusted.host, value.authorities))
        return value

    async def close(self) -> None:
        await self._raw.close()


class SignedChannel:
    """A channel whose frames count only as the manager has signed them, for the ticket that root shows."""

    def __init__(
        self, raw: RawStream, trusted: Trusted, sealing: "X25519PrivateKey | None", now: Callable[[], float]
    ) -> None:
        from casemate_agent.uplink.transport import channel_codec
        from casemate_wire.codec.signed import sealed_in_channel

        self._sealed_in = sealed_in_channel
        self._raw = raw
        self._trusted = trusted
        self._sealing = sealing
        self._now = now
        self._codec = channel_codec()
        self._opener: Opener | None = None

    async def send(self, message: Frame) -> None:
        if isinstance(message, Ticket):
            nonce = secrets.token_bytes(NONCE_BYTES)
            purpose = Purpose("channel", self._trusted.host, message.ticket, nonce)
            self._opener = Opener(purpose, self._trusted.pins, self._sealing)
            message = replace(message, nonce=nonce)
        await self._raw.send(self._codec.encode(message))

    async def receive(self) -> Frame | None:
        data = await self._raw.receive()
        if data is None:
            return None
        if self._opener is None:
            raise BrokenOff("a frame came before the ticket was shown")
        sealed = self._sealed_in(data)
        if sealed is None:
            raise BrokenOff("a frame came unsigned: it is not believed to be the manager's")
        return self._codec.decode(self._opener.open(sealed, self._now()))

    async def close(self) -> None:
        await self._raw.close()
