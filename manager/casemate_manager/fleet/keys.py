"""PURE. Access keys: made, disabled, rotated, ended. Only digests of secrets are ever here.

Who may: the user himself (not by what a key or token gives him: neither may make another one that outlives it), and who may
`grant` where the user is looked after.
"""

from dataclasses import replace
from typing import Final

from casemate_core.errors import CallerError, Conflict, InvalidSpec, NotFound, Violation, shown
from casemate_core.spec.access import MAX_SUBJECT
from casemate_manager.access import Denied, Grants, Permission, scope_of_user
from casemate_manager.fleet.commands import Batch, ChangeAccessKey, KeyAnswer, MakeAccessKey
from casemate_manager.fleet.draft import Draft
from casemate_manager.fleet.observed import Observed
from casemate_manager.fleet.records import AccessKeyRecord
from casemate_manager.fleet.state import State

MAX_LIFETIME_S: Final = 2 * 365 * 86400
MAX_OVERLAP_S: Final = 7 * 86400
MAX_KEYS_OF_USER: Final = 20


class TooManyKeys(CallerError):
    """A user has as many access keys as he may."""

    reason = "TooManyKeys"


def check(state: State, grants: Grants, command: MakeAccessKey | ChangeAccessKey) -> None:
    """Whether the caller may. Raises Denied, NotFound."""
    if isinstance(command, MakeAccessKey):
        user = command.user
        own = user == grants.principal.name and grants.principal.how in ("certificate", "oidc")
    else:
        known = state.access_keys.get(command.key_id)
        user = known.user if known else ""
        own = known is not None and user == grants.principal.name and grants.principal.how != "token"
    if own or grants.allows(Permission.GRANT, scope_of_user(state.users.get(user))):
        return
    if isinstance(command, ChangeAccessKey):
        raise NotFound("AccessKey", command.key_id)
    raise Denied(grants.principal.name, Permission.GRANT, f"user {user}")


def make(state: State, observed: Observed, command: MakeAccessKey, now_s: float) -> Batch:
    """A new access key. Raises InvalidSpec, TooManyKeys, Conflict."""
    if not command.user or len(command.user) > MAX_SUBJECT or not command.user.isprintable() or " " in command.user:
        raise InvalidSpec((Violation("user", shown(command.user), "names nobody", "name a user"),))
    if not 0 < command.lifetime_s <= MAX_LIFETIME_S:
        raise InvalidSpec(
            (Violation("lifetimeS", str(command.lifetime_s), "is out of range", f"write 1 to {MAX_LIFETIME_S}"),)
        )
    if (known := state.access_keys.get(command.key_id)) is not None:
        if known.digest == command.digest and known.user == command.user:
            return Batch(answer=KeyAnswer(known))  # the same request again
        raise Conflict("the access key is there already: ask for another")
    if sum(k.user == command.user for k in state.access_keys.values()) >= MAX_KEYS_OF_USER:
        raise TooManyKeys(f"user {command.user} has {MAX_KEYS_OF_USER} access keys: delete one first")
    draft = Draft(state, observed, now_s)
    record = AccessKeyRecord(
        command.key_id,
        command.user,
        command.digest,
        now_s,
        now_s + command.lifetime_s,
        shown(command.description) if command.description else "",
    )
    draft.put(record)
    return draft.batch(KeyAnswer(record))


def change(state: State, observed: Observed, command: ChangeAccessKey, now_s: float) -> Batch:
    """Disable, enable, rotate or end one. Raises NotFound, InvalidSpec."""
    known = state.access_keys.get(command.key_id)
    if known is None:
        raise NotFound("AccessKey", command.key_id)
    draft = Draft(state, observed, now_s)
    match command.change:
        case "disable" | "enable":
            record = replace(known, disabled=command.change == "disable")
        case "rotate":
            if not 0 <= command.overlap_s <= MAX_OVERLAP_S:
                raise InvalidSpec(
                    (Violation("overlapS", str(command.overlap_s), "is out of range", f"write 0 to {MAX_OVERLAP_S}"),)
                )
            if known.digest == command.digest:
                return Batch(answer=KeyAnswer(known))  # the same request again
            record = replace(
                known,
                digest=command.digest,
                rotated_s=now_s,
                former_digest=known.digest if command.overlap_s else "",
                former_until_s=now_s + command.overlap_s if command.overlap_s else 0.0,
            )
        case "delete":
            draft.drop("AccessKey", known.id)
            return draft.batch(KeyAnswer(known))
        case _:
            raise InvalidSpec(
                (Violation("change", shown(command.change), "is no change", "disable, enable or delete"),)
            )
    if record != known:
        draft.put(record)
    return draft.batch(KeyAnswer(record))
