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
#: Mode of a file where its pod names none, as in Kubernetes.
DEFAULT_MODE: Final = 0o644


@dataclass(frozen=True, slots=True)
class SecretText:
    """A text on its way to a guest. ``fingerprint`` changes with it and tells nothing of it; None: it is not at hand."""

    fingerprint: str
    text: str | None = field(default=None, repr=False)


def place_of(secret: str, key: str) -> str:
    """Names one text of a tenant."""
    return f"{secret}/{key}"


def references(pods: tuple[Mapping[str, Any], ...]) -> Iterator[Place]:
    """(field path, secret, key) of every variable and file of checked pods that comes from a secret.

    The key is empty where a volume takes all keys of its secret.
    """
    for i, pod in enumerate(pods):
        for kind in ("initContainers", "containers"):
            for j, container in enumerate(pod["spec"].get(kind) or ()):
                for k, variable in enumerate(container.get("env") or ()):
                    if "valueFrom" in variable:
                        ref = variable["valueFrom"]["secretKeyRef"]
                        path = f"spec.pods[{i}].spec.{kind}[{j}].env[{k}].valueFrom.secretKeyRef"
                        yield path, str(ref["name"]), str(ref["key"])
        for j, volume in enumerate(pod["spec"].get("volumes") or ()):
            if "secret" in volume:
                path, secret = f"spec.pods[{i}].spec.volumes[{j}].secret", volume["secret"]
                items = secret.get("items") or ()
                if not items:
                    yield path, str(secret["secretName"]), ""
                for n, item in enumerate(items):
                    yield f"{path}.items[{n}]", str(secret["secretName"]), str(item["key"])


def lacks_text(pods: tuple[Mapping[str, Any], ...], texts: Mapping[str, SecretText]) -> bool:
    """Whether a text that pods name is not at hand."""
    for _, secret, key in references(pods):
        found = [texts[place] for place in _places(secret, key, texts) if place in texts]
        if not found or any(text.text is None for text in found):
            return True
    return False


def _places(secret: str, key: str, texts: Mapping[str, SecretText]) -> list[str]:
    """Places that a reference means: all of the secret where it names no key."""
    return [place_of(secret, key)] if key else sorted(p for p in texts if p.startswith(f"{secret}/"))


def resolved(pod: Mapping[str, Any], texts: Mapping[str, SecretText]) -> dict[str, Any]:
    """The pod with the texts that it names, by `place_of`, for the guest. Raises KeyError for one that is not there.

    A volume gets ``files``, each with path, mode and text, and a ``fingerprint`` by which the guest knows others from the same.
    """
    spec = dict(pod["spec"])
    for kind in ("initContainers", "containers"):
        if kind in spec:
            spec[kind] = [_container(container, texts) for container in spec[kind]]
    if "volumes" in spec:
        spec["volumes"] = [_volume(volume, texts) for volume in spec["volumes"] or ()]
    return {**pod, "spec": spec}


def _container(container: Mapping[str, Any], texts: Mapping[str, SecretText]) -> dict[str, Any]:
    if "env" not in container:
        return dict(container)
    env = []
    for variable in container["env"]:
        if "valueFrom" in variable:
            ref = variable["valueFrom"]["secretKeyRef"]
            text = texts[place_of(str(ref["name"]), str(ref["key"]))].text
            if text is None:
                raise KeyError(place_of(str(ref["name"]), str(ref["key"])))
            env.append({"name": variable["name"], "value": text})
        else:
            env.append(variable)
    return {**container, "env": env}


def _volume(volume: Mapping[str, Any], texts: Mapping[str, SecretText]) -> dict[str, Any]:
    if "secret" not in volume:
        return dict(volume)
    secret = volume["secret"]
    name, mode = str(secret["secretName"]), int(secret.get("defaultMode", DEFAULT_MODE))
    wanted = [
        (place_of(name, str(item["key"])), str(item["path"]), int(item.get("mode", mode)))
        for item in secret.get("items") or ()
    ] or [(place, place.partition("/")[2], mode) for place in _places(name, "", texts)]
    files, marks = [], hashlib.sha256()
    for place, path, bits in sorted(wanted, key=lambda each: each[1]):
        if (text := texts[place].text) is None:
            raise KeyError(place)
        files.append({"path": path, "mode": bits, "text": text})
        marks.update(f"{path}\0{bits}\0{texts[place].fingerprint}\0".encode())
    return {"name": volume["name"], "secret": {"secretName": name, "files": files, "fingerprint": marks.hexdigest()}}
