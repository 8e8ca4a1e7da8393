"""The gRPC server: services, health, reflection, limits, ports.

Two ports with TLS: one that asks for a certificate, for hosts' streams and operators, and one that does not, where machines
that have none yet enrol. Without TLS there is one port, on loopback, and only where that was asked for in words.
"""

import ipaddress
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from casemate_core.errors import InvalidSpec, Unavailable, Violation, shown
from casemate_manager.api.enrolment import EnrolmentService, HostAccess, Joining
from casemate_wire.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    channels_pb2,
    channels_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    gpus_pb2,
    gpus_pb2_grpc,
    hostcare_pb2,
    hostcare_pb2_grpc,
    hosts_pb2,
    hosts_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
    join_pb2,
    join_pb2_grpc,
    operators_pb2,
    operators_pb2_grpc,
    support_pb2,
    support_pb2_grpc,
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
    # Buffers of TLS for each host's stream are as large as a frame: 5 kB less of about 105, and messages are small.
    ("grpc.tsi.max_frame_size", 4096),
    ("grpc.so_reuseport", 0),
)


def check_loopback(address: str) -> str:
    """``address`` as HOST:PORT of loopback. Raises InvalidSpec: nothing else is listened on in plain text."""
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
                    "write 127.0.0.1:7443; other addresses need TLS: leave out --insecure-loopback",
                ),
            )
        )
    return address


def check_address(name: str, address: str) -> str:
    """``address`` as HOST:PORT. Raises InvalidSpec."""
    host, separator, port = address.rpartition(":")
    try:
        good = bool(separator) and 0 <= int(port) <= 65535 and ipaddress.ip_address(host.strip("[]")) is not None
    except ValueError:
        good = host == "localhost" and port.isdecimal() and int(port) <= 65535
    if not good:
        raise InvalidSpec(
            (Violation(name, shown(address), "is not ADDRESS:PORT", "write 0.0.0.0:7443, [::]:7443 or the like"),)
        )
    return address


async def serve(
    address: str,
    fleet: operators_pb2_grpc.FleetServicer,
    channels: channels_pb2_grpc.ChannelsServicer,
    hosts: hosts_pb2_grpc.HostLinkServicer,
    support: support_pb2_grpc.SupportServicer,
    care: hostcare_pb2_grpc.HostCareServicer,
    gates: Sequence[grpc.aio.ServerInterceptor],
    audit: audit_pb2_grpc.AuditServicer,
    identity: identity_pb2_grpc.IdentityServicer,
    gpus: gpus_pb2_grpc.GpusServicer,
    joining: Joining | None = None,
    enrolment_address: str = "",
) -> tuple[grpc.aio.Server, int]:
    """A started server and the port it listens on. Raises Unavailable where a port is taken.

    All services are behind the gates, the outermost first.

    ``joining``: with TLS, and machines enrol at ``enrolment_address``. None: plain text, on loopback only.
    """
    server = grpc.aio.server(options=OPTIONS, interceptors=list(gates))
    operators_pb2_grpc.add_FleetServicer_to_server(fleet, server)
    channels_pb2_grpc.add_ChannelsServicer_to_server(channels, server)
    hosts_pb2_grpc.add_HostLinkServicer_to_server(hosts, server)
    audit_pb2_grpc.add_AuditServicer_to_server(audit, server)
    identity_pb2_grpc.add_IdentityServicer_to_server(identity, server)
    support_pb2_grpc.add_SupportServicer_to_server(support, server)
    hostcare_pb2_grpc.add_HostCareServicer_to_server(care, server)
    gpus_pb2_grpc.add_GpusServicer_to_server(gpus, server)
    names = [
        gpus_pb2.DESCRIPTOR.services_by_name["Gpus"].full_name,
        identity_pb2.DESCRIPTOR.services_by_name["Identity"].full_name,
        audit_pb2.DESCRIPTOR.services_by_name["Audit"].full_name,
        operators_pb2.DESCRIPTOR.services_by_name["Fleet"].full_name,
        channels_pb2.DESCRIPTOR.services_by_name["Channels"].full_name,
        hosts_pb2.DESCRIPTOR.services_by_name["HostLink"].full_name,
        support_pb2.DESCRIPTOR.services_by_name["Support"].full_name,
        hostcare_pb2.DESCRIPTOR.services_by_name["HostCare"].full_name,
    ]
    if joining is not None:
        enrolment_pb2_grpc.add_EnrolmentServicer_to_server(EnrolmentService(joining), server)
        join_pb2_grpc.add_HostAccessServicer_to_server(HostAccess(joining), server)
        names.append(enrolment_pb2.DESCRIPTOR.services_by_name["Enrolment"].full_name)
        names.append(join_pb2.DESCRIPTOR.services_by_name["HostAccess"].full_name)
    checks = health.aio.HealthServicer()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    listening = address
    try:
        if joining is None:
            port = server.add_insecure_port(check_loopback(address))
        else:
            port = server.add_secure_port(check_address("listen", address), joining.tls.mutual())
            listening = check_address("listen_enrolment", enrolment_address)
            joining.enrolment_port = server.add_secure_port(listening, joining.tls.enrolment())
            joining.session_port = port
    except RuntimeError as error:
        raise Unavailable(f"cannot listen on {shown(listening)}: is the port taken? ({shown(str(error))})") from None
    await server.start()
    return server, port
