"""A guest of one sector that counts: what it says after a move tells whether it is the same one.

It says ``BOOT`` on its serial console, and then eight hex digits with each tick or two of its clock, one more each time; and
writes the number to the second sector of its disk. No kernel, no firmware settings: 125 bytes that a BIOS loads.
"""

from pathlib import Path
from typing import Any

from support.instances import digest_of

#: Assembled (GNU as, .code16) from: set up segments and a stack; say BOOT; again: ecx -> [8000h]; eight digits of ecx and
#: a newline to COM1 (3f8h, waiting for its line status); int 13h, AH=43h: [8000h] -> LBA 1 of disk 80h; sti; hlt; hlt;
#: inc ecx; jmp again.
CODE = bytes.fromhex(
    "ea057c000031c08ed88ec08ed0bc007cfcbf6e7c8a0584c07406e8420047ebf46631c966890e00806689cbbe080066c1c30488d8240f04303c"
    "3976020427e81e004e75eab00ae816006660be747cb44330c0b280cd136661fbf4f46641ebc450bafd03eca82074fb58baf803eec3424f4f54"
    "0a00100001000080000001"
)
SECTOR = 512
SIZE = 1 << 20


def counting_image(folder: Path) -> dict[str, Any]:
    """Manifest of the image."""
    path = folder / "counting.raw"
    path.write_bytes(CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa" + bytes(SIZE - SECTOR))
    spec = {"type": "disk", "source": f"file://{path}", "digest": digest_of(path.read_bytes()), "format": "raw"}
    return {"apiVersion": "casemate/v1", "kind": "Image", "metadata": {"name": "counting"}, "spec": spec}


def counted(console: Path) -> tuple[int, list[int]]:
    """How often the guest has booted, by what its console says, and the numbers that it has said whole."""
    try:
        lines = console.read_bytes().decode("ascii", "replace").replace("\r", "").split("\n")
    except FileNotFoundError:
        return 0, []
    numbers = [int(line, 16) for line in lines[:-1] if len(line) == 8 and set(line) <= set("0123456789abcdef")]
    return sum("BOOT" in line for line in lines), numbers
