"""Sends an access key or token with every call. Imported only where there is one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc


class _Details(NamedTuple):
    """A call as gRPC describes it to interceptors, with our metadata."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _AsDetails(_Details, grpc.ClientCallDetails):
    """The same, by the name that gRPC asks for."""


class Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """See the module."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    def _with(self, details: Any) -> _AsDetails:
        metadata = [*(details.metadata or ()), ("authorization", self._value)]
        return _AsDetails(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """See gRPC."""
        return continuation(self._with(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """See gRPC."""
        return continuation(self._with(details), request)

    def intercept_stream_unary(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        """See gRPC."""
        return continuation(self._with(details), requests)

    def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        """See gRPC."""
        return continuation(self._with(details), requests)
