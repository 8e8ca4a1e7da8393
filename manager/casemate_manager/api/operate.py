"""Operations: what is asked, as a command for the fleet, and its answer."""

from casemate_core.errors import InternalError
from casemate_manager.fleet.commands import Answer, OperateAnswer, OperateInstances
from casemate_manager.fleet.operations import DEFAULT_TIMEOUT_S
from casemate_wire.codec.basics import ref_to_message
from casemate_wire.v1 import operations_pb2 as pb


def to_command(request: pb.OperateRequest, seed: str) -> OperateInstances:
    """The command that a request asks for."""
    return OperateInstances(
        request.request_key,
        request.tenant,
        request.name,
        request.verb,
        seed,
        request.grace_s if request.HasField("grace_s") else None,
        request.timeout_s or DEFAULT_TIMEOUT_S,
        request.uid,
        duration_s=request.duration_s,
        to_host=request.to_host,
    )


def to_response(answer: Answer) -> pb.OperateResponse:
    """The answer as a message."""
    if not isinstance(answer, OperateAnswer):
        raise InternalError(f"operate was answered with {type(answer).__name__}")
    return pb.OperateResponse(operations=[ref_to_message(ref) for ref in answer.operations], revision=answer.revision)
