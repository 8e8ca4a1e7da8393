"""The mock of NVIDIA's library, built from our own C source: what its boards say is text that a test writes.

``build(folder)`` compiles it; ``load(library)`` makes pynvml of this process use it (the loader takes a library that is
loaded already under the same soname); a process of its own finds it by LD_LIBRARY_PATH.
"""

import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
HEALTHY = {
    "uuid": "GPU-11111111-2222-3333-4444-555555555555",
    "name": "NVIDIA H200",
    "bus": "0000:17:00",
    "serial": "1650000000001",
    "memory": "143771",
    "used": "4",
    "busy": "0 0",
    "temperature-v": "31",
    "power": "76500",
    "ecc-corrected": "0",
    "ecc-uncorrected": "0",
    "rows": "0 0 0 0",
    "generation": "1",
    "generation-max": "5",
    "width": "16",
    "width-max": "16",
    "replays": "0",
    "module": "3",
    "mig": "0",
    "processes": "",
}
"""A board as it should be: idle, cool, with its whole link."""


@dataclass(slots=True)
class Boards:
    """What the mock answers. ``write`` after each change."""

    path: Path
    gpus: list[dict[str, str]] = field(default_factory=lambda: [dict(HEALTHY)])
    lines: list[str] = field(default_factory=list)

    def write(self) -> None:
        """Atomic: the library reads it from another thread."""
        text = [*self.lines]
        for gpu in self.gpus:
            text += ["gpu", *(f"{key} {value}" for key, value in gpu.items())]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(text) + "\n")
        os.replace(fresh, self.path)


def build(folder: Path, *defines: str) -> Path:
    """Compile it as ``libnvidia-ml.so.1`` in ``folder``."""
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    command += [f"-D{name}" for name in defines]
    subprocess.run([*command, "-Wl,-soname,libnvidia-ml.so.1", "-o", library, SOURCE], check=True, timeout=60)
    return library


def load(library: Path) -> None:
    """Have this process use it."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
