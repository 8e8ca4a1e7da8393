"""Errors of the wire become failures with the right exit code, field, value and remedy."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from casemate_cli.failure import Detail, Exit, Failure, from_rpc, lines
from casemate_wire.v1 import operators_pb2


class Refused(grpc.RpcError):
    """An error as a call raises it."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Any) -> None:
        super().__init__()
        self._code, self._message, self._details = code, message, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._message

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        if not self._details:
            return ()
        status = status_pb2.Status(code=self._code.value[0], message=self._message)
        for detail in self._details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Exit.ERROR),
        (grpc.StatusCode.NOT_FOUND, Exit.NOT_FOUND),
        (grpc.StatusCode.PERMISSION_DENIED, Exit.DENIED),
        (grpc.StatusCode.UNAUTHENTICATED, Exit.DENIED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Exit.TIMEOUT),
        (grpc.StatusCode.ABORTED, Exit.CONFLICT),
        (grpc.StatusCode.ALREADY_EXISTS, Exit.CONFLICT),
        (grpc.StatusCode.UNAVAILABLE, Exit.UNREACHABLE),
        (grpc.StatusCode.INTERNAL, Exit.ERROR),
    ],
)
def test_exit_codes(code: grpc.StatusCode, exit_code: Exit) -> None:
    assert from_rpc(Refused(code, "m"), "h:1").code is exit_code


def test_every_code_of_grpc_leads_to_a_failure() -> None:
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert from_rpc(Refused(code, ""), "h:1").what


def test_field_violations_are_told_one_by_one() -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="spec.cpu.count", description="is negative"),
            error_details_pb2.BadRequest.FieldViolation(field="spec.image", description="is missing"),
        ]
    )
    failure = from_rpc(Refused(grpc.StatusCode.INVALID_ARGUMENT, "environment/a is refused", bad), "h:1")
    assert failure.what == "environment/a is refused"
    assert [d.field for d in failure.details] == ["spec.cpu.count", "spec.image"]


def test_the_parts_of_a_refusal_win_over_its_sentences() -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="spec.a", description="spec.a: is odd")]
    )
    parts = operators_pb2.Refusal(
        problems=[operators_pb2.FieldProblem(path="spec.a", value="1", problem="is odd", remedy="write 2")]
    )
    failure = from_rpc(Refused(grpc.StatusCode.INVALID_ARGUMENT, "environment/a is refused", bad, parts), "h:1")
    assert failure.details == (Detail("spec.a", "1", "is odd", "write 2"),)


def test_a_part_that_a_manager_misses_is_not_a_missing_manager() -> None:
    info = error_details_pb2.ErrorInfo(reason="Unavailable", domain="casemate")
    failure = from_rpc(Refused(grpc.StatusCode.UNAVAILABLE, "host h1 does not answer", info), "h:1")
    assert failure.what == "host h1 does not answer"


def test_a_broken_detail_does_not_hide_the_error() -> None:
    class Broken(Refused):
        def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
            return (("grpc-status-details-bin", b"\xff\xff"),)

    assert from_rpc(Broken(grpc.StatusCode.NOT_FOUND, "gone"), "h:1").what == "gone"


def test_the_shape() -> None:
    failure = Failure(
        "no", details=[Detail("spec.a", "1", "is odd", "write 2"), Detail("b")], remedy="again", log=["x"]
    )
    assert lines(failure) == [
        "error: no",
        "  field:   spec.a",
        "  value:   1",
        "  problem: is odd",
        "  remedy:  write 2",
        "",
        "  field:   b",
        "  | x",
        "",
        "  remedy:  again",
    ]
