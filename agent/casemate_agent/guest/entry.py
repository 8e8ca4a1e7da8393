"""The ``__main__.py`` of the guest's helper where it is delivered as an archive: loads its modules, and runs it.

Why a loader of our own. Python's :mod:`zipimport` compiles a module that has no compiled file beside it twice, once to find
it and once to load it, and compiling is most of the time that the helper takes to start. Here each is compiled once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False  # as in the helper's modules: typing is slow to import
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any
    from zipimport import zipimporter

PACKAGE = "casemate_guest"


class Modules:
    """Finder and loader of the modules in the archive that ``archive`` reads, which is at ``path``."""

    def __init__(self, archive: zipimporter, path: str) -> None:
        self.archive, self.path = archive, path

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Where one of our modules is; None for all others, and for one that is not in the archive."""
        package, _, module = name.partition(".")
        if package != PACKAGE:
            return None
        member = f"{self.path}/{package}/{module or '__init__'}.py"
        try:
            source = self.archive.get_data(member)
        except OSError:
            return None
        loader: Any = self
        spec = ModuleSpec(name, loader, origin=member, loader_state=source, is_package=not module)
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """As usual."""

    def exec_module(self, module: ModuleType) -> None:
        """Compile and run."""
        spec: Any = module.__spec__
        source, spec.loader_state = spec.loader_state, None
        exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)


if __name__ == "__main__":
    archive: Any = sys.modules["__main__"].__loader__
    ours: Any = Modules(archive, sys.path[0])
    sys.meta_path.insert(0, ours)
    sys.exit(import_module(f"{PACKAGE}.main").main(sys.argv[1:]))
