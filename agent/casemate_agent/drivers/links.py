"""Network interfaces asked for by name.

What may live here: pyroute2's question about one interface, which several drivers share.
"""

import errno
from typing import Any

from pyroute2 import IPRoute, NetlinkError


def named_link(ip: IPRoute, name: str, **filters: int) -> tuple[Any, ...]:
    """The kernel's message about one interface; empty where there is none of that name. Raises NetlinkError."""
    try:
        return tuple(ip.link("get", ifname=name, **filters))
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return ()
        raise
