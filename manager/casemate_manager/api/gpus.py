"""GPUs: what an operator asks, as a command for the fleet, and its answer."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from casemate_core.errors import InternalError
from casemate_manager.api.errors import unary
from casemate_manager.fleet.commands import Answer, Command, GpuAnswer, OrderGpu
from casemate_wire.v1 import gpus_pb2 as pb
from casemate_wire.v1 import gpus_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class GpusService(gpus_pb2_grpc.GpusServicer):
    """casemate.v1.Gpus."""

    def __init__(self, submit: Callable[[Command], Awaitable[Answer]], seed: Callable[[], str]) -> None:
        self._submit = submit
        self._seed = seed

    @unary
    async def Order(self, request: pb.OrderGpuRequest, context: Context) -> pb.OrderGpuResponse:
        """Asks something of a GPU."""
        answer = await self._submit(
            OrderGpu(request.request_key, request.gpu, request.verb, self._seed(), request.reason)
        )
        if not isinstance(answer, GpuAnswer):
            raise InternalError(f"an order to a GPU was answered with {type(answer).__name__}")
        return pb.OrderGpuResponse(order=answer.order, host=answer.host)
