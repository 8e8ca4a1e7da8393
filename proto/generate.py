"""Regenerate the modules made from the schema, or check that they are fresh.

    python proto/generate.py            write them
    python proto/generate.py --check    exit 1 and name what is stale

Generated and committed: ``*_pb2.py``, ``*_pb2_grpc.py`` and their ``.pyi`` beside the ``.proto`` files, and
``schema_docs.json``: the comments of the schema, which ``casemate explain`` shows (descriptors loaded at run time carry
none).

From the same sources it writes two pages for people: ``docs/reference.md`` (every kind and field) and
``docs/pod-fields.md`` (the Pod fields that are run).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent
SCHEMA = Path("casemate_wire/v1")
DOCS = SCHEMA / "schema_docs.json"


def protoc(out: Path) -> None:
    """Run protoc and its plug-ins on the whole schema, into ``out``."""
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / SCHEMA).glob("*.proto"))
    (out / SCHEMA).mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{ROOT}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            "--include_source_info",
            f"--descriptor_set_out={out / 'descriptors.bin'}",
            *protos,
        ],
        check=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    descriptors = descriptor_pb2.FileDescriptorSet.FromString((out / "descriptors.bin").read_bytes())
    (out / "descriptors.bin").unlink()
    (out / DOCS).write_text(json.dumps(comments(descriptors), indent=0, sort_keys=True, ensure_ascii=False) + "\n")


def comments(descriptors: descriptor_pb2.FileDescriptorSet) -> dict[str, str]:
    """Leading comments by full name of message, field, enum, service and method."""
    found: dict[str, str] = {}
    for file in descriptors.file:
        names: dict[tuple[int, ...], str] = {}

        def message(
            path: tuple[int, ...], prefix: str, m: descriptor_pb2.DescriptorProto, names: dict[tuple[int, ...], str]
        ) -> None:
            name = f"{prefix}.{m.name}"
            names[path] = name
            for i, field in enumerate(m.field):
                names[(*path, 2, i)] = f"{name}.{field.name}"
            for i, nested in enumerate(m.nested_type):
                message((*path, 3, i), name, nested, names)

        for i, m in enumerate(file.message_type):
            message((4, i), file.package, m, names)
        for i, service in enumerate(file.service):
            names[(6, i)] = f"{file.package}.{service.name}"
            for j, method in enumerate(service.method):
                names[(6, i, 2, j)] = f"{file.package}.{service.name}.{method.name}"
        for location in file.source_code_info.location:
            name = names.get(tuple(location.path))
            if name and location.leading_comments:
                found[name] = " ".join(location.leading_comments.split())
    return found


def pages() -> dict[Path, bytes]:
    """The pages for people, from the modules as they are on disk."""
    sys.path.insert(0, str(ROOT))
    from casemate_core.spec.pod import FIELDS
    from casemate_wire import schema
    from casemate_wire.explain import Explanation, explain

    def rows(explanation: Explanation, depth: int) -> list[str]:
        found = []
        for field in explanation.fields:
            words = f" One of `{'`, `'.join(field.words)}`." if field.words else ""
            served = "" if field.served else " *Not served by this release.*"
            needed = " **Required.**" if field.required else ""
            name = field.path.partition(".")[2]
            found.append(f"| `{name}` | {field.type} | {field.update} | {field.doc}{needed}{words}{served} |")
            if "object" in field.type and depth < 6:
                found += rows(explain(field.path), depth + 1)
        return found

    lines = [
        "# Objects",
        "",
        "Made from the schema by `python proto/generate.py`; `casemate explain` shows the same text.",
        "",
    ]
    for kind in schema.KIND_FIELDS:
        explanation = explain(kind.lower())
        note = "" if explanation.served else " *Not served by this release.*"
        lines += [f"## {kind}", "", f"{explanation.doc}{note}", ""]
        if explanation.served:
            lines += ["| field | type | a change is | meaning |", "|---|---|---|---|", *rows(explanation, 0), ""]
    pod = [
        "# Pod fields",
        "",
        "A pod is a Kubernetes v1 Pod manifest. These fields are run; any other is refused by its path, never ignored.",
        "Made from `casemate_core.spec.pod.FIELDS` by `python proto/generate.py`.",
        "",
        "| field | takes |",
        "|---|---|",
        *(f"| `{path}` | {takes.strip('|').replace('|', ' or ')} |" for path, takes in FIELDS.items()),
        "",
    ]
    docs = Path("..") / "docs"
    return {
        docs / "reference.md": ("\n".join(lines).rstrip() + "\n").encode(),
        docs / "pod-fields.md": "\n".join(pod).encode(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp)
        protoc(out)
        fresh = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    present = {
        p.relative_to(ROOT)
        for pattern in ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
        for p in (ROOT / SCHEMA).glob(pattern)
    }
    if not args.check:
        for path, data in fresh.items():
            (ROOT / path).write_bytes(data)
    fresh |= pages()
    stale = sorted(str(p) for p, data in fresh.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != data)
    orphans = sorted(str(p) for p in present - set(fresh))
    if args.check:
        for name in (*stale, *orphans):
            sys.stderr.write(f"stale: {os.path.normpath(f'proto/{name}')}; run: python proto/generate.py\n")
        return 1 if stale or orphans else 0
    for path, data in fresh.items():
        (ROOT / path).write_bytes(data)
    for name in orphans:
        (ROOT / name).unlink()
    sys.stderr.write(f"wrote {len(fresh)} files, removed {len(orphans)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
