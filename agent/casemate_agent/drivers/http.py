"""Brings the bytes of a file by http or https.

What may live here: one request. Bounds of size, the digest and the disk are ``fetch``'s; in a split agent it is the relay
that runs this, and the store is at the other end of a socket.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

from casemate_core.errors import MachineError, shown
from casemate_core.quantity import MIB

CHUNK = 4 * MIB
CONNECT_S = 20.0
#: Longest silence of a server within a transfer.
SILENCE_S = 60.0

#: Of a source, within a deadline: its length where the server says it, and its bytes in pieces of CHUNK at the most.
Download = Callable[[str, float], AbstractAsyncContextManager[tuple[int | None, AsyncIterator[bytes]]]]


class SourceFailed(MachineError):
    """The server did not give the file; it may later."""

    reason = "SourceFailed"


def public_url(source: str) -> str:
    """The source without user, password and query, for errors and logs."""
    try:
        parts = urlsplit(source)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not a URL)"
    return shown(f"{parts.scheme}://{host}{port}{parts.path}")


@asynccontextmanager
async def http_download(source: str, deadline_s: float) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
    """See `Download`. Raises SourceFailed."""
    import aiohttp  # only for who has a network: not in the half of a split agent that is root

    timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=CONNECT_S, sock_read=SILENCE_S)
    where = public_url(source)
    try:
        # auto_decompress off: the digest is of the file, not of what a Content-Encoding makes of it.
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False) as session,
            session.get(source, max_redirects=5, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status != 200:
                raise SourceFailed(f"{where}: the server answers {response.status} {shown(response.reason or '')}")
            yield response.content_length, response.content.iter_chunked(CHUNK)
    except (aiohttp.ClientError, ValueError) as error:
        raise SourceFailed(f"{where}: {type(error).__name__}: {shown(str(error))}") from error
    except TimeoutError as error:
        raise SourceFailed(f"{where}: the transfer took longer than allowed") from error
