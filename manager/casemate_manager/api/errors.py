"""Errors at the border: the three roots of `casemate_core.errors` become gRPC statuses with google.rpc details.

The table is by root and reason, so that a new error class needs no entry here. What only we can be blamed for is logged
with its story and told to the caller as an internal error with nothing of it: a stack is no answer.
"""

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from casemate_core.errors import CallerError, CasemateError, InvalidSpec, MachineError, NotFound
from casemate_wire.v1 import operators_pb2

log = logging.getLogger(__name__)

DOMAIN = "casemate"
#: Reason word of an error → status code, where the root alone does not say it.
_CODES: dict[str, int] = {
    "NotFound": code_pb2.NOT_FOUND,
    "Conflict": code_pb2.ABORTED,
    "HostRefused": code_pb2.FAILED_PRECONDITION,
    "InUse": code_pb2.FAILED_PRECONDITION,
    "Unavailable": code_pb2.UNAVAILABLE,
    "DeadlineExceeded": code_pb2.DEADLINE_EXCEEDED,
    "AddressesExhausted": code_pb2.RESOURCE_EXHAUSTED,
    "QuotaExceeded": code_pb2.RESOURCE_EXHAUSTED,
    "RateLimited": code_pb2.RESOURCE_EXHAUSTED,
    "PermissionDenied": code_pb2.PERMISSION_DENIED,
    "Unauthenticated": code_pb2.UNAUTHENTICATED,
    "TokenRefused": code_pb2.PERMISSION_DENIED,
    "TicketRefused": code_pb2.PERMISSION_DENIED,
    "NotEnrolled": code_pb2.PERMISSION_DENIED,
}


def status_of(error: CasemateError) -> status_pb2.Status:
    """The status that a caller gets for ``error``."""
    if isinstance(error, CallerError):
        code = _CODES.get(error.reason, code_pb2.INVALID_ARGUMENT)
    elif isinstance(error, MachineError):
        code = _CODES.get(error.reason, code_pb2.UNAVAILABLE)
    else:
        code = _CODES.get(error.reason, code_pb2.INTERNAL)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    message = str(error)
    if isinstance(error, InvalidSpec):
        message = f"{error.subject or 'request'} is refused"
        details += [_bad_request(error), _refusal(error)]
    elif isinstance(error, NotFound):
        details.append(error_details_pb2.ResourceInfo(resource_type=error.kind, resource_name=error.name))
    elif retry_after_s := getattr(error, "retry_after_s", 0.0):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(retry)
    elif code == code_pb2.INTERNAL:
        log.error("internal error", exc_info=error)
        message = "the manager contradicts itself; its log has the story"
    return status_pb2.Status(code=code, message=message, details=[_pack(d) for d in details])


def _bad_request(error: InvalidSpec) -> Message:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field=v.path, description=str(v)) for v in error.violations
    ]
    message: Message = error_details_pb2.BadRequest(field_violations=violations)
    return message


def _refusal(error: InvalidSpec) -> Message:
    return operators_pb2.Refusal(
        problems=[
            operators_pb2.FieldProblem(path=v.path, value=v.value, problem=v.problem, remedy=v.remedy)
            for v in error.violations
        ]
    )


def _pack(message: Message) -> Packed:
    packed = Packed()
    packed.Pack(message)
    return packed


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """End the call with the status of an error."""
    if not isinstance(error, CasemateError):
        log.error("unexpected error in a call", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "the manager failed; its log has the story")
    await context.abort_with_status(rpc_status.to_status(status_of(error)))
    raise AssertionError("abort returned")


S = TypeVar("S")
Q = TypeVar("Q")
R = TypeVar("R")


def unary(
    call: Callable[[S, Q, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[R]],
) -> Callable[[S, Q, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[R]]:
    """A handler whose errors become statuses."""

    @functools.wraps(call)
    async def handler(self: S, request: Q, context: "grpc.aio.ServicerContext[Any, Any]") -> R:
        try:
            return await call(self, request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    return handler


def streaming(
    call: Callable[[S, Q, "grpc.aio.ServicerContext[Any, Any]"], AsyncIterator[R]],
) -> Callable[[S, Q, "grpc.aio.ServicerContext[Any, Any]"], AsyncIterator[R]]:
    """A streaming handler whose errors become statuses."""

    @functools.wraps(call)
    async def handler(self: S, request: Q, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[R]:
        try:
            async for item in call(self, request, context):
                yield item
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    return handler
