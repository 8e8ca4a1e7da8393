"""Gets small JSON documents over HTTPS: what an OpenID Connect provider publishes. Plain HTTP only on loopback."""

import json
from typing import Any, Final

import aiohttp

from casemate_core.errors import Unavailable, shown
from casemate_core.web import is_fit

MAX_BYTES: Final = 1 << 20
TIMEOUT_S: Final = 5.0


async def fetch_json(url: str) -> Any:
    """The document. Follows no redirect: a provider says where its documents are. Raises Unavailable."""
    if not is_fit(url):
        raise Unavailable(f"{shown(url)} is not asked: only https, or http on loopback")
    try:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise Unavailable(f"{shown(url)} answered with {response.status}")
            data = await response.content.read(MAX_BYTES + 1)
            while len(data) <= MAX_BYTES and (more := await response.content.read(MAX_BYTES + 1)):
                data += more
        if len(data) > MAX_BYTES:
            raise Unavailable(f"{shown(url)} is larger than {MAX_BYTES} bytes")
        return json.loads(data)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
        raise Unavailable(f"{shown(url)} cannot be read: {type(error).__name__}") from error
