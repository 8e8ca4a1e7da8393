"""`casemate gpu release`, `quarantine` and `sanitise`: what operators ask of GPUs. Their hosts do it when they hear of it."""

from typing import TYPE_CHECKING, Any

import click

from casemate_cli import completing, options, term

if TYPE_CHECKING:
    from casemate_cli.client import Client

_GPUS = click.argument("gpus", nargs=-1, required=True, metavar="GPU...", shell_complete=completing.names_of("GPU"))


@click.group()
def gpu() -> None:
    """Hold GPUs back, let them out, have them sanitised. `casemate describe gpu` shows what was done to one."""


def _order(ctx: click.Context, gpus: tuple[str, ...], verb: str, done: str, idle: str, reason: str = "") -> None:
    from casemate_cli.client import Client

    with Client(options.settings(ctx)) as client:
        for name in gpus:
            name = name.removeprefix("gpu/")
            answer = _ask(client, name, verb, reason)
            words = f"{done}, as soon as host {term.clean(answer.host)} hears of it" if answer.order else idle
            term.out(f"gpu/{name}: {words}")


def _ask(client: "Client", name: str, verb: str, reason: str) -> Any:
    from casemate_cli.client import request_key
    from casemate_wire.v1 import gpus_pb2 as pb
    from casemate_wire.v1.gpus_pb2_grpc import GpusStub

    request = pb.OrderGpuRequest(request_key=request_key(), gpu=name, verb=verb, reason=reason)
    return client.call(GpusStub(client.channel).Order, request, f"{verb} of gpu/{name}")


@gpu.command()
@_GPUS
@options.connection
@click.pass_context
def release(ctx: click.Context, gpus: tuple[str, ...]) -> None:
    """Let GPUs out of quarantine. Each is reset, scrubbed and checked first, and held back again where that fails."""
    _order(ctx, gpus, "release", "is let out and sanitised", "is not in quarantine")


@gpu.command()
@_GPUS
@click.option("--reason", default="", help="Why, for whoever comes after.")
@options.connection
@click.pass_context
def quarantine(ctx: click.Context, gpus: tuple[str, ...], reason: str) -> None:
    """Give GPUs to nobody: at once, or where an instance has one, from when it lets go of it."""
    _order(ctx, gpus, "quarantine", "is held back", "is in quarantine already", reason)


@gpu.command()
@_GPUS
@options.connection
@click.pass_context
def sanitise(ctx: click.Context, gpus: tuple[str, ...]) -> None:
    """Reset, scrub and check GPUs that nobody has, now."""
    _order(ctx, gpus, "sanitise", "is sanitised", "is being sanitised already")
