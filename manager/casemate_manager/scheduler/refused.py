"""Counting why hosts do not take a request: each host under the first thing that rejects it. PURE.

May live here: the counts by vectors. Sentences with exact numbers for single hosts, and what would help, are in ``explain``.
"""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from casemate_core.fit import Request
from casemate_manager.columns import FleetColumns
from casemate_manager.scheduler.mix import Shape
from casemate_manager.scheduler.request import PlacementPolicy, PlacementRequest, Unplaceable

if TYPE_CHECKING:
    from casemate_manager.scheduler.constraints import Constraints
    from casemate_manager.scheduler.shape import Shapes

CLOSED = "are not open to new instances"
SELECTOR = "lack a label of the node selector"
TAINT = "have a taint that is not tolerated"
POLICY = "are denied by policy"
VOLUME = "do not have the data of a volume that it uses"
NEIGHBOUR = "are excluded by affinity"
ENOUGH = "have enough as well"
TOGETHER = "have the amounts but not in a place where they fit together"

_WORDS = {
    "cpu_milli": "have too little shared CPU",
    "any_milli": "have too few free threads",
    "isolated": "have too few isolated threads",
    "cores": "have too few whole free cores",
    "memory_mib": "have too little memory",
    "disk_mib": "have too little disk",
}


def dimension_words(name: str) -> str:
    """What a host that is short of a dimension is counted under."""
    if name.startswith("pages:"):
        return f"have too few free huge pages of {name[6:]} KiB"
    if name.startswith("vf:"):
        return f"have too few free VFs on network {name[3:]}"
    return _WORDS[name]


def first_short(columns: FleetColumns, shape: Shape) -> tuple[NDArray[np.int64], list[str]]:
    """For each row (N,) the index into the words of the first amount that is short, -1 where none is."""
    bins = columns.hosts
    words: list[str] = []
    short = np.full(len(bins.model), -1, dtype=np.int64)

    def count(lacking: NDArray[np.bool_], word: str) -> None:
        lacking &= short < 0
        if lacking.any():
            short[lacking] = len(words)
            words.append(word)

    if shape.gpus:
        if shape.models:
            count((shape.models >> bins.model) & 1 == 0, "have no GPU of the model asked")
        count((bins.gpu > 0).sum(axis=0) == 0, "have no free GPU")
        count((bins.gpu >= shape.share_milli).sum(axis=0) < shape.gpus, "have too few free GPUs")
    for d, need in enumerate(shape.need):
        if need:
            count(bins.free[d] < need, dimension_words(columns.dimensions[d]))
    return short, words


def volume_hosts(columns: FleetColumns, request: Request) -> NDArray[np.bool_] | None:
    """Rows (N,) that have all the data of the request's volumes: one, or none where they are apart. None: none has any yet."""
    hosts = {volume.host for volume in request.volumes if volume.host}
    if not hosts:
        return None
    here = np.zeros(len(columns.available), dtype=np.bool_)
    if len(hosts) == 1 and (host := next(iter(hosts))) in columns:
        here[columns.row(host).number] = True
    return here


def count_reasons(
    columns: FleetColumns,
    request: PlacementRequest,
    policy: PlacementPolicy,
    shapes: "Shapes",
    allowed: NDArray[np.bool_],
    constraints: "Constraints",
    *,
    beside: int = -1,
) -> Unplaceable:
    """The hosts counted by the first thing that rejects each.

    ``beside``: the row that an instance is on. It is not counted, and hosts that lack nothing are told to have enough; whether
    they would take it is ``fit``'s word, and ``fit`` is not asked on all of them.
    """
    counts: Counter[str] = Counter()
    samples: dict[str, str] = {}
    rest = columns.live.copy()
    if beside >= 0:
        rest[beside] = False

    def take(rejected: NDArray[np.bool_], word: str) -> None:
        nonlocal rest
        hit = rest & rejected
        if hit.any():
            counts[word] += int(hit.sum())
            sample = columns.rows[int(hit.argmax())]
            if sample is not None:
                samples.setdefault(word, sample.view.name)
            rest = rest & ~hit

    hosts = int(rest.sum())
    take(~columns.available, CLOSED)
    if request.node_selector:
        selected = np.ones(len(rest), dtype=np.bool_)
        for row in columns.live_rows():
            labels = row.view.labels
            selected[row.number] = all(labels.get(k) == v for k, v in request.node_selector.items())
        take(~selected, SELECTOR)
    tolerated, _ = constraints.hosts(request.node_selector, request.tolerations)
    take(~tolerated, TAINT)
    if policy.allowed is not None:
        if policy.denied is not None:
            for number, text in enumerate(policy.reasons):
                take(~policy.allowed & (policy.denied == number), f"are denied by {text}")
        take(~policy.allowed, POLICY)
    if (beside_data := volume_hosts(columns, request.request)) is not None:
        take(~beside_data, VOLUME)
    take(~allowed, NEIGHBOUR)
    if shapes.missing:
        take(rest.copy(), f"have no {shapes.missing}")
    short, words = first_short(columns, shapes.whole)
    for number, word in enumerate(words):
        take(short == number, word)
    take(rest.copy(), TOGETHER if beside < 0 else ENOUGH)
    return Unplaceable(request.uid, hosts, dict(counts), samples)
