"""Seals secrets for the store, and opens them for the host that runs who names them.

Theory of operation. AES-SIV (RFC 5297), the form of AES that keeps its promise when nothing random goes in: the same text at
the same place has the same ciphertext, so that a request that is repeated is the same request, and a change shows as one.
Tenant, name and key are authenticated with it: ciphertext that is moved to another place does not open. The key is derived
from the manager's own, which is not in the store.
"""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from casemate_core.errors import CallerError, InternalError
from casemate_core.spec.instance import DesiredInstance
from casemate_core.spec.secret import Secret, SecretText, place_of, references
from casemate_manager.fleet.records import tenant_key
from casemate_manager.fleet.state import State
from casemate_manager.keyring import Keyring

_FORM: Final = "1:"


class WrongKey(CallerError):
    """The manager's key is not the one that secrets were sealed with."""

    reason = "WrongKey"


class Vault:
    """Seals and opens. Made of the manager's keyring."""

    def __init__(self, keyring: Keyring) -> None:
        self._cipher = AESSIV(keyring.key("secrets/1") + keyring.key("secrets/2"))

    def seal(self, secret: Secret) -> Secret:
        """The secret as it may be stored and shown: without its text."""
        place = (secret.meta.tenant, secret.meta.name)
        sealed = {key: self._seal(text, *place, key) for key, text in sorted(secret.data.items())}
        return replace(secret, sealed=sealed, data={})

    def _seal(self, text: str, *place: str) -> str:
        raw = self._cipher.encrypt(text.encode(), [part.encode() for part in place])
        return _FORM + base64.b64encode(raw).decode()

    def open(self, secret: Secret, key: str) -> str:
        """The text of one key. Raises InternalError where it does not open; KeyError where there is none."""
        sealed = secret.sealed[key]
        place = [part.encode() for part in (secret.meta.tenant, secret.meta.name, key)]
        try:
            if not sealed.startswith(_FORM):
                raise ValueError("another form")
            return self._cipher.decrypt(base64.b64decode(sealed.removeprefix(_FORM)), place).decode()
        except (InvalidTag, ValueError) as error:
            name = tenant_key(secret.meta.tenant, secret.meta.name)
            raise InternalError(f"secret {name} does not open with the manager's key") from error

    def check(self, secrets: Iterable[Secret]) -> None:
        """Whether stored secrets open. Raises WrongKey: better at the start than when a guest waits for one."""
        for secret in secrets:
            for key in secret.sealed:
                try:
                    self.open(secret, key)
                except InternalError as error:
                    raise WrongKey(f"{error}: is it the key file that belongs to this store?") from None

    def revealed(self, state: State, instance: DesiredInstance) -> DesiredInstance:
        """The instance as its host gets it: with the texts of the secrets that its pods name beside them."""
        texts: dict[str, SecretText] = {}
        for _, name, key in references(tuple(dict(pod) for pod in instance.pods)):
            secret = state.secrets[tenant_key(instance.tenant, name)]
            for wanted in (key,) if key else secret.sealed:
                mark = hashlib.sha256(secret.sealed[wanted].encode()).hexdigest()
                texts[place_of(name, wanted)] = SecretText(mark, self.open(secret, wanted))
        return replace(instance, secrets=texts) if texts else instance
