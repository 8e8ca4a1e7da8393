"""Changes of objects that several verbs make: read, change, apply if nobody else changed it meanwhile, else again."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from casemate_cli.client import Client, request_key
from casemate_cli.failure import Exit, Failure
from casemate_cli.kinds import Target

if TYPE_CHECKING:
    from casemate_wire.v1 import operators_pb2 as pb

#: Somebody who changes the same object at the same time has won this often before we give up.
ATTEMPTS = 5


def change(client: Client, target: Target, tenant: str, mutate: Callable[[Any], None], doing: str) -> "pb.ApplyResult":
    """Change one object by `mutate`, which edits its message in place. Raises Failure (CONFLICT after five lost races)."""
    from casemate_wire import schema

    attempt = 0
    while True:
        attempt += 1
        resource = client.get(target.kind.name, target.name, tenant if target.kind.of_tenant else "")
        mutate(schema.object_of(resource))
        try:
            answer = client.apply([resource], key=request_key(), doing=doing)
            return answer.results[0]
        except Failure as failure:
            if failure.code is not Exit.CONFLICT or attempt == ATTEMPTS:
                raise
