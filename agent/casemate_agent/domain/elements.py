"""Small helpers over ElementTree. PURE."""

from collections.abc import Mapping
from xml.etree.ElementTree import Element, SubElement

from casemate_core.errors import InternalError


def add(parent: Element, tag: str, attributes: Mapping[str, str | int] | None = None, text: str = "") -> Element:
    """A new last child of ``parent``. Raises InternalError for what XML cannot hold."""
    element = SubElement(parent, tag, {key: xml_text(str(value)) for key, value in (attributes or {}).items()})
    if text:
        element.text = xml_text(text)
    return element


def xml_text(text: str) -> str:
    """``text`` itself. Raises InternalError where it has a character outside ``Char`` of XML 1.0 (section 2.2).

    The serialiser would write such a character and libvirt's parser would then refuse the whole domain; whoever puts a
    tenant's words into the XML encodes them first (see ``metadata``).
    """
    for character in text:
        code = ord(character)
        if not (code in (0x9, 0xA, 0xD) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000):
            raise InternalError(f"character U+{code:04X} cannot stand in XML")
    return text


def plain_words(text: str, limit: int) -> str:
    """``text`` on one line, with what XML cannot hold replaced, at most ``limit`` characters: for titles."""
    return "".join(
        c if c.isprintable() and ord(c) not in (0xFFFE, 0xFFFF) else "\N{REPLACEMENT CHARACTER}" for c in text
    )[:limit]
