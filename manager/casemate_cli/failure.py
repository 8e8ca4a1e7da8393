"""Errors of the command line: one shape, one table of exit codes, one conversion from gRPC.

The shape has four parts, each of which may be missing but the first: what happened, the field, the value, the remedy.
Nothing here imports gRPC: the conversion works on the call's code and on the `google.rpc` details that came with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from casemate_core.errors import Violation

if TYPE_CHECKING:
    import grpc


class Exit(IntEnum):
    """Exit codes that scripts can rely on (docs/cli.md)."""

    OK = 0
    ERROR = 1
    UNSCHEDULABLE = 2
    DIFFERENT = 3
    NOT_FOUND = 4
    DENIED = 5
    TIMEOUT = 6
    CONFLICT = 7
    UNREACHABLE = 8
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Detail:
    """One thing wrong, as it is shown under the first line."""

    field: str = ""
    value: str = ""
    problem: str = ""
    remedy: str = ""


class Failure(Exception):
    """A verb failed. `what` is one line, `details` the fields that are wrong, `remedy` what to do about the whole."""

    def __init__(
        self,
        what: str,
        *,
        code: Exit = Exit.ERROR,
        details: Iterable[Detail] = (),
        remedy: str = "",
        reason: str = "",
        log: Iterable[str] = (),
    ) -> None:
        self.what = what
        self.code = code
        self.details = tuple(details)
        self.remedy = remedy
        #: One word for programs, where the manager sent one.
        self.reason = reason
        #: Last lines of what a program said that failed.
        self.log = tuple(log)
        super().__init__(what)


def from_violations(what: str, violations: Iterable[Violation]) -> Failure:
    """A refusal by fields."""
    return Failure(what, details=[Detail(v.path, v.value, v.problem, v.remedy) for v in violations], reason="Invalid")


#: gRPC status code name → exit code and what it means to a person.
_CODES: dict[str, tuple[Exit, str]] = {
    "INVALID_ARGUMENT": (Exit.ERROR, "the manager refused the request"),
    "OUT_OF_RANGE": (Exit.ERROR, "the manager refused the request"),
    "UNIMPLEMENTED": (Exit.ERROR, "this manager does not serve that"),
    "NOT_FOUND": (Exit.NOT_FOUND, "not found"),
    "ALREADY_EXISTS": (Exit.CONFLICT, "it exists already"),
    "ABORTED": (Exit.CONFLICT, "somebody else changed it meanwhile"),
    "FAILED_PRECONDITION": (Exit.CONFLICT, "its present state does not allow that"),
    "PERMISSION_DENIED": (Exit.DENIED, "permission denied"),
    "UNAUTHENTICATED": (Exit.DENIED, "the manager does not know who you are"),
    "DEADLINE_EXCEEDED": (Exit.TIMEOUT, "the manager did not answer in time"),
    "CANCELLED": (Exit.ERROR, "the call was cancelled"),
    "UNAVAILABLE": (Exit.UNREACHABLE, "the manager is unreachable"),
    "RESOURCE_EXHAUSTED": (Exit.ERROR, "the manager is at a limit"),
}

#: What to do where the manager does not say it better.
_REMEDIES: dict[str, str] = {
    "INVALID_ARGUMENT": "casemate explain KIND documents what may be written",
    "OUT_OF_RANGE": "casemate explain KIND documents what may be written",
    "UNIMPLEMENTED": "compare the versions: casemate version",
    "NOT_FOUND": "casemate get shows what is there",
    "ALREADY_EXISTS": "choose another name, or end what has it",
    "ABORTED": "see how it is now, and ask again",
    "FAILED_PRECONDITION": "casemate describe shows its state",
    "PERMISSION_DENIED": "casemate whoami shows what you may; docs/access.md says who gives more",
    "UNAUTHENTICATED": "show a good key or token by CASEMATE_TOKEN, or name the file with your certificate by CASEMATE_CONFIG",
    "DEADLINE_EXCEEDED": "ask again; the same request has its effect only once",
    "CANCELLED": "ask again",
    "UNAVAILABLE": "wait until it does, and ask again",
    "RESOURCE_EXHAUSTED": "ask for less, or later",
}
_OURS = "the log of the manager has the story; casemate support-bundle collects it"

#: Reason words of `google.rpc.ErrorInfo` that mean: no host has room.
_UNSCHEDULABLE = frozenset({"Unschedulable", "NoFit", "NOTHING_FITS"})


def from_rpc(error: "grpc.RpcError", manager: str, doing: str = "") -> Failure:
    """What a failed call means. `manager` is the address that was asked, `doing` the verb and its object."""
    from google.rpc import error_details_pb2  # type: ignore[import-untyped, unused-ignore]

    from casemate_wire.v1 import operators_pb2

    code_name = error.code().name
    message = error.details() or ""
    packed_details = _status_details(error)
    if code_name == "UNAVAILABLE" and packed_details is None:
        return unreachable(manager, message)
    code, meaning = _CODES.get(code_name, (Exit.ERROR, f"the manager failed ({code_name})"))
    remedy = _REMEDIES.get(code_name, _OURS)
    details: list[Detail] = []
    sentences: list[Detail] = []
    reason = ""
    for packed in packed_details or ():
        if packed.Is(operators_pb2.Refusal.DESCRIPTOR):
            refusal = operators_pb2.Refusal()
            packed.Unpack(refusal)
            details += [Detail(p.path, p.value, p.problem, p.remedy) for p in refusal.problems]
        elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            packed.Unpack(bad)
            sentences += [Detail(v.field, "", v.description) for v in bad.field_violations]
        elif packed.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
            unmet = error_details_pb2.PreconditionFailure()
            packed.Unpack(unmet)
            details += [Detail(v.subject, "", v.description) for v in unmet.violations]
        elif packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            packed.Unpack(info)
            reason = info.reason
            remedy = info.metadata.get("remedy", remedy)
            if info.reason in _UNSCHEDULABLE:
                code = Exit.UNSCHEDULABLE
        elif packed.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
            missing = error_details_pb2.ResourceInfo()
            packed.Unpack(missing)
            remedy = _shows(missing.resource_type) or remedy
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            remedy = f"ask again in {retry.retry_delay.ToMilliseconds() / 1000:.1f} s"
        elif packed.Is(error_details_pb2.Help.DESCRIPTOR):
            help_ = error_details_pb2.Help()
            packed.Unpack(help_)
            remedy = "; ".join(link.description for link in help_.links) or remedy
    what = f"{doing}: {message or meaning}" if doing else message or meaning
    # A manager sends what is wrong twice: in parts, and as the sentences of google.rpc for other clients.
    found = details or sentences
    if any(detail.remedy for detail in found):
        remedy = ""  # each field has its own
    return Failure(what, code=code, details=found, remedy=remedy, reason=reason)


def _shows(kind: str) -> str:
    """What shows the objects of a kind that there are; empty where no verb does."""
    from casemate_cli import kinds

    others = {
        "AccessKey": "casemate key list",
        "Token": "casemate host token list",
        "authority": "casemate ca list",
        "enrolled host": "casemate get hosts",
    }
    if (command := others.get(kind)) is None and kind in kinds.BY_NAME:
        command = f"casemate get {kinds.BY_NAME[kind].plural}"
    return f"{command} shows what is there" if command else ""


def _status_details(error: "grpc.RpcError") -> "list[Any] | None":
    """The packed `google.rpc` details; None where the transport failed and no server wrote any."""
    from google.protobuf.message import DecodeError
    from google.rpc import status_pb2  # type: ignore[import-untyped, unused-ignore]

    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-status-details-bin":
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return None


def unreachable(manager: str, why: str = "") -> Failure:
    """Nobody answers at the manager's address."""
    return Failure(
        f"no manager answers at {manager}",
        code=Exit.UNREACHABLE,
        details=[Detail(problem=_transport_words(why))] if why else (),
        remedy="start one (casemate dev up), or name another with --manager HOST:PORT or CASEMATE_MANAGER",
        reason="Unreachable",
    )


def _transport_words(why: str) -> str:
    """gRPC's transport message without its repetition of addresses."""
    lowered = why.lower()
    if "certificate_verify_failed" in lowered:
        return "who answers there is not signed by an authority that this context trusts"
    for words in ("connection refused", "name resolution", "timed out", "socket closed", "connection reset"):
        if words in lowered:
            return words
    return why.splitlines()[0][:200]


def lines(failure: Failure) -> list[str]:
    """The text of a failure, one line an item, without colour and not yet escaped."""
    told = [f"error: {failure.what}"]
    for i, detail in enumerate(failure.details):
        if i:
            told.append("")
        parts = (
            ("field", detail.field),
            ("value", detail.value),
            ("problem", detail.problem),
            ("remedy", detail.remedy),
        )
        told += [f"  {label + ':':<9}{text}" for label, text in parts if text]
    told += [f"  | {line}" for line in failure.log]
    if failure.remedy:
        if len(failure.details) > 1:
            told.append("")
        told.append(f"  {'remedy:':<9}{failure.remedy}")
    return told
