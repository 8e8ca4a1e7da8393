"""The gRPC server: services, health, reflection, limits. Loopback only, until there is mutual TLS."""

import ipaddress
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from casemate_core.errors import InvalidSpec, Unavailable, Violation, shown
from casemate_wire.v1 import (
    channels_pb2,
    channels_pb2_grpc,
    hosts_pb2,
    hosts_pb2_grpc,
    operators_pb2,
    operators_pb2_grpc,
)

#: Largest message; a page of a thousand environments with their pods stays below it.
MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
OPTIONS: Final[Sequence[tuple[str, Any]]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1024),
    # A host whose machine vanished without a word is found out within 20 s, and is Unknown from then on.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


def check_loopback(address: str) -> str:
    """``address`` as HOST:PORT of loopback. Raises InvalidSpec: nothing else is listened on without mutual TLS."""
    host, separator, port = address.rpartition(":")
    try:
        good = bool(separator) and ipaddress.ip_address(host.strip("[]")).is_loopback and 0 <= int(port) <= 65535
    except ValueError:
        good = host == "localhost" and port.isdecimal() and int(port) <= 65535
    if not good:
        raise InvalidSpec(
            (
                Violation(
                    "listen",
                    shown(address),
                    "is not a loopback address",
                    "write 127.0.0.1:7443; other addresses need TLS",
                ),
            )
        )
    return address


async def serve(
    address: str,
    fleet: operators_pb2_grpc.FleetServicer,
    channels: channels_pb2_grpc.ChannelsServicer,
    hosts: hosts_pb2_grpc.HostLinkServicer,
    gate: grpc.aio.ServerInterceptor,
) -> tuple[grpc.aio.Server, int]:
    """A started server, all services behind the gate, and the port it listens on. Raises Unavailable where the port is taken."""
    server = grpc.aio.server(options=OPTIONS, interceptors=[gate])
    operators_pb2_grpc.add_FleetServicer_to_server(fleet, server)
    channels_pb2_grpc.add_ChannelsServicer_to_server(channels, server)
    hosts_pb2_grpc.add_HostLinkServicer_to_server(hosts, server)
    names = [
        operators_pb2.DESCRIPTOR.services_by_name["Fleet"].full_name,
        channels_pb2.DESCRIPTOR.services_by_name["Channels"].full_name,
        hosts_pb2.DESCRIPTOR.services_by_name["HostLink"].full_name,
    ]
    checks = health.aio.HealthServicer()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(check_loopback(address))
    except RuntimeError as error:
        raise Unavailable(f"cannot listen on {shown(address)}: is the port taken? ({shown(str(error))})") from None
    await server.start()
    return server, port
