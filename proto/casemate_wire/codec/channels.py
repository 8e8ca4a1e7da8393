"""Frames of a channel: values of `casemate_wire.channel` ⇄ messages of hosts.proto, total in both directions."""

from typing import assert_never

from casemate_wire.channel import (
    Eof,
    ExitCode,
    Failed,
    Frame,
    LogLine,
    Lost,
    Opened,
    Output,
    Resize,
    Signal,
    Stdin,
    Ticket,
)
from casemate_wire.codec.basics import BadMessage, seconds, timestamp
from casemate_wire.codec.signed import checked_nonce
from casemate_wire.v1 import hosts_pb2 as pb


def frame_to_wire(frame: Frame) -> pb.ChannelFrame:
    """A frame as its message."""
    match frame:
        case Ticket(ticket, nonce):
            return pb.ChannelFrame(ticket=ticket, nonce=nonce)
        case LogLine():
            return pb.ChannelFrame(
                log=pb.ChannelLog(
                    time=timestamp(frame.time_s),
                    pod=frame.pod,
                    container=frame.container,
                    sequence=frame.sequence,
                    text=frame.text,
                    stream=frame.stream,
                    lost=frame.lost,
                    log=frame.log,
                )
            )
        case Stdin(data):
            return pb.ChannelFrame(stdin=data)
        case Eof():
            return pb.ChannelFrame(eof=True)
        case Output("stdout", data):
            return pb.ChannelFrame(stdout=data)
        case Output(_, data):
            return pb.ChannelFrame(stderr=data)
        case Resize(rows, columns):
            return pb.ChannelFrame(resize=pb.ChannelResize(rows=rows, columns=columns))
        case Signal(number):
            return pb.ChannelFrame(signal=number)
        case ExitCode(code):
            return pb.ChannelFrame(exit_code=code)
        case Lost(size):
            return pb.ChannelFrame(lost=size)
        case Opened():
            return pb.ChannelFrame(opened=True)
        case Failed(message):
            return pb.ChannelFrame(error=message)
        case _:
            assert_never(frame)


def frame_from_wire(message: pb.ChannelFrame) -> Frame:
    """A message as its frame. Raises BadMessage."""
    match message.WhichOneof("frame"):
        case "ticket":
            return Ticket(message.ticket, checked_nonce(message.nonce))
        case "log":
            line = message.log
            return LogLine(
                seconds(line.time), line.pod, line.container, line.sequence, line.text, line.stream, line.lost, line.log
            )
        case "stdin":
            return Stdin(message.stdin)
        case "eof":
            return Eof()
        case "stdout":
            return Output("stdout", message.stdout)
        case "stderr":
            return Output("stderr", message.stderr)
        case "resize":
            return Resize(message.resize.rows, message.resize.columns)
        case "signal":
            return Signal(message.signal)
        case "exit_code":
            return ExitCode(message.exit_code)
        case "lost":
            return Lost(message.lost)
        case "opened":
            return Opened()
        case "error":
            return Failed(message.error)
        case other:
            raise BadMessage(f"unknown frame {other!r}")
