"""Manifests from where people keep them: files, folders, standard input. Reading is bounded; parsing is the schema's.

Objects are put in the order in which they can be made (what is used before its users), and those of a tenant get the
tenant of the invocation where they name none.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from casemate_cli import kinds
from casemate_cli.failure import Detail, Failure, from_violations
from casemate_core.errors import InvalidSpec, Violation

if TYPE_CHECKING:
    from casemate_wire.v1 import operators_pb2 as pb

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
#: Read at most this much of one file; what may be parsed is less (casemate_wire.yamldoc).
MAX_READ_BYTES = 16 << 20
_ORDER = {kind: i for i, kind in enumerate(("Network", "Image", "Policy", "Host", "Secret", "Volume", "Environment"))}


def files(names: tuple[str, ...], *, recursive: bool) -> list[str]:
    """The files that the names lead to: a folder stands for the manifests in it. Raises Failure."""
    found: list[str] = []
    for name in names:
        path = Path(name)
        if name == "-" or not path.is_dir():
            found.append(name)
            continue
        pattern = path.rglob("*") if recursive else path.glob("*")
        inside = sorted(str(p) for p in pattern if p.suffix in SUFFIXES and p.is_file())
        if not inside:
            raise Failure(
                f"there are no manifests in {name}",
                remedy="name a folder with files that end in .yaml, .yml or .json"
                + ("" if recursive else "; add -R to look in the folders below it"),
            )
        found += inside
    return found


def read(name: str) -> bytes:
    """Content of one file, `-` for standard input. Raises Failure."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_READ_BYTES + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(MAX_READ_BYTES + 1)
    except OSError as error:
        raise Failure(f"cannot read {name}: {error.strerror}", remedy="check the path after -f") from error
    if len(data) > MAX_READ_BYTES:
        raise Failure(
            f"{_source(name)} is too large",
            details=[Detail(_source(name), "", f"is more than {MAX_READ_BYTES >> 20} MiB", "split it")],
        )
    return data


def _source(name: str) -> str:
    return "standard input" if name == "-" else name


def load(names: tuple[str, ...], *, recursive: bool, tenant: str) -> "list[pb.Resource]":
    """All objects of the files, ready to be applied. Raises Failure with everything wrong in all of them."""
    from casemate_wire import manifest

    found: list[pb.Resource] = []
    violations: list[Violation] = []
    for name in files(names, recursive=recursive):
        try:
            found += manifest.load(read(name), _source(name))
        except InvalidSpec as invalid:
            violations += invalid.violations
    if violations:
        raise from_violations("the manifests are refused; nothing was done", violations)
    return _ready(found, tenant)


def parse(text: bytes, source: str, *, tenant: str) -> "list[pb.Resource]":
    """All objects of one text, ready to be applied. Raises Failure."""
    from casemate_wire import manifest

    try:
        return _ready(manifest.load(text, source), tenant)
    except InvalidSpec as invalid:
        raise from_violations(f"{source} is refused", invalid.violations) from None


def _ready(found: "list[pb.Resource]", tenant: str) -> "list[pb.Resource]":
    from casemate_wire import schema

    if not found:
        raise Failure("there is no object in what was given", remedy="a manifest begins with apiVersion and kind")
    for resource in found:
        if kinds.BY_NAME[schema.kind_of(resource)].of_tenant:
            metadata = schema.object_of(resource).metadata  # type: ignore[attr-defined]
            metadata.tenant = metadata.tenant or tenant
    return sorted(found, key=lambda r: _ORDER.get(schema.kind_of(r), len(_ORDER)))
