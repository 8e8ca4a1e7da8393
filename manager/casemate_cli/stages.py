"""How far the instances of environments are, told while somebody waits: image, boot, pods.

What may live here: one watch beside the one that decides. It is for the eye alone: where it breaks nothing is told, and the
wait goes on.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from casemate_cli.failure import Failure

if TYPE_CHECKING:
    from casemate_cli.client import Client


def stage(instance: Any) -> str:
    """`hello-0 Preparing: FetchImage`, `hello-0 Starting: userland`, from what the instance says of itself."""
    status = instance.status
    why = next((c.reason for c in status.conditions if c.status != "True" and c.reason), "")
    detail = status.boot if status.phase in ("Starting", "Running") and status.boot else why
    return f"{instance.metadata.name} {status.phase or 'Pending'}" + (f": {detail}" if detail else "")


def watch(client: "Client", tenant: str, environments: set[str], tell: Callable[[str], None]) -> None:
    """Tell the stages of these environments' instances, from now until the client is closed."""

    def follow() -> None:
        stages: dict[str, str] = {}
        try:
            for event in client.watch("Instance", tenant=tenant):
                instance = event.resource.instance
                if instance.spec.environment not in environments:
                    continue
                stages[instance.metadata.name] = stage(instance)
                tell(", ".join(stages[name] for name in sorted(stages)[:8]))
        except (Failure, ValueError):  # a closed channel is a ValueError
            return

    threading.Thread(target=follow, name="stages", daemon=True).start()
