"""TLS as both sides use it: version 1.3 alone, and the one name by which a manager is known.

gRPC for Python has no setting for the least version. It does have one for the ciphers of TLS 1.2 and below, which says
nothing of TLS 1.3: with ciphers that need an RSA certificate, and certificates that are all ECDSA, no handshake below 1.3
can agree on anything. The setting is read once, when gRPC is loaded; so the packages that use gRPC call `only_tls13` when
they are imported, and it refuses to come too late.

Managers are dialled by whatever address leads to them (a balancer, a forwarded port), so the certificate is checked for one
fixed name instead of the address. What makes it a manager is that this fleet's authority signed it for server use.
"""

import os
import sys
from typing import Final

from casemate_core.errors import InternalError

#: Name in every manager's certificate.
SERVER_NAME: Final = "manager.casemate.internal"
#: Option of a channel that has the server's certificate checked for that name.
TARGET_NAME: Final = ("grpc.ssl_target_name_override", SERVER_NAME)
_CIPHERS: Final = "GRPC_SSL_CIPHER_SUITES"
_RSA_ONLY: Final = "ECDHE-RSA-AES256-GCM-SHA384"


def only_tls13() -> None:
    """Leave gRPC's TLS nothing but version 1.3 in this process. Whatever the environment said before is overruled.

    Raises InternalError where gRPC was loaded before: it would speak older versions.
    """
    if os.environ.get(_CIPHERS) == _RSA_ONLY:
        return
    if "grpc" in sys.modules:
        raise InternalError("gRPC was loaded before its TLS was held to version 1.3")
    os.environ[_CIPHERS] = _RSA_ONLY
