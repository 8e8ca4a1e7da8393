"""No core dumps: keys and texts of secrets are in the memory of agents, relays and managers, and a dump would lie on a disk."""

import logging
import resource

log = logging.getLogger("casemate.coredump")


def forbid() -> None:
    """For this process and those that it starts. systemd-coredump keeps no dump where the limit is 0 either (core(5),
    coredump.conf(5)); what this cannot do is told."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        log.warning("core dumps of this process are not forbidden: %s", error)
