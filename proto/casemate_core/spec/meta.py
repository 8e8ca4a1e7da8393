"""Names, labels, and what every object carries."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from casemate_core.errors import Violation, shown

DEFAULT_TENANT = "default"
#: RFC 1123 label, the rule of Kubernetes for names.
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z", re.ASCII)
#: A label's key: optional DNS prefix and `/`, then a name of at most 63 characters (Kubernetes, "Labels and selectors").
LABEL_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z", re.ASCII
)
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?\Z", re.ASCII)
MAX_LABELS = 64
MAX_ANNOTATION_BYTES = 64 * 1024
NAME_REMEDY = "use at most 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"

#: Kinds whose objects belong to a tenant; all others belong to the fleet.
TENANT_KINDS = frozenset(
    {"Environment", "Volume", "Secret", "SecurityGroup", "Instance", "Pod", "Placement", "Operation", "Event"}
)


@dataclass(frozen=True, slots=True)
class Meta:
    """Identity and bookkeeping of an object. ``tenant`` is empty for kinds of the fleet; times are seconds since the epoch."""

    name: str
    tenant: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    uid: str = ""
    generation: int = 0
    #: Store revision of the last change; 0 for what is not stored yet.
    resource_version: int = 0
    created_s: float = 0.0
    deleting_s: float = 0.0


def check_name(path: str, name: str) -> Iterator[Violation]:
    """Violations of the rule for names."""
    if not name:
        yield Violation(path, "", "is missing", NAME_REMEDY)
    elif not NAME.match(name):
        yield Violation(path, shown(name), "is not a valid name", NAME_REMEDY)


def check_labels(path: str, labels: Mapping[str, str]) -> Iterator[Violation]:
    """Violations of the rules for label keys and values."""
    if len(labels) > MAX_LABELS:
        yield Violation(path, str(len(labels)), "are too many labels", f"keep at most {MAX_LABELS}")
        return
    for key, value in labels.items():
        if not LABEL_KEY.match(key):
            yield Violation(
                f"{path}[{shown(key)}]", "", "is not a valid label key", "see the rules for labels in docs/objects.md"
            )
        if not LABEL_VALUE.match(value):
            yield Violation(
                f"{path}[{shown(key)}]",
                shown(value),
                "is not a valid label value",
                "use at most 63 of A-Z a-z 0-9 - _ .",
            )


def check_meta(kind: str, meta: Meta) -> Iterator[Violation]:
    """Violations in the metadata of an object that a user applies."""
    yield from check_name("metadata.name", meta.name)
    if kind in TENANT_KINDS:
        yield from check_name("metadata.tenant", meta.tenant)
    elif meta.tenant:
        yield Violation(
            "metadata.tenant",
            shown(meta.tenant),
            f"does not belong on a {kind}, which is of the whole fleet",
            "remove it",
        )
    yield from check_labels("metadata.labels", meta.labels)
    size = sum(len(k.encode()) + len(v.encode()) for k, v in meta.annotations.items())
    if size > MAX_ANNOTATION_BYTES:
        yield Violation(
            "metadata.annotations", f"{size} bytes", "are too large", f"keep them within {MAX_ANNOTATION_BYTES} bytes"
        )
