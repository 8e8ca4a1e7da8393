"""PURE. Which addresses on the web may be asked."""

import ipaddress
from urllib.parse import urlsplit


def is_fit(url: str) -> bool:
    """Whether a URL may be asked: https, or http on loopback."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return parts.scheme == "https" or (
            parts.scheme == "http" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
        )
    except ValueError:
        return False
