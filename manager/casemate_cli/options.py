"""Options that several verbs share, and the settings they lead to."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from casemate_cli.settings import Settings, resolve

F = TypeVar("F", bound=Callable[..., Any])

_CONNECTION = ("manager", "context", "tenant", "request_timeout")


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Record an option given after the verb over the one given before it."""
    if value is not None and param.name is not None:
        ctx.ensure_object(dict)
        ctx.obj = {**ctx.obj, param.name: value}
    return value


def connection(function: F) -> F:
    """`--manager`, `--context`, `--tenant` and `--request-timeout` after the verb, as they can stand before it."""
    for option in (
        click.option(
            "--request-timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            expose_value=False,
            callback=_keep,
            help="Longest time for one call. [default: 30]",
        ),
        click.option("--tenant", metavar="NAME", expose_value=False, callback=_keep, help="Tenant to speak for."),
        click.option("--context", metavar="NAME", expose_value=False, callback=_keep, help="Context to use."),
        click.option("--manager", metavar="HOST:PORT", expose_value=False, callback=_keep, help="Manager to talk to."),
    ):
        function = option(function)
    return function


def settings(ctx: click.Context) -> Settings:
    """The settings that the options before and after the verb lead to. Raises Failure."""
    from casemate_wire.tls import only_tls13

    only_tls13()  # before a verb loads gRPC
    given = {name: (ctx.obj or {}).get(name) for name in _CONNECTION}
    return resolve(
        manager=given["manager"],
        context=given["context"],
        tenant=given["tenant"],
        request_timeout_s=given["request_timeout"],
    )


class Span(click.ParamType[float]):
    """A time span: `90s`, `15m`, `2h`, or plain seconds; gives seconds."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from casemate_core.quantity import BadQuantity, parse_seconds

        if isinstance(value, int | float):
            return float(value)
        try:
            return float(parse_seconds(str(value)))
        except BadQuantity as bad:
            self.fail(f"{value!r} {bad.problem}; {bad.remedy}", param, ctx)


SPAN = Span()
