"""Reads the headers of disk images, and refuses those that would make QEMU open something else. PURE.

For: the image store. What may live here: bytes in, a description or a refusal out. No file is opened here.

Theory of operation. A qcow2 header can name other files (a backing file, an external data file) that QEMU would open with
the host's rights, and can ask for gigabytes of tables. So an image is admitted only where its header is understood to the
last bit: known version, known feature bits, no reference to any other file, tables that lie inside the file and are no
larger than the disk needs. A raw image has no header; one that begins like another format was declared wrongly, and is
refused so that nobody ever reads it as that.

Source of the layout: QEMU, docs/interop/qcow2.txt. All numbers are big-endian; offsets and sizes in bytes.
"""

import struct
from dataclasses import dataclass

from casemate_core.errors import CallerError, shown

#: As much of a file as the reader wants: the header with its extensions ends within the first cluster (at most 2 MiB),
#: in practice within the first 4 KiB; a header that does not end in here is refused.
HEAD_BYTES = 64 * 1024
#: Larger disks are taken for a mistake or an attack.
MAX_VIRTUAL_BYTES = 64 * 2**40
SECTOR = 512

MAGIC = b"QFI\xfb"
V2_HEADER = 72
V3_HEADER = 104
#: docs/interop/qcow2.txt, "Incompatible features".
DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_EXTERNAL_DATA = 0x44415441
EXTENSION_ENCRYPTION = 0x0537BE77
#: First bytes of formats that are no raw disk (QEMU's block/*.c, "probe").
OTHER_FORMATS = {
    MAGIC: "qcow2",
    b"QED\0": "qed",
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"conectix": "vpc",
    b"vhdxfile": "vhdx",
    b"<<< ": "vdi",
    b"LUKS\xba\xbe": "luks",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}


class ImageRefused(CallerError):
    """An image cannot be used as it is; another try with the same file fails again."""

    reason = "ImageRefused"

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What a header says. ``backing`` and ``backing_format`` are empty for an image that stands alone."""

    format: str
    virtual_bytes: int
    backing: str = ""
    backing_format: str = ""


def read_header(head: bytes, file_bytes: int, declared: str) -> ImageInfo:
    """An image to import: declared as ``raw`` or ``qcow2``. Raises ImageRefused.

    ``head`` is the first HEAD_BYTES of the file (all of it, where it is shorter), ``file_bytes`` its length.
    """
    if declared == "raw":
        return _read_raw(head, file_bytes)
    if declared == "qcow2":
        info = read_qcow2(head, file_bytes)
        if info.backing:
            raise ImageRefused(
                f"the image has the backing file {shown(info.backing)!r}",
                "flatten it: qemu-img convert -O qcow2 IMAGE FLAT",
            )
        return info
    raise ImageRefused(f"format {shown(declared)!r} is not supported", "use qcow2 or raw")


def _read_raw(head: bytes, file_bytes: int) -> ImageInfo:
    for magic, name in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise ImageRefused(f"declared as raw, but the file begins like {name}", _remedy_for(name))
    if file_bytes == 0 or file_bytes % SECTOR:
        raise ImageRefused(f"a raw disk of {file_bytes} bytes is no number of sectors", "import a whole disk image")
    if file_bytes > MAX_VIRTUAL_BYTES:
        raise ImageRefused(f"a disk of {file_bytes} bytes is larger than any machine", "import a smaller image")
    return ImageInfo("raw", file_bytes)


def _remedy_for(name: str) -> str:
    if name == "qcow2":
        return "write format: qcow2"
    if name in ("gzip", "xz", "zstd", "bzip2", "zip"):
        return "decompress it before the import"
    return "convert it: qemu-img convert -O qcow2 IMAGE CONVERTED"


def read_qcow2(head: bytes, file_bytes: int) -> ImageInfo:
    """A qcow2 header with all its rules but the one on backing files. Raises ImageRefused."""
    if not head.startswith(MAGIC):
        raise ImageRefused("declared as qcow2, but the file does not begin like one", "write the format that it has")
    if len(head) < V2_HEADER:
        raise _damaged("the header is cut off")
    version, backing_offset, backing_size, cluster_bits, size, crypt, l1_entries, l1_offset = struct.unpack_from(
        ">IQIIQIIQ", head, 4
    )
    refcount_offset, refcount_clusters, snapshots = struct.unpack_from(">QII", head, 48)
    if version not in (2, 3):
        raise ImageRefused(f"qcow2 version {version} is unknown", "convert it: qemu-img convert -O qcow2 IMAGE NEW")
    if not 9 <= cluster_bits <= 21:
        raise _damaged(f"clusters of 2^{cluster_bits} bytes")
    if crypt:
        raise ImageRefused("the image is encrypted", "decrypt it: qemu-img convert; encrypt inside the guest instead")
    if snapshots:
        raise ImageRefused(f"the image holds {snapshots} internal snapshots", "flatten it: qemu-img convert -O qcow2")
    if not 0 < size <= MAX_VIRTUAL_BYTES or size % SECTOR:
        raise _damaged(f"a virtual size of {size} bytes")
    header_bytes = V2_HEADER
    extended_l2 = False
    if version == 3:
        header_bytes, extended_l2 = _read_v3(head, cluster_bits)
    cluster = 1 << cluster_bits
    # One L2 table is one cluster of entries of 8 bytes (16 with extended L2), each for one cluster of the disk.
    reach = cluster * (cluster // (16 if extended_l2 else 8))
    if not -(-size // reach) <= l1_entries <= -(-MAX_VIRTUAL_BYTES // reach):
        raise _damaged(f"an L1 table of {l1_entries} entries for {size} bytes")
    _inside("L1 table", l1_offset, l1_entries * 8, cluster, file_bytes)
    if not 0 < refcount_clusters <= 2**22 // cluster_bits:
        raise _damaged(f"a refcount table of {refcount_clusters} clusters")
    _inside("refcount table", refcount_offset, refcount_clusters * cluster, cluster, file_bytes)
    backing_format = _read_extensions(head, header_bytes, min(backing_offset or cluster, cluster))
    backing = ""
    if backing_offset:
        if not (backing_size <= 1023 and header_bytes <= backing_offset <= cluster - backing_size):
            raise _damaged("the backing file's name lies outside the first cluster")
        if backing_offset + backing_size > len(head):
            raise _damaged("the header is cut off")
        backing = head[backing_offset : backing_offset + backing_size].decode("utf-8", "surrogateescape")
    return ImageInfo("qcow2", size, backing, backing_format)


def _read_v3(head: bytes, cluster_bits: int) -> tuple[int, bool]:
    """(length of the header, extended L2 entries?). Raises ImageRefused."""
    if len(head) < V3_HEADER:
        raise _damaged("the header is cut off")
    incompatible, _compatible, _autoclear, refcount_order, length = struct.unpack_from(">QQQII", head, 72)
    if incompatible & EXTERNAL_DATA:
        raise ImageRefused("the image keeps its data in another file", "convert it: qemu-img convert -O qcow2")
    if incompatible & CORRUPT:
        raise ImageRefused("the image is marked corrupt", "repair it: qemu-img check -r all IMAGE")
    if incompatible & DIRTY:
        raise ImageRefused("the image was not closed cleanly", "repair it: qemu-img check -r all IMAGE")
    if unknown := incompatible & ~(COMPRESSION | EXTENDED_L2):
        raise ImageRefused(f"the image has unknown features ({unknown:#x})", "convert it: qemu-img convert -O qcow2")
    if refcount_order > 6:
        raise _damaged(f"refcounts of 2^{refcount_order} bits")
    if length < V3_HEADER or length % 8 or length > 1 << cluster_bits:
        raise _damaged(f"a header of {length} bytes")
    if incompatible & COMPRESSION and (len(head) < 105 or length < 112 or head[104] != 1):
        raise ImageRefused("the image has an unknown compression", "convert it: qemu-img convert -O qcow2")
    extended = bool(incompatible & EXTENDED_L2)
    if extended and cluster_bits < 14:
        raise _damaged("extended L2 entries with small clusters")
    return length, extended


def _read_extensions(head: bytes, offset: int, end: int) -> str:
    """Walk the header's extensions; the backing format that they tell. Raises ImageRefused."""
    backing_format = ""
    while offset + 8 <= end:
        if offset + 8 > len(head):
            raise _damaged("the header is cut off")
        kind, length = struct.unpack_from(">II", head, offset)
        offset += 8
        if kind == EXTENSION_END:
            break
        if offset + length > end:
            raise _damaged("a header extension that leaves the header")
        if kind == EXTENSION_EXTERNAL_DATA:
            raise ImageRefused("the image keeps its data in another file", "convert it: qemu-img convert -O qcow2")
        if kind == EXTENSION_ENCRYPTION:
            raise ImageRefused("the image is encrypted", "decrypt it: qemu-img convert")
        if kind == EXTENSION_BACKING_FORMAT:
            backing_format = head[offset : offset + length].decode("ascii", "replace")
        # Any other is safe to pass over: "if unknown, it must be ignored" (docs/interop/qcow2.txt).
        offset += (length + 7) & ~7
    return backing_format


def _inside(what: str, offset: int, length: int, cluster: int, file_bytes: int) -> None:
    if offset % cluster or offset < cluster or offset + length > file_bytes:
        raise _damaged(f"the {what} lies outside the file")


def _damaged(what: str) -> ImageRefused:
    return ImageRefused(f"the qcow2 header is damaged: {what}", "make the image again")
