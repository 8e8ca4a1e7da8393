"""Reading the openb GPU cluster trace (v2023): nodes and pods as columns and shapes.

May live here: the file format of that trace and nothing else. The files are those of the public release described in
Weng et al., "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent" (USENIX ATC
2023). Node columns: ``sn, cpu_milli, memory_mib, gpu, model``. Pod columns used: ``cpu_milli, memory_mib, num_gpu,
gpu_milli`` (per GPU, below 1000 only where ``num_gpu`` is 1) and, where present, ``gpu_spec`` (models that will do, ``|``
between them).
"""

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casemate_core.errors import CallerError, shown
from casemate_manager.scheduler.bins import Bins
from casemate_manager.scheduler.mix import Shape

#: Models that fit the bit mask of a shape.
MAX_MODELS = 62


class TraceUnreadable(CallerError):
    """A trace file is missing or not what its format says."""

    reason = "TraceUnreadable"


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """N nodes. ``capacity`` (2, N) int64: cpu_milli, memory_mib; ``gpus`` (N,) int64; ``model`` (N,) int64 into ``models``."""

    capacity: NDArray[np.int64]
    gpus: NDArray[np.int64]
    model: NDArray[np.int64]
    models: tuple[str, ...]

    @property
    def gpu_milli(self) -> int:
        """All GPUs, in milli."""
        return int(self.gpus.sum()) * 1000

    def bins(self) -> Bins:
        """The nodes as empty bins of the packing score, one bin a node."""
        slots = np.arange(max(int(self.gpus.max()), 1))[:, None]
        return Bins(self.capacity.copy(), np.where(slots < self.gpus[None, :], 1000, 0), self.model)


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise TraceUnreadable(f"{path}: no column {', '.join(missing)}")
            return list(reader)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TraceUnreadable(f"{path}: {error}") from error


def _integer(row: dict[str, str], column: str, path: Path) -> int:
    try:
        value = int(row[column])
    except (TypeError, ValueError) as error:
        raise TraceUnreadable(f"{path}: column {column}: {shown(row[column])} is no integer") from error
    if value < 0:
        raise TraceUnreadable(f"{path}: column {column}: {value} is negative")
    return value


def read_nodes(path: Path) -> Nodes:
    """The node list at ``path`` (.csv or .csv.gz); raises :class:`TraceUnreadable`."""
    rows = _rows(path, ("cpu_milli", "memory_mib", "gpu", "model"))
    if not rows:
        raise TraceUnreadable(f"{path}: no nodes")
    models = tuple(sorted({row["model"] for row in rows}))
    if len(models) > MAX_MODELS:
        raise TraceUnreadable(f"{path}: {len(models)} GPU models, at most {MAX_MODELS} are supported")
    numbers = [[_integer(row, c, path) for c in ("cpu_milli", "memory_mib", "gpu")] for row in rows]
    columns = np.array(numbers, dtype=np.int64).T
    return Nodes(columns[:2].copy(), columns[2].copy(), np.array([models.index(r["model"]) for r in rows]), models)


def read_pods(path: Path, models: tuple[str, ...]) -> list[Shape]:
    """The pods at ``path`` as shapes over (cpu_milli, memory_mib); a pod that names only unknown models fits nowhere."""
    shapes = []
    for row in _rows(path, ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")):
        cpu, memory, gpus, milli = (_integer(row, c, path) for c in ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli"))
        if gpus and not (0 < milli <= 1000 and (gpus == 1 or milli == 1000)):
            raise TraceUnreadable(f"{path}: {gpus} GPUs of {milli} milli are no request of this format")
        named = [name for name in (row.get("gpu_spec") or "").split("|") if name]
        mask = sum({1 << models.index(name) for name in named if name in models}) or (1 << MAX_MODELS if named else 0)
        shapes.append(Shape((cpu, memory), gpus, milli if gpus else 1000, mask if gpus else 0))
    return shapes
