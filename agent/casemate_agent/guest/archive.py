"""The guest's helper as one file: an archive that Python runs.

What may live here: the modules of ``casemate_guest`` to the bytes of an archive. As :mod:`zipapp` makes it, a first line that
names an interpreter and a ZIP file with a ``__main__.py``, but the same bytes wherever and whenever it is made: members in the
order of their names, with one time and one mode. No compiled code is in it: guests have their own versions of Python.
"""

import io
import zipfile
from functools import cache
from pathlib import Path

from casemate_agent.guest.entry import PACKAGE

INTERPRETER = b"#!/usr/bin/python3\n"
#: The earliest time that the format can hold.
TIME = (1980, 1, 1, 0, 0, 0)


@cache
def helper() -> bytes:
    """The helper of this agent. Made once: an agent whose files are replaced as it runs goes on with those that it knows."""
    folder = Path(__file__).parent / PACKAGE
    modules = {f"{PACKAGE}/{path.name}": path.read_bytes() for path in folder.glob("*.py")}
    return archive({"__main__.py": (folder.parent / "entry.py").read_bytes(), **modules})


def archive(modules: dict[str, bytes]) -> bytes:
    """An archive of these files, by their names in it, that Python runs."""
    out = io.BytesIO()
    out.write(INTERPRETER)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, data in sorted(modules.items()):
            member = zipfile.ZipInfo(name, TIME)
            member.create_system, member.external_attr = 3, 0o644 << 16  # a file of Unix, wherever it is made
            member.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(member, data, compresslevel=9)
    return out.getvalue()
