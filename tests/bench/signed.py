"""What signing costs that a split agent is told by signed messages: at the manager, at root, and for a whole fleet.

    python tests/bench/signed.py [--seconds 1]

One core, CPU time. A record is the desired state of one instance as the manager sends it; "a stream begins" is what root does once a
session, with the certificates of three authorities that followed one another. The share of a message is told beside what it takes to
serialize and to decode the same record.

Prints a table, then one line of JSON; exits 0.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from casemate_manager.api.tls import ServerTls
from casemate_manager.authority import Authorities
from casemate_wire.codec.hosts import to_host_from_wire, to_host_to_wire
from casemate_wire.signed import Opener, Purpose, Sealed, Signer, signer_of
from casemate_wire.stream import Desired
from casemate_wire.v1 import hosts_pb2 as pb
from support.instances import instance, nic

PURPOSE = Purpose("session", "host-1", "", bytes(32))


def microseconds(work: Callable[[], Any], seconds: float) -> float:
    """CPU time of one call."""
    work()
    calls, begin = 0, time.process_time()
    while (used := time.process_time() - begin) < seconds:
        for _ in range(20):
            work()
        calls += 20
    return used / calls * 1e6


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    tls = ServerTls(Authorities(folder / "authorities", time.time()), (), time.time)
    pins = tls.pins
    for _ in range(2):
        tls.authorities.roll(tls.authorities.signing.pin, time.time())
    key = tls.signing()
    record = Desired(1, 1, instances=(instance(nics=(nic(),), user_data="x" * 1024),))
    data = to_host_to_wire(record).SerializeToString()
    signer = Signer(key, PURPOSE)
    first, second = signer.sign(data), signer.sign(data)
    opener = Opener(PURPOSE, pins)
    opener.open(first, time.time())

    def open_again() -> None:
        opener._number = 1  # the same message each time: its number is due again
        opener.open(second, time.time())

    root = X25519PrivateKey.generate()
    sealing = root.public_key().public_bytes_raw()
    sealer = Signer(key, PURPOSE, sealing)
    sealed_first, sealed = sealer.sign(data), sealer.sign(data)
    unsealer = Opener(PURPOSE, pins, root)
    unsealer.open(sealed_first, time.time())

    def unseal_again() -> None:
        unsealer._number = 1
        unsealer.open(sealed, time.time())

    large = bytes(1 << 20)
    result = {
        "record_bytes": len(data),
        "sign_us": microseconds(lambda: signer.sign(data), seconds),
        "verify_us": microseconds(open_again, seconds),
        "stream_begins_us": microseconds(lambda: signer_of(key.chain, pins, time.time()), seconds),
        "encrypt_and_sign_us": microseconds(lambda: sealer.sign(data), seconds),
        "verify_and_decrypt_us": microseconds(unseal_again, seconds),
        "encrypted_stream_begins_us": microseconds(lambda: Signer(key, PURPOSE, sealing), seconds),
        "sign_1_mib_us": microseconds(lambda: signer.sign(large), seconds),
        "serialize_us": microseconds(lambda: to_host_to_wire(record).SerializeToString(), seconds),
        "decode_us": microseconds(lambda: to_host_from_wire(pb.ToHost.FromString(data)), seconds),
        "bytes_more": len(_wire(second)) - len(data),
        "bytes_more_first": len(_wire(first)) - len(data),
    }
    return {name: round(value, 1) for name, value in result.items()}


def _wire(sealed: Sealed) -> bytes:
    signed = pb.Signed(
        message=sealed.message, number=sealed.number, signature=sealed.signature, chain=list(sealed.chain)
    )
    return pb.ToHost(signed=signed).SerializeToString()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds that each figure is taken over")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options.seconds)
    for key, value in result.items():
        print(f"{key:22} {value:>10}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
