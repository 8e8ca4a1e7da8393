"""Metrics by HTTP, for Prometheus: loopback only.

What may live here: turning rows of :mod:`casemate_core.metrics` into the exposition format, and the small server that hands
them out; the same for managers and agents. aiohttp and prometheus-client are imported when something is served.

Theory of operation. A scrape asks ``rows`` afresh, one scrape at a time and under a deadline, so that a scraper that is
impatient or doubled costs no more than one. What answers is on the event loop of its process and may await. The formats
(text, OpenMetrics) and their negotiation are prometheus-client's.
"""

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from casemate_core.errors import InvalidSpec, Unavailable, Violation, shown
from casemate_core.metrics import Distribution, Kind, Rows, joined

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("casemate.metrics")

#: Prometheus gives up after 10 s unless told otherwise.
SCRAPE_DEADLINE_S: Final = 9.0
PATH: Final = "/metrics"
#: Of the text format that `rendered` writes.
TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"


def checked_loopback(address: str) -> tuple[str, int]:
    """Host and port of an address to serve metrics on. Raises InvalidSpec: metrics tell much and ask for no password."""
    host, _, port = address.rpartition(":")
    bare = host.strip("[]")
    try:
        good = (bare == "localhost" or ipaddress.ip_address(bare).is_loopback) and 0 <= int(port) <= 65535
    except ValueError:
        good = False
    if not good:
        remedy = "write 127.0.0.1:9470, or 127.0.0.1:0 for any free port"
        raise InvalidSpec((Violation("metrics_listen", shown(address), "is not a port of loopback", remedy),))
    return bare, int(port)


class _Present:
    """A collector of prometheus-client that holds what one scrape was told."""

    def __init__(self, rows: Iterable[Rows]) -> None:
        self._rows = joined(rows)

    def collect(self) -> Iterator[Any]:
        from prometheus_client import core

        for each in self._rows:
            family = each.family
            made: Any
            if family.kind is Kind.HISTOGRAM:
                made = core.HistogramMetricFamily(family.name, family.help, labels=family.labels)
                bounds = [*map(str, family.buckets), "+Inf"]
                for labels, value in sorted(each.values.items()):
                    assert isinstance(value, Distribution)
                    made.add_metric(labels, list(zip(bounds, value.cumulated, strict=True)), value.sum)
            else:
                kind = core.CounterMetricFamily if family.kind is Kind.COUNTER else core.GaugeMetricFamily
                made = kind(family.name, family.help, labels=family.labels)
                for labels, value in sorted(each.values.items()):
                    made.add_metric(labels, value)
            yield made


def rendered(rows: Iterable[Rows]) -> bytes:
    """The text format of Prometheus."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Present(rows))
    return generate_latest(registry)


@asynccontextmanager
async def served(address: str, rows: Callable[[], Awaitable[Iterable[Rows]]]) -> AsyncIterator[str]:
    """Serve ``rows`` while the context is open; gives the URL. Raises InvalidSpec, and Unavailable where the port is taken."""
    async with _served(address, _handler(rows)) as url:
        yield url


@asynccontextmanager
async def passed_on(address: str, ask: Callable[[], Awaitable[bytes]]) -> AsyncIterator[str]:
    """As ``served``, of text that somebody else has rendered. ``ask`` raises Unavailable where he does not answer."""
    from aiohttp import web

    one_at_a_time = asyncio.Lock()

    async def scrape(request: web.Request) -> web.StreamResponse:
        try:
            async with asyncio.timeout(SCRAPE_DEADLINE_S), one_at_a_time:
                body = await ask()
        except TimeoutError:
            return web.Response(status=503, text=f"no answer within {SCRAPE_DEADLINE_S:g} s\n")
        except Unavailable as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(body=body, headers={"Content-Type": TEXT})

    async with _served(address, scrape) as url:
        yield url


@asynccontextmanager
async def _served(
    address: str, handler: "Callable[[web.Request], Awaitable[web.StreamResponse]]"
) -> AsyncIterator[str]:
    from aiohttp import web

    host, port = checked_loopback(address)
    app = web.Application(client_max_size=0)
    app.router.add_get(PATH, handler)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise Unavailable(f"cannot serve metrics on {shown(address)}: {error.strerror or error}") from None
        bound = runner.addresses[0]
        url = f"http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}{PATH}"
        log.info("metrics on %s", url)
        yield url
    finally:
        await runner.cleanup()


@asynccontextmanager
async def noted(address: str, rows: Callable[[], Awaitable[Iterable[Rows]]], note: Path | None) -> AsyncIterator[str]:
    """As ``served``, where ``address`` is not empty; the URL is also written into the file ``note`` meanwhile."""
    if not address:
        yield ""
        return
    async with served(address, rows) as url:
        if note is not None:
            note.write_text(url + "\n")
        try:
            yield url
        finally:
            if note is not None:
                note.unlink(missing_ok=True)


def _handler(
    rows: Callable[[], Awaitable[Iterable[Rows]]],
) -> "Callable[[web.Request], Awaitable[web.StreamResponse]]":
    from aiohttp import web
    from prometheus_client import CollectorRegistry
    from prometheus_client.aiohttp import make_aiohttp_handler

    one_at_a_time = asyncio.Lock()

    async def scrape(request: web.Request) -> web.StreamResponse:
        try:
            async with asyncio.timeout(SCRAPE_DEADLINE_S), one_at_a_time:
                present = _Present(await rows())
        except TimeoutError:
            return web.Response(status=503, text=f"no answer within {SCRAPE_DEADLINE_S:g} s\n")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(present)
        return await make_aiohttp_handler(registry)(request)

    return scrape


def process_rows() -> list[Rows]:
    """CPU, memory and descriptors of this process, by the names that every Prometheus client uses."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.samples import Sample

    from casemate_core.metrics import Family

    found: list[Rows] = []
    for family in ProcessCollector(registry=CollectorRegistry()).collect():
        kind = Kind.COUNTER if family.type == "counter" else Kind.GAUGE
        sample: Sample
        for sample in family.samples:
            name = sample.name
            found.append(Rows(Family(name, kind, family.documentation), {(): sample.value}))
    return found
