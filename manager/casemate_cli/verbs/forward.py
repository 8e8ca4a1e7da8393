"""`casemate port-forward`: local TCP ports that lead to ports of an instance or a pod, through manager and agent."""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, failure, options, term
from casemate_cli.failure import Exit, Failure
from casemate_cli.pipes import CHUNK, Outbox, read_stdin
from casemate_cli.settings import Settings
from casemate_cli.verbs.logs import parse_name

if TYPE_CHECKING:
    from casemate_wire.v1 import channels_pb2 as pb

LOOPBACK = "127.0.0.1"
#: Connections at the same time; a host opens no more channels than this for everybody together.
MOST = 48


@click.command("port-forward")
@click.argument(
    "name", metavar="ENVIRONMENT|INSTANCE[.POD]", shell_complete=completing.names_of("Environment", "Instance", "Pod")
)
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT...")
@click.option("--stdio", is_flag=True, help="Carry one connection on standard input and output, for ProxyCommand.")
@options.connection
@click.pass_context
def port_forward(ctx: click.Context, name: str, ports: tuple[str, ...], stdio: bool) -> int:
    """Lead local ports to ports of an instance or a pod, until interrupted.

    Only this machine's loopback (127.0.0.1) is listened on. A name without a pod means the instance itself; with one, the
    pod's own network. LOCAL is the same port where it is left out, and any free one where it is 0: the line on standard
    output says which. The instance needs no network for this.

    \b
    Examples:
      casemate port-forward hello 8080
      casemate port-forward hello-0.web 0:8080 9000:9001
    """
    instance, pod = parse_name(name)
    pairs = [_pair(text) for text in ports]
    settings = options.settings(ctx)
    if stdio and len(pairs) != 1:
        raise Failure("--stdio carries one connection", remedy="name one port")
    _must_exist(settings, instance)
    forwarder = Forwarder(settings, instance, pod)
    if stdio:
        return _carry_stdio(settings, forwarder.start(pairs[0][1]))
    return asyncio.run(forwarder.listen(pairs))


def _pair(text: str) -> tuple[int, int]:
    """Local and remote port of `8080`, `8080:80`, `0:80`."""
    local, colon, remote = text.partition(":")
    remote = remote if colon else local
    with suppress(ValueError):
        if (local + remote).isascii() and 0 <= int(local) < 65536 and 0 < int(remote) < 65536:
            return int(local), int(remote)
    raise failure.Failure(
        "a port is wrong",
        details=[failure.Detail("port", text, "is no port", "write PORT, LOCAL:PORT or 0:PORT, each at most 65535")],
    )


def _must_exist(settings: Settings, instance: str) -> None:
    """A name that leads nowhere is told now, not at the first connection."""
    from casemate_cli.client import Client

    with Client(settings) as client:
        try:
            client.get("Instance", instance, settings.tenant)
        except Failure as missing:
            if missing.code is not Exit.NOT_FOUND:
                raise
            client.get("Environment", instance, settings.tenant)


class Forwarder:
    """Connections to one instance or pod."""

    def __init__(self, settings: Settings, instance: str, pod: str) -> None:
        import grpc.aio

        self._settings, self._instance, self._pod = settings, instance, pod
        self._grpc: Any = grpc
        self._room = asyncio.Semaphore(MOST)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stub: Any = None

    def start(self, port: int) -> "pb.ForwardInput":
        """The first word of a connection."""
        from casemate_wire.v1 import channels_pb2 as pb

        target = pb.ChannelTarget(tenant=self._settings.tenant, instance=self._instance, pod=self._pod)
        return pb.ForwardInput(start=pb.ForwardStart(target=target, port=port))

    def _bearer(self) -> tuple[tuple[str, str], ...]:
        """Who calls, where a token says it."""
        token = self._settings.token
        return (("authorization", f"Bearer {token}"),) if token else ()

    async def _ticket(self) -> str:
        """A ticket for one connection."""
        from casemate_wire.v1 import tickets_pb2

        request = tickets_pb2.TicketRequest(tenant=self._settings.tenant, instance=self._instance, action="forward")
        timeout_s = self._settings.request_timeout_s
        return str((await self._stub.Admit(request, timeout=timeout_s, metadata=self._bearer())).ticket)

    def _channel(self) -> Any:
        from casemate_cli.client import dial

        return dial(self._settings, aio=True)

    async def listen(self, pairs: list[tuple[int, int]]) -> int:
        """All local ports or none; until a signal."""
        from casemate_wire.v1.channels_pb2_grpc import ChannelsStub

        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        servers: list[asyncio.Server] = []
        async with self._channel() as channel:
            self._stub = ChannelsStub(channel)
            try:
                for local, remote in pairs:
                    servers.append(await self._listen(local, remote))
                for server, (_, remote) in zip(servers, pairs, strict=True):
                    where = f"{self._instance}.{self._pod}" if self._pod else self._instance
                    term.out(f"{LOOPBACK}:{server.sockets[0].getsockname()[1]} -> {where} {remote}")
                term.flush()
                await stop.wait()
            finally:
                for server in servers:
                    server.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        return Exit.OK

    async def _listen(self, local: int, remote: int) -> asyncio.Server:
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer, remote), name=f"forward-{remote}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        try:
            return await asyncio.start_server(accepted, LOOPBACK, local)
        except OSError as error:
            why = error.strerror or str(error)
            raise Failure(
                f"cannot listen on {LOOPBACK}:{local}: {why}",
                remedy=f"choose another: 0:{remote} takes any that is free",
            ) from None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        """One connection; what went wrong is told, and the next one is waited for."""
        try:
            async with self._room:
                await self._carry(reader, writer, port)
        except Failure as failed:
            for line in failure.lines(failed):
                term.say(line)
        except OSError:
            return  # the local end is gone
        finally:
            if not writer.is_closing():
                writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        """Both directions to their ends. Raises Failure where it was cut, OSError where the local end is gone."""
        first = self.start(port)
        try:
            first.start.target.ticket = await self._ticket()
        except self._grpc.RpcError as error:
            raise failure.from_rpc(error, self._settings.manager) from None
        call = self._stub.Forward(metadata=self._bearer())
        try:
            await call.write(first)
            up = asyncio.create_task(self._up(call, reader), name="forward-up")
            down = asyncio.create_task(self._down(call, writer), name="forward-down")
            try:
                await asyncio.wait({up, down}, return_when=asyncio.FIRST_EXCEPTION)
                # Ours may have failed because theirs did: that one knows why.
                if down.done() or up.exception() is None:
                    await down
                up.result()
            finally:
                for task in (up, down):
                    task.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except self._grpc.RpcError as error:
            raise failure.from_rpc(error, self._settings.manager) from None
        finally:
            call.cancel()

    async def _up(self, call: Any, reader: asyncio.StreamReader) -> None:
        from casemate_wire.v1 import channels_pb2 as pb

        while data := await reader.read(CHUNK):
            await call.write(pb.ForwardInput(data=data))
        await call.write(pb.ForwardInput(eof=True))

    async def _down(self, call: Any, writer: asyncio.StreamWriter) -> None:
        while (output := await call.read()) is not self._grpc.aio.EOF:
            match output.WhichOneof("output"):
                case "data":
                    writer.write(output.data)
                    await writer.drain()
                case "eof":
                    if writer.can_write_eof():
                        writer.write_eof()
                case "closed":
                    return
        raise Failure("the manager ended the connection without a word", code=Exit.UNREACHABLE)


def _carry_stdio(settings: Settings, first: "pb.ForwardInput") -> int:
    """One connection on standard input and output, whatever these are. Raises Failure."""
    import grpc

    from casemate_cli.client import Client
    from casemate_wire.v1 import channels_pb2 as pb

    target = first.start.target

    def given(data: bytes) -> bool:
        outbox.put(pb.ForwardInput(data=data))
        return True

    with Client(settings) as client:
        target.ticket = client.ticket("forward", target.tenant, target.instance)
        outbox = Outbox(first)
        call = client.channels.Forward(iter(outbox))
        try:
            for output in call:
                match output.WhichOneof("output"):
                    case "opened":
                        read_stdin(given, lambda: outbox.put(pb.ForwardInput(eof=True)))
                    case "data":
                        sys.stdout.buffer.write(output.data)
                        sys.stdout.buffer.flush()
                    case "eof":  # whoever reads us learns of it by the pipe's end
                        with open(os.devnull, "wb") as null:
                            os.dup2(null.fileno(), 1)
                    case "closed":
                        return Exit.OK
        except grpc.RpcError as error:
            raise failure.from_rpc(error, settings.manager) from None
        except BrokenPipeError:
            return Exit.OK
        finally:
            outbox.end()
            call.cancel()
    raise Failure("the manager ended the connection without a word", code=Exit.UNREACHABLE)
