"""The mock of the Fabric Manager's library, built from our own C source: what it answers is text that a test writes."""

import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvfm.c")
#: HGX H200 with eight GPUs: all, halves, a pair and a single, by module id (NVIDIA counts them from 1).
PARTITIONS = {0: range(1, 9), 1: range(1, 5), 2: range(5, 9), 3: (1, 3), 7: (8,)}


@dataclass(slots=True)
class Manager:
    """What the mock answers. ``write`` after each change."""

    path: Path
    partitions: dict[int, tuple[int, ...]] = field(default_factory=lambda: {n: tuple(m) for n, m in PARTITIONS.items()})
    lines: list[str] = field(default_factory=list)

    def write(self) -> None:
        """Atomic: the library reads it from another thread."""
        text = [*self.lines, *(f"partition {n} {' '.join(map(str, m))}" for n, m in self.partitions.items())]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(text) + "\n")
        os.replace(fresh, self.path)

    @property
    def active(self) -> set[int]:
        """Partitions that are active, as the manager keeps them."""
        path = Path(f"{self.path}.active")
        mask = int(path.read_text(), 16) if path.exists() else 0
        return {n for n in range(64) if mask >> n & 1}


def build(folder: Path, *defines: str) -> Path:
    """Compile it as ``libnvfm.so.1`` in ``folder``."""
    library = folder / "libnvfm.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    command += [f"-D{name}" for name in defines]
    subprocess.run([*command, "-Wl,-soname,libnvfm.so.1", "-o", library, SOURCE], check=True, timeout=60)
    return library


def load(library: Path) -> None:
    """Have this process use it: the loader takes a library that is loaded already under the same soname."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def manager_program(folder: Path, version: str) -> Path:
    """The manager's own program, as far as it tells its version."""
    program = folder / "nv-fabricmanager"
    program.write_text(f"#!/bin/sh\necho 'Fabric Manager version is : {version}'\n")
    program.chmod(0o755)
    return program
