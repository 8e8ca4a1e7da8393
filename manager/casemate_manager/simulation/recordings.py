"""A machine from a folder: a copy of the files of its kernel, what libvirt says of it, and what its drivers know.

May live here: the opening of files for the loaders of :mod:`casemate_core.topology_loaders`, which open none. In the folder::

    sys/, proc/         as in the machine's /sys and /proc; links stay links (``cp -a``, ``tar``). What is not needed is not read
    capabilities.xml    of ``virsh capabilities``; may be missing
    facts.json          GPUs, ports, other devices, what the host keeps: the fields of ``HostFacts``; may be missing

Nothing outside the folder is opened: a link that leads out of it is read as a text at most, and not followed.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from casemate_core.plain import from_plain
from casemate_core.topology import Topology
from casemate_core.topology_loaders import BadRecording, HostFacts, from_capabilities, from_sysfs
from casemate_core.topology_loaders.sysfs import GLOBS, LINKS

SYS: Final = "sys"
CAPABILITIES: Final = "capabilities.xml"
FACTS: Final = "facts.json"
#: Of one file: the largest that is read is libvirt's, of some hundred KiB on a machine with many cells.
MAX_BYTES: Final = 8 * 1024 * 1024


def is_recording(folder: Path) -> bool:
    """Whether a folder holds a machine."""
    return (folder / SYS).is_dir()


def read_recording(folder: Path) -> Topology:
    """The machine in the folder. Raises BadRecording, BadPlain, OSError."""
    files = dict(_files(folder))
    facts = HostFacts()
    if (folder / FACTS).is_file():
        try:
            facts = from_plain(HostFacts, json.loads(_text(folder / FACTS)))
        except ValueError as error:
            raise BadRecording(FACTS, str(error)) from error
    facts = replace(facts, name=facts.name or folder.resolve().name)
    if (folder / CAPABILITIES).is_file():
        return from_capabilities(_text(folder / CAPABILITIES), files, facts)
    return from_sysfs(files, facts)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    for pattern in LINKS:
        for path in folder.glob(pattern):
            if path.is_symlink():
                yield path.relative_to(folder).as_posix(), path.readlink().as_posix()
    for pattern in GLOBS:
        for path in folder.glob(pattern):
            if _is_inside(path, folder) and path.is_file():
                yield path.relative_to(folder).as_posix(), _text(path)


def _is_inside(path: Path, folder: Path) -> bool:
    """A link in the copy may lead within it, as those of PCI functions do; one that leads out is not followed."""
    return path.resolve().is_relative_to(folder.resolve())


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BadRecording(str(path), f"has more than {MAX_BYTES} bytes")
    return data.decode("utf-8", "replace")
