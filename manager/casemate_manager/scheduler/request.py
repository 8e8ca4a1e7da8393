"""What the scheduler is asked, and what it answers. PURE.

May live here: the records of a placement request, a resolved policy, a decision and a refusal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from casemate_core.claims import Claim
from casemate_core.fit import NO_OVERCOMMIT, Overcommit, Request
from casemate_core.spec.environment import Affinity, Toleration

PACK, SPREAD, BALANCE = "pack", "spread", "balance"


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """One instance that needs a place. ``group`` names what is spread: the environment's uid.

    ``labels`` are those of its environment: the affinity rules of others look at them.
    """

    uid: str
    request: Request
    group: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    affinity: tuple[Affinity, ...] = ()
    spread_by: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class PlacementPolicy:
    """The rules that hold for a request, resolved for the columns as they are (``layout`` and ``meta_version``).

    ``allowed`` (N,) bool by row, None for all; ``weights`` (N,) float64 added to the preference of a host, None for none;
    ``denied`` (N,) int64: index into ``reasons`` of the rule that denies a row, -1 where none does.
    """

    strategy: str = PACK
    spread_by: str = ""
    overcommit: Overcommit = NO_OVERCOMMIT
    allowed: NDArray[np.bool_] | None = None
    weights: NDArray[np.float64] | None = None
    denied: NDArray[np.int64] | None = None
    reasons: tuple[str, ...] = ()


DEFAULT_POLICY = PlacementPolicy()


@dataclass(frozen=True, slots=True)
class Decision:
    """A place, with the exact claim. Holds as long as the host's generation is ``host_generation``."""

    uid: str
    host: str
    claim: Claim
    host_generation: int
    #: CPUs, memory, pages and GPUs lie in one cell.
    aligned: bool
    #: Hosts on which ``fit`` was tried; 1 where the first choice held.
    tried: int


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """No host takes it. ``counts``: hosts by the first thing that rejects each; they sum up to ``hosts``.

    ``samples``: for each of them one host that it rejects, to ask for the exact numbers.
    """

    uid: str
    hosts: int
    counts: Mapping[str, int]
    samples: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The counts in words, most hosts first."""
        if not self.hosts:
            return "there are no hosts"
        parts = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return f"0 of {self.hosts} hosts: " + ", ".join(f"{count} {reason}" for reason, count in parts)
