"""Find the uncompressed kernel inside a ``bzImage``.

PURE but for the decompressors of the standard library. An emulated processor spends about a second on unpacking its
own kernel; QEMU boots an uncompressed ELF kernel directly (PVH), so the host unpacks it once, when the image is built.

The layout is that of ``Documentation/arch/x86/boot.rst`` in the kernel's source: the number of real-mode sectors at
0x1f1, the signature ``HdrS`` at 0x202, the protocol version at 0x206, and from version 2.08 on the offset and length
of the payload at 0x248 and 0x24c, counted from the first protected-mode byte.
"""

import lzma
import struct
import zlib
from dataclasses import dataclass

_ELF = b"\x7fELF"
# First bytes of a payload -> the name of its compression.
_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (_ELF, "none"),
)


class BadKernel(ValueError):
    """The file is not a kernel that this module can take apart; the text says in what it differs."""


@dataclass(frozen=True, slots=True)
class Payload:
    """The packed kernel: how it is packed (gzip, xz, zstd, lz4 or none), its bytes, and the size it unpacks to."""

    packing: str
    data: bytes
    unpacked_bytes: int


def payload(image: bytes) -> Payload:
    """Cut the payload out of a ``bzImage``. Raises `BadKernel`."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise BadKernel("no boot header: this is not a bzImage")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise BadKernel(f"boot protocol {version >> 8}.{version & 0xFF:02}: 2.08 is the first that locates the payload")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    if length < 8 or start + length > len(image):
        raise BadKernel(f"the payload lies at {start}..{start + length}, outside of the file's {len(image)} bytes")
    data = image[start : start + length]
    for magic, packing in _MAGICS:
        if data.startswith(magic):
            if packing in ("none", "gzip"):  # gzip carries its own size; an unpacked payload is what it is
                return Payload(packing, data, len(data) if packing == "none" else _le32(data[-4:]))
            # The build appends the unpacked size to every other packing.
            return Payload(packing, data[:-4], _le32(data[-4:]))
    raise BadKernel(f"unknown packing, the payload starts with {data[:6].hex()}")


def _le32(data: bytes) -> int:
    return int.from_bytes(data, "little")


def unpack(part: Payload) -> bytes | None:
    """Unpack what the standard library can unpack; None for zstd and lz4, which the caller gives to their tools."""
    if part.packing == "none":
        return part.data
    if part.packing == "gzip":
        return zlib.decompressobj(31).decompress(part.data)
    if part.packing == "xz":
        return lzma.LZMADecompressor().decompress(part.data)
    return None


def check_unpacked(kernel: bytes, part: Payload) -> bytes:
    """Return ``kernel`` if it is the ELF file of the promised size. Raises `BadKernel`."""
    if not kernel.startswith(_ELF):
        raise BadKernel(f"the unpacked kernel is no ELF file, it starts with {kernel[:4].hex()}")
    if len(kernel) != part.unpacked_bytes:
        raise BadKernel(f"the kernel unpacked to {len(kernel)} bytes, its header promised {part.unpacked_bytes}")
    return kernel
