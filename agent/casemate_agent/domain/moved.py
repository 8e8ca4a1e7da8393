"""The domain that a migrated guest becomes: what its new host would make, with what the guest has already seen kept. PURE."""

from xml.etree.ElementTree import Element, ParseError, fromstring, tostring

from casemate_core.errors import MachineError


class NotTheSame(MachineError):
    """The target describes another domain than the one that is sent."""

    reason = "NotTheSame"


def moved_xml(there: str, here: str) -> str:
    """``there``, as the target would make it (its paths, taps, threads and metadata), with the machine type and the CPU of the
    running domain ``here``: its guest was booted on them. Raises NotTheSame.

    libvirt compares the rest itself, device by device, and refuses what a guest would notice.
    """
    try:
        target, source = fromstring(there), fromstring(here)
    except ParseError as error:
        raise NotTheSame(f"the target's description does not parse: {error}") from None
    for field in ("uuid", "name"):
        if target.findtext(field) != source.findtext(field):
            raise NotTheSame(f"the target describes {target.findtext(field)}, and {source.findtext(field)} is sent")
    machine, kept = source.find("os/type"), source.find("cpu")
    kind = target.find("os/type")
    if machine is not None and kind is not None:
        kind.set("machine", machine.get("machine", ""))
    if kept is not None:
        _replace(target, kept)
    return tostring(target, encoding="unicode")


def _replace(domain: Element, child: Element) -> None:
    for index, each in enumerate(domain):
        if each.tag == child.tag:
            domain[index] = child
            return
    domain.append(child)
