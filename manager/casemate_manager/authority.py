"""The fleet's authorities on disk, and the certificates that this manager makes with them.

What may live here: files of keys and certificates, and which authority signs. Who may have a certificate is decided by the
fleet's records; what a certificate looks like is :mod:`casemate_manager.pki`.

Theory of operation. A folder for the manager's user alone holds one numbered pair of files for each authority; the highest
number signs, and all that are not retired are trusted. A roll-over adds a number, vouched for by the one before it
(``N.cross``), so that who knows either root accepts what is shown. Retiring an old one removes its key and the trust in what
it signed; what it vouched for stays, so that a host that was away for long still finds its manager. Each file is written
whole under another name and then renamed; the certificate comes last, so that a pair is there or it is not.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from casemate_core.errors import Conflict, InternalError, MachineError, NotFound
from casemate_manager import pki


class AuthorityDamaged(MachineError):
    """The folder of authorities cannot be read as it was written."""

    reason = "AuthorityDamaged"


@dataclass(frozen=True, slots=True)
class Retired:
    """An authority whose certificates are accepted no more; only what it vouched for is kept."""

    certificate: x509.Certificate


class Authorities:
    """See the module. Opening an empty folder makes the first authority."""

    def __init__(self, folder: Path, now_s: float) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)
        #: Changes whenever the authorities do.
        self.version = 0
        self._crosses: dict[int, x509.Certificate] = {}
        with self._locked():
            self._numbers = self._load()
            if not self._numbers:
                self._add(1, pki.make_authority("casemate fleet authority 1", now_s))

    @property
    def signing(self) -> pki.Authority:
        """The one that signs."""
        found = self._numbers[max(self._numbers)]
        if not isinstance(found, pki.Authority):
            raise InternalError("the newest authority is retired")
        return found

    @property
    def trusted(self) -> list[pki.Authority]:
        """Those whose certificates are accepted, oldest first."""
        return [a for _, a in sorted(self._numbers.items()) if isinstance(a, pki.Authority)]

    @property
    def every(self) -> list[pki.Authority | Retired]:
        """All of them, oldest first."""
        return [a for _, a in sorted(self._numbers.items())]

    @property
    def roots(self) -> bytes:
        """Certificates of the trusted ones, as PEM."""
        return pki.pem(*(a.certificate for a in self.trusted))

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What leads from the signing authority back to every older one: each vouched for the next."""
        return tuple(certificate for _, certificate in sorted(self._crosses.items(), reverse=True))

    def roll(self, pin: str, now_s: float) -> pki.Authority:
        """Begin a new authority after the one with this pin. Asked again, it is the same one. Raises Conflict, NotFound."""
        with self._locked():
            self._numbers = self._load()
            number = self._find(pin)
            if number + 1 in self._numbers:
                after = self._numbers[number + 1]
                if number + 1 == max(self._numbers) and isinstance(after, pki.Authority):
                    return after
                raise Conflict("that authority was followed by others since: name the one that signs now")
            old = self.signing
            fresh = pki.make_authority(f"casemate fleet authority {number + 1}", now_s)
            self._add(number + 1, pki.cross_sign(old, fresh, now_s))
            return self.signing

    def retire(self, pin: str) -> Retired:
        """Accept certificates of an authority no more. Raises Conflict for the one that signs, NotFound."""
        with self._locked():
            self._numbers = self._load()
            number = self._find(pin)
            if number == max(self._numbers):
                raise Conflict("that authority signs: begin another first (casemate ca roll)")
            retired = Retired(self._numbers[number].certificate)
            (self._folder / f"{number}.key").unlink(missing_ok=True)
            self._sync()
            self._numbers[number] = retired
            self.version += 1
            return retired

    # --- files --------------------------------------------------------------------------------------------------------

    def _find(self, pin: str) -> int:
        for number, authority in self._numbers.items():
            if pki.pin_of(authority.certificate) == pin:
                return number
        raise NotFound("authority", pin)

    def _load(self) -> dict[int, pki.Authority | Retired]:
        found: dict[int, pki.Authority | Retired] = {}
        for path in self._folder.glob("*.pem"):
            certificate = self._read_certificate(path)
            key, cross = path.with_suffix(".key"), path.with_suffix(".cross")
            crossed = self._read_certificate(cross) if cross.exists() else None
            if crossed is not None:
                self._crosses[_number(path)] = crossed
            if not key.exists():
                found[_number(path)] = Retired(certificate)
                continue
            try:
                private = pki.load_key(key.read_bytes())
            except (OSError, ValueError) as error:
                raise AuthorityDamaged(f"{key}: {error}") from error
            if pki.key_id(private.public_key()) != pki.key_id_of(pki.der(certificate)):
                raise AuthorityDamaged(f"{key} is not the key of {path.name}")
            found[_number(path)] = pki.Authority(certificate, private, crossed)
        return found

    def _read_certificate(self, path: Path) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise AuthorityDamaged(f"{path}: {error}") from error

    def _add(self, number: int, authority: pki.Authority) -> None:
        self._write(f"{number}.key", pki.key_pem(authority.key))
        if authority.cross is not None:
            self._write(f"{number}.cross", pki.pem(authority.cross))
            self._crosses[number] = authority.cross
        self._write(f"{number}.pem", pki.pem(authority.certificate))
        self._numbers[number] = authority
        self.version += 1

    def _write(self, name: str, data: bytes) -> None:
        fresh = self._folder / f"{name}.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._folder / name)
        self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: the manager, or a program beside it."""
        descriptor = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _number(path: Path) -> int:
    try:
        return int(path.stem)
    except ValueError:
        raise AuthorityDamaged(f"{path} does not belong there: remove it") from None
