"""What we write about an instance into its domain, and read back. PURE.

libvirt keeps a domain's ``<metadata>`` word for word. Ours says which instance the domain is, of which generation and
placement, and holds the record it was made from as JSON, so that an agent whose ledger is lost can take up its VMs again.

Anyone who may open libvirt's read-only socket (by default every user of the host) can read a domain's XML. So the record
in it leaves out what may hold secrets: ``user_data``, ``pods`` (their environment variables), and the source of an image
where it has a user or a query (a signed URL). The complete record lies in a file that only root reads; the metadata has
its digest, so that the two are never mixed up (see ``record_digest``), and an instance that has neither is rebuilt from
the metadata alone.

JSON is written in ASCII: whatever a tenant named a thing, no character of it can be markup, a control character, or one
that XML cannot hold.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from casemate_agent.domain.elements import add
from casemate_core.plain import to_plain
from casemate_core.spec.instance import DesiredInstance, File, ImageRef

NAMESPACE = "urn:casemate:instance:1"


@dataclass(frozen=True, slots=True)
class Ownership:
    """Our metadata of a domain. ``record`` is JSON, ``digest`` that of the complete record's text."""

    uid: str
    generation: int
    placement_epoch: int
    placement_generation: int
    record: str
    digest: str


def full_record(desired: DesiredInstance) -> str:
    """The complete record, as one line of ASCII JSON. Its user-data and variables may be in confidence: for files that only
    root reads.

    Without an order: a domain tells what it was made from, and nothing is to be done again because of it. Without the texts
    of secrets: the ledger has a place of its own for them.
    """
    return json.dumps(
        to_plain(replace(desired, order=None, secrets={})), ensure_ascii=True, sort_keys=True, separators=(",", ":")
    )


def public_record(desired: DesiredInstance) -> str:
    """``full_record`` without user-data and pods: what every user of the host may see."""
    return full_record(
        replace(
            desired,
            user_data="",
            pods=(),
            image=_public_image(desired.image),
            archives=tuple(map(_public_image, desired.archives)),
        )
    )


def _public_image(image: ImageRef) -> ImageRef:
    return replace(
        image,
        file=_public_file(image.file),
        kernel=_public_file(image.kernel) if image.kernel else None,
        initrd=_public_file(image.initrd) if image.initrd else None,
    )


def _public_file(file: File) -> File:
    return replace(file, source="") if "@" in file.source or "?" in file.source else file


def record_digest(record: str) -> str:
    """sha256 of a record's text, in hex."""
    return hashlib.sha256(record.encode()).hexdigest()


def add_metadata(domain: Element, desired: DesiredInstance) -> None:
    """``<metadata>`` with our one element."""
    tag = f"{{{NAMESPACE}}}"
    instance = add(
        add(domain, "metadata"),
        f"{tag}instance",
        {
            "uid": desired.uid,
            "generation": desired.generation,
            "placement-epoch": desired.placement.epoch,
            "placement-generation": desired.placement.generation,
        },
    )
    add(instance, f"{tag}record", {"sha256": record_digest(full_record(desired))}, public_record(desired))


def parse_metadata(domain: Element, uuid: str) -> Ownership | None:
    """Our metadata, where the domain has it and it speaks of this very domain; else None: a foreign domain.

    A domain cloned by hand carries its original's metadata under another uuid: it is not ours.
    """
    tag = f"{{{NAMESPACE}}}"
    instance = domain.find(f"metadata/{tag}instance")
    if instance is None or instance.get("uid") != uuid:
        return None
    record = instance.find(f"{tag}record")
    try:
        return Ownership(
            uid=uuid,
            generation=int(instance.get("generation", "")),
            placement_epoch=int(instance.get("placement-epoch", "")),
            placement_generation=int(instance.get("placement-generation", "")),
            record="" if record is None else record.text or "",
            digest="" if record is None else record.get("sha256", ""),
        )
    except ValueError:
        # Somebody edited it. What we cannot read we do not own, and never touch.
        return None
