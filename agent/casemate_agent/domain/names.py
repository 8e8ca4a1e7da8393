"""Every name that an instance, or a network, has on its host. PURE.

Names are functions of identities alone, so that nothing has to remember them: what is found on a host after a crash is
found again by its name. ``scope`` tells apart several agents on one machine (tests, a fleet on a laptop); an agent that
has the machine for itself has the scope ``main``.
"""

import hashlib
import re

from casemate_core.errors import InternalError

#: IFNAMSIZ is 16 with the NUL at the end (linux/if.h).
MAX_INTERFACE_NAME = 15
#: Longest path of a unix socket: sun_path has 108 bytes, the last one NUL (unix(7)).
MAX_SOCKET_PATH = 107
DEFAULT_SCOPE = "main"

_SCOPE = re.compile(r"[a-z0-9]{1,12}\Z", re.ASCII)
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+", re.ASCII)
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.ASCII)


def check_scope(scope: str) -> str:
    """``scope`` itself. Raises InternalError where it is not 1 to 12 small letters and digits."""
    if not _SCOPE.match(scope):
        raise InternalError(f"scope {scope!r} is not 1 to 12 lower-case letters and digits")
    return scope


def check_uid(uid: str) -> str:
    """``uid`` itself. It becomes the name of a folder, so anything but a lower-case UUID raises InternalError."""
    if not _UID.match(uid):
        raise InternalError(f"instance uid {uid!r} is not a lower-case UUID")
    return uid


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tap_prefix(scope: str) -> str:
    """``cm`` + 3 hex digits: how the taps of one agent begin. The firewall drops what comes from any other such tap."""
    return f"cm{_digest('scope', check_scope(scope))[:3]}"


def tap_name(scope: str, uid: str, index: int) -> str:
    """``cm`` + 11 hex digits: the host's end of interface ``index`` of an instance, the same for its life."""
    return f"{tap_prefix(scope)}{_digest('tap', uid, str(index))[:8]}"


def bridge_name(scope: str, network: str) -> str:
    """``cmbr-`` + 10 hex digits."""
    return f"cmbr-{_digest('bridge', check_scope(scope), network)[:10]}"


def table_name(scope: str) -> str:
    """Name of our nftables tables, one of family ``inet`` and one of family ``bridge``."""
    return f"casemate_{check_scope(scope)}"


def domain_name(environment: str, name: str, ordinal: int, uid: str) -> str:
    """What people see in ``virsh list``. Unique through the uid; libvirt makes folders and files of it."""
    shown = _UNFIT.sub("-", f"{environment}-{name}-{ordinal}")[:48].strip("-.")
    return f"{shown or 'instance'}-{uid[:8]}"


def channel_path(run_dir: str, uid: str) -> str:
    """Unix socket of the helper's channel. Raises InternalError where the folder's path is too long for a socket."""
    path = f"{run_dir}/{check_uid(uid)}.sock"
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise InternalError(f"{path} is longer than {MAX_SOCKET_PATH} bytes; use a shorter folder for sockets")
    return path
