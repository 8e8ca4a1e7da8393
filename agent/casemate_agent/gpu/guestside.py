"""What a guest tells of the GPUs that it has. PURE.

What may live here: the question, and the reading of the answer.

Theory of operation. While a guest has a card, its host sees the PCIe link and nothing else. The guest's own driver sees the
rest, and its ``nvidia-smi`` is asked for it, as text with a field for each value. A guest may say anything: the answer is
bounded, each field is a number within the bounds of its kind or else unknown, and a line counts only where it names a GPU that
this guest has. Who the GPU is and where stays what the host knows. What is done on a guest's word alone is for a policy of its
own: whoever has a card for an hour must not be able to take it from everybody.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from casemate_agent.gpu.readings import GpuReading

MAX_ANSWER_BYTES = 16 << 10
"""Sixteen cards with fifteen fields of a dozen characters are 4 KiB."""
MAX_LINES = 64
_NUMBER = re.compile(r"\d{1,15}(\.\d{1,6})?\Z", re.ASCII)
_FIELDS = (
    "uuid", "temperature.gpu", "power.draw", "utilization.gpu", "utilization.memory", "memory.total", "memory.used",
    "ecc.errors.corrected.volatile.total", "ecc.errors.uncorrected.volatile.total", "remapped_rows.correctable",
    "remapped_rows.uncorrectable", "remapped_rows.pending", "remapped_rows.failure",
)  # fmt: skip
ARGV = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
"""The question (nvidia-smi --help-query-gpu)."""


@dataclass(frozen=True, slots=True)
class GivenGpu:
    """A GPU that a guest has, as its host knows it."""

    uuid: str
    address: str
    model: str


def readings(text: str, given: Mapping[str, GivenGpu]) -> tuple[GpuReading, ...]:
    """What an answer tells of the guest's own GPUs, by UUID; a card that it names twice counts once."""
    found: dict[str, GpuReading] = {}
    for line in text.splitlines()[:MAX_LINES]:
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(_FIELDS) or words[0] not in given or words[0] in found:
            continue
        found[words[0]] = _reading(given[words[0]], words[1:])
    return tuple(found[uuid] for uuid in sorted(found))


def _reading(gpu: GivenGpu, words: list[str]) -> GpuReading:
    heat, power, busy, memory_busy, total, used, corrected, uncorrected, rows_corrected, rows_not, pending, failed = (
        words
    )
    power_w = _number(power, 10_000)
    return replace(
        GpuReading(gpu.uuid, gpu.address, gpu.model),
        temperature_c=_whole(heat, 250),
        power_mw=None if power_w is None else round(power_w * 1000),
        gpu_busy_percent=_whole(busy, 100),
        memory_busy_percent=_whole(memory_busy, 100),
        memory_mib=_whole(total, 1 << 24),
        memory_used_mib=_whole(used, 1 << 24),
        ecc_corrected=_whole(corrected, 1 << 48),
        ecc_uncorrected=_whole(uncorrected, 1 << 48),
        rows_remapped_corrected=_whole(rows_corrected, 1 << 20),
        rows_remapped_uncorrected=_whole(rows_not, 1 << 20),
        rows_pending=_said(pending),
        rows_failed=_said(failed),
    )


def _number(word: str, most: float) -> float | None:
    """A number from 0 to ``most``; ``[N/A]``, and anything else that is none, is unknown."""
    return float(word) if _NUMBER.match(word) and float(word) <= most else None


def _whole(word: str, most: int) -> int | None:
    number = _number(word, most)
    return None if number is None else round(number)


def _said(word: str) -> bool | None:
    return {"Yes": True, "No": False, "1": True, "0": False}.get(word)
