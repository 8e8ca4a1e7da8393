"""Frames of the protocol: messages to bytes, and bytes to messages."""

from __future__ import annotations

import json
from binascii import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Message = dict[str, Any]

PROTOCOL = 1
VERSION = "1.1"
MAX_HEADER = 0xFFFF
MAX_PAYLOAD = 2 << 20
MAX_CONTENT = 6 + MAX_HEADER + MAX_PAYLOAD
CHUNK = 32 * 1024  # bytes of one frame of a stream
STDIN_WINDOW = 64 * 1024  # bytes of standard input that the host may send before it is granted more
MAX_STREAMS = 64
OUT_LOW = 128 * 1024  # streams are asked for more while less than this waits for the port
MAX_TEXT = 512  # characters of a message about an error


def encode(header: Message, payload: bytes = b"") -> bytes:
    """One frame. Raises ValueError when the header or the payload is too large."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise ValueError(f"frame too large: header {len(text)}, payload {len(payload)} bytes")
    body = len(text).to_bytes(2, "big") + text + payload
    content = crc32(body).to_bytes(4, "big") + body
    return b"\xff" + content.replace(b"\xfe", b"\xfe\x01").replace(b"\xff", b"\xfe\x02") + b"\xff"


class Decoder:
    """Bytes in, frames out. Never raises, and never holds more than one frame of the largest size.

    ``dropped`` counts the pieces between two FF that were no frame: cut off, garbled or too long.
    """

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._skipping = False
        self.dropped = 0

    def feed(self, data: bytes) -> list[tuple[Message, bytes]]:
        """Return the frames that ``data`` completes."""
        frames = []
        *ended, rest = data.split(b"\xff")
        for piece in ended:
            content = b"".join((*self._held, piece))
            skipping = self._skipping
            self.reset()
            if skipping:
                self.dropped += 1
            elif content:
                frame = self._decode(content)
                if frame is None:
                    self.dropped += 1
                else:
                    frames.append(frame)
        if rest and not self._skipping:
            self._held.append(rest)
            self._held_bytes += len(rest)
            if self._held_bytes > 2 * MAX_CONTENT:  # twice: every byte may be stuffed
                self.reset()
                self._skipping = True
        return frames

    def reset(self) -> None:
        """Forget a frame that has begun."""
        self._held.clear()
        self._held_bytes = 0
        self._skipping = False

    @staticmethod
    def _decode(stuffed: bytes) -> tuple[Message, bytes] | None:
        if stuffed.endswith(b"\xfe"):
            return None  # cut off within a stuffed byte
        content = stuffed.replace(b"\xfe\x02", b"\xff").replace(b"\xfe\x01", b"\xfe")
        if not 6 <= len(content) <= MAX_CONTENT or crc32(content[4:]) != int.from_bytes(content[:4], "big"):
            return None
        end = 6 + int.from_bytes(content[4:6], "big")
        if end > len(content):
            return None
        try:
            header = json.loads(content[6:end])
        except (ValueError, RecursionError):
            return None
        if not isinstance(header, dict) or not isinstance(header.get("t"), str):
            return None
        return header, content[end:]
