"""Secret: text that reaches only the host that runs an instance whose pods name it.

``data`` holds what a user sent, on its way from the border to being sealed, and nowhere else; what is stored and shown has
``sealed`` alone. Values are in no representation, no error and no message to users: they see a fingerprint of each, which tells
whether two are the same.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from casemate_core.errors import Violation, shown
from casemate_core.spec.meta import Meta, check_meta

MAX_KEYS: Final = 64
MAX_BYTES: Final = 256 * 1024
_KEY: Final = re.compile(r"[-._A-Za-z0-9]{1,253}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret. ``sealed``: key to ciphertext, in base64."""

    meta: Meta
    sealed: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Key to a word that is the same for the same text at the same place; of the ciphertext, so that nothing can be tried."""
        return {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in sorted(self.sealed.items())}


def check_secret(secret: Secret) -> Iterator[Violation]:
    """Violations of the rules of meaning. No value is told."""
    yield from check_meta("Secret", secret.meta)
    if len(secret.data) > MAX_KEYS:
        yield Violation("spec.data", str(len(secret.data)), "are too many", f"keep at most {MAX_KEYS}")
    size = sum(len(text.encode()) for text in secret.data.values())
    if size > MAX_BYTES:
        yield Violation("spec.data", f"{size} bytes", "are too large", f"keep them within {MAX_BYTES} bytes")
    for key, text in secret.data.items():
        if not _KEY.match(key):
            yield Violation(f"spec.data[{shown(key)}]", "", "is not a valid key", "use A-Z a-z 0-9 - _ .")
        if "\0" in text:
            yield Violation(
                f"spec.data[{shown(key)}]", "", "holds a NUL, which no variable can", "encode it, as base64"
            )


Place = tuple[str, str, str]


def references(pods: tuple[Mapping[str, Any], ...]) -> Iterator[Place]:
    """(field path, secret, key) of every variable of checked pods that comes from a secret."""
    for i, pod in enumerate(pods):
        for kind in ("initContainers", "containers"):
            for j, container in enumerate(pod["spec"].get(kind) or ()):
                for k, variable in enumerate(container.get("env") or ()):
                    if "valueFrom" in variable:
                        ref = variable["valueFrom"]["secretKeyRef"]
                        path = f"spec.pods[{i}].spec.{kind}[{j}].env[{k}].valueFrom.secretKeyRef"
                        yield path, str(ref["name"]), str(ref["key"])


def resolved(pod: Mapping[str, Any], values: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """The pod with the text of secrets, by (secret, key), where it named them. Raises KeyError for one that is not there."""
    spec = dict(pod["spec"])
    for kind in ("initContainers", "containers"):
        if kind in spec:
            spec[kind] = [_container(container, values) for container in spec[kind]]
    return {**pod, "spec": spec}


def _container(container: Mapping[str, Any], values: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    if "env" not in container:
        return dict(container)
    env = []
    for variable in container["env"]:
        if "valueFrom" in variable:
            ref = variable["valueFrom"]["secretKeyRef"]
            env.append({"name": variable["name"], "value": values[str(ref["name"]), str(ref["key"])]})
        else:
            env.append(variable)
    return {**container, "env": env}
