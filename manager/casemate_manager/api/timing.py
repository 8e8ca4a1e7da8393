"""Counts every call of every service, and how long it took: outermost, so that what the gate turned away is counted too.

Labels are bounded: methods are those of the table of access and of gRPC's own services, anything else is ``other``; codes
are gRPC's. A call that streams lasts as long as somebody listens, so that only calls with one answer have a duration.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc

from casemate_core.metrics import Meter
from casemate_manager import metrics
from casemate_manager.access import RPCS

_CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
_OTHERS: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
Context = grpc.aio.ServicerContext[Any, Any]


class Timing(grpc.aio.ServerInterceptor):
    """See the module. ``clock`` gives seconds."""

    def __init__(self, meter: Callable[[], Meter], clock: Callable[[], float]) -> None:
        self._meter = meter
        self._clock = clock

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        method = method_label(details.method)
        if handler is None:
            self._meter().add(metrics.RPCS, method, "UNIMPLEMENTED")
            return None
        if handler.response_streaming:
            return self._stream(handler, method)
        return self._unary(handler, method)

    def _unary(self, handler: Any, method: str) -> Any:
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def call(request: Any, context: Context) -> Any:
            began_s, code = self._clock(), "UNKNOWN"
            try:
                answer = await inner(request, context)
                code = _code(context)
                return answer
            except BaseException as error:
                code = _failed(context, error)
                raise
            finally:
                self._meter().add(metrics.RPCS, method, code)
                self._meter().observe(metrics.RPC_S, self._clock() - began_s, method, code)

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(call, handler.request_deserializer, handler.response_serializer)

    def _stream(self, handler: Any, method: str) -> Any:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream

        if not inspect.isasyncgenfunction(inner):
            return self._written(handler, inner, method)

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            code = "CANCELLED"  # a client that went away closes the iteration
            answers = inner(request, context)
            try:
                async for answer in answers:
                    yield answer
                code = _code(context)
            except GeneratorExit:
                raise
            except BaseException as error:
                code = _failed(context, error)
                raise
            finally:
                self._meter().add(metrics.RPCS, method, code)
                await answers.aclose()

        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(call, handler.request_deserializer, handler.response_serializer)

    def _written(self, handler: Any, inner: Any, method: str) -> Any:
        """A stream whose handler writes its answers by itself."""

        async def call(request: Any, context: Context) -> None:
            code = "UNKNOWN"
            try:
                await inner(request, context)
                code = _code(context)
            except BaseException as error:
                code = _failed(context, error)
                raise
            finally:
                self._meter().add(metrics.RPCS, method, code)

        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(call, handler.request_deserializer, handler.response_serializer)


def method_label(method: str) -> str:
    """`Fleet/Apply` of `/casemate.v1.Fleet/Apply`."""
    if method not in RPCS and not method.startswith(_OTHERS):
        return "other"
    service, _, name = method.rpartition("/")
    return f"{service.rpartition('.')[2]}/{name}"


def _code(context: Context) -> str:
    """The code that a call ended with, which answered: OK, unless its handler set another."""
    return _CODES.get(_number(context.code()), "OK")


def _failed(context: Context, error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "CANCELLED"
    found = _CODES.get(_number(context.code()), "UNKNOWN")
    return "UNKNOWN" if found == "OK" else found


def _number(code: Any) -> int:
    """gRPC tells it as a number or as a word, by where it was set."""
    return int(code.value[0]) if isinstance(code, grpc.StatusCode) else int(code or 0)
