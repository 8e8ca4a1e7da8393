"""The host stream: values of `casemate_wire.stream` ⇄ messages of hosts.proto, total in both directions.

What arrives from the other end is checked here: words, digests and addresses have their shape afterwards or the message is
refused (`BadMessage`), which ends the session.
"""

from collections.abc import Callable
from typing import TypeVar, assert_never

from casemate_core.checkpoint import Checkpoint, is_formed
from casemate_core.errors import CasemateError, shown
from casemate_core.topology import Topology
from casemate_wire import stream
from casemate_wire.codec.basics import BadMessage, checked_text, checked_uid, plain, seconds, struct, timestamp
from casemate_wire.codec.checkpoints import checkpoint_from_message, checkpoint_to_message
from casemate_wire.codec.desired import desired_from_message, desired_to_message
from casemate_wire.codec.facts import facts_from_message, facts_to_message
from casemate_wire.codec.signed import checked_nonce, checked_pins
from casemate_wire.v1 import hosts_pb2 as pb

M = TypeVar("M")
V = TypeVar("V")


def to_host_to_wire(value: stream.ToHost) -> pb.ToHost:
    """A message of the manager."""
    match value:
        case stream.Welcome():
            return pb.ToHost(
                welcome=pb.Welcome(
                    epoch=value.epoch,
                    since=value.since,
                    send_inventory=value.send_inventory,
                    reconnect_window_s=value.reconnect_window_s,
                    credit=value.credit,
                    authorities=value.authorities,
                )
            )
        case stream.Desired():
            return pb.ToHost(desired=desired_to_message(value))
        case stream.Operate():
            return pb.ToHost(
                operate=pb.Operate(
                    operation=value.operation,
                    verb=value.verb,
                    instance=value.instance,
                    parameters=struct(value.parameters),
                    deadline=timestamp(value.deadline_s),
                )
            )
        case stream.OpenChannel():
            return pb.ToHost(
                open_channel=pb.OpenChannel(
                    ticket=value.ticket, kind=value.kind, instance=value.instance, parameters=struct(value.parameters)
                )
            )
        case stream.Credit():
            return pb.ToHost(credit=pb.Credit(messages=value.messages))
        case stream.Rejected():
            return pb.ToHost(
                rejected=pb.Rejected(reason=value.reason, message=value.message, retry_after_s=value.retry_after_s)
            )
        case stream.FactsAck():
            return pb.ToHost(facts_ack=pb.FactsAck(sequence=value.sequence))
        case Checkpoint():
            return pb.ToHost(checkpoint=checkpoint_to_message(value))
        case _:
            assert_never(value)


def to_host_from_wire(message: pb.ToHost) -> stream.ToHost:
    """A message of the manager, as the agent takes it. Raises BadMessage."""
    return _checked(_from_manager, message)


def _from_manager(message: pb.ToHost) -> stream.ToHost:
    match message.WhichOneof("message"):
        case "welcome":
            w = message.welcome
            return stream.Welcome(
                w.epoch, w.since, w.send_inventory, w.reconnect_window_s, w.credit, checked_pins(w.authorities)
            )
        case "desired":
            return desired_from_message(message.desired)
        case "operate":
            o = message.operate
            return stream.Operate(
                o.operation, o.verb, checked_uid(o.instance), plain(o.parameters), seconds(o.deadline)
            )
        case "open_channel":
            c = message.open_channel
            return stream.OpenChannel(
                ticket=checked_text(c.ticket),
                kind=c.kind,
                instance=checked_uid(c.instance),
                parameters=plain(c.parameters),
            )
        case "credit":
            return stream.Credit(message.credit.messages)
        case "rejected":
            r = message.rejected
            return stream.Rejected(r.reason, r.message, r.retry_after_s)
        case "facts_ack":
            return stream.FactsAck(message.facts_ack.sequence)
        case "checkpoint":
            checkpoint = checkpoint_from_message(message.checkpoint)
            if not is_formed(checkpoint):  # it is kept on disk, so what it can be is bounded
                raise BadMessage("what is sent to be witnessed is no checkpoint")
            return checkpoint
        case other:
            raise BadMessage(f"unknown message {other!r}")


def from_host_to_wire(value: stream.FromHost) -> pb.FromHost:
    """A message of an agent."""
    match value:
        case stream.Hello():
            return pb.FromHost(
                hello=pb.Hello(
                    host=value.host,
                    boot_id=value.boot_id,
                    epoch=value.epoch,
                    revision=value.revision,
                    inventory_digest=value.inventory_digest,
                    session=value.session,
                    agent_version=value.agent_version,
                    kernel=value.kernel,
                    virtualisation=value.virtualisation,
                    nonce=value.nonce,
                )
            )
        case stream.Inventory():
            return pb.FromHost(inventory=pb.Inventory(digest=value.digest, topology=struct(value.topology.to_dict())))
        case stream.Facts():
            return pb.FromHost(facts=facts_to_message(value))
        case stream.Outcome():
            return pb.FromHost(
                outcome=pb.Outcome(
                    operation=value.operation,
                    instance=value.instance,
                    phase=value.phase,
                    reason=value.reason,
                    message=value.message,
                    placement_refused=value.placement_refused,
                )
            )
        case stream.HostEvent():
            return pb.FromHost(
                event=pb.HostEvent(
                    id=value.id,
                    instance=value.instance,
                    pod=value.pod,
                    reason=value.reason,
                    message=value.message,
                    severity=value.severity,
                    time=timestamp(value.time_s),
                    cause=value.cause,
                )
            )
        case stream.Measurement():
            return pb.FromHost(
                measurement=pb.Measurement(
                    time=timestamp(value.time_s),
                    cpu_used=value.cpu_used,
                    memory_used_mib=value.memory_used_mib,
                    instances=[
                        pb.InstanceMeasurement(uid=i.uid, cpu_time_ns=i.cpu_time_ns, memory_rss_mib=i.memory_rss_mib)
                        for i in value.instances
                    ],
                )
            )
        case stream.Ack():
            return pb.FromHost(ack=pb.Ack(epoch=value.epoch, revision=value.revision))
        case stream.Credit():
            return pb.FromHost(credit=pb.Credit(messages=value.messages))
        case stream.Bye():
            return pb.FromHost(bye=pb.Bye(reason=value.reason))
        case _:
            assert_never(value)


def from_host_from_wire(message: pb.FromHost) -> stream.FromHost:
    """A message of an agent, as the manager takes it. Raises BadMessage."""
    return _checked(_from_host, message)


def _from_host(message: pb.FromHost) -> stream.FromHost:
    match message.WhichOneof("message"):
        case "hello":
            h = message.hello
            return stream.Hello(
                host=checked_text(h.host, 63),
                boot_id=checked_text(h.boot_id, 64),
                epoch=h.epoch,
                revision=h.revision,
                inventory_digest=checked_text(h.inventory_digest, 128),
                session=h.session,
                agent_version=checked_text(h.agent_version, 64),
                kernel=checked_text(h.kernel, 256),
                virtualisation=checked_text(h.virtualisation, 16),
                nonce=checked_nonce(h.nonce),
            )
        case "inventory":
            i = message.inventory
            return stream.Inventory(checked_text(i.digest, 128), Topology.from_dict(plain(i.topology)))
        case "facts":
            return facts_from_message(message.facts)
        case "outcome":
            o = message.outcome
            return stream.Outcome(
                operation=checked_text(o.operation, 64),
                instance=checked_text(o.instance, 64),
                phase=checked_text(o.phase, 32),
                reason=checked_text(o.reason, 64),
                message=checked_text(o.message),
                placement_refused=o.placement_refused,
            )
        case "event":
            e = message.event
            if e.severity not in ("Normal", "Warning"):
                raise BadMessage(f"severity {shown(e.severity)!r}")
            return stream.HostEvent(
                id=checked_text(e.id, 128),
                instance=checked_text(e.instance, 64),
                pod=checked_text(e.pod, 63),
                reason=checked_text(e.reason, 64),
                message=checked_text(e.message),
                severity=e.severity,
                time_s=seconds(e.time),
                cause=checked_text(e.cause, 128),
            )
        case "measurement":
            m = message.measurement
            return stream.Measurement(
                time_s=seconds(m.time),
                cpu_used=m.cpu_used,
                memory_used_mib=m.memory_used_mib,
                instances=tuple(
                    stream.InstanceMeasurement(checked_uid(i.uid), i.cpu_time_ns, i.memory_rss_mib) for i in m.instances
                ),
            )
        case "ack":
            return stream.Ack(message.ack.epoch, message.ack.revision)
        case "credit":
            return stream.Credit(message.credit.messages)
        case "bye":
            return stream.Bye(checked_text(message.bye.reason))
        case other:
            raise BadMessage(f"unknown message {other!r}")


def _checked(decode: Callable[[M], V], message: M) -> V:
    """Whatever has no shape becomes BadMessage: the other end is at fault, and the session ends."""
    try:
        return decode(message)
    except BadMessage:
        raise
    except (CasemateError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadMessage(shown(f"{type(error).__name__}: {error}")) from error
