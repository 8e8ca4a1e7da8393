"""`casemate edit`: an object in an editor, applied if nobody else changed it meanwhile."""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click

from casemate_cli import completing, kinds, options, output, term
from casemate_cli.failure import Failure, from_violations, lines


def _editor() -> list[str]:
    return shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")


def editable(plain: dict[str, Any]) -> dict[str, Any]:
    """The object without what only the manager writes; its resource version stays, to notice another's change."""
    metadata = {
        key: value
        for key, value in plain.get("metadata", {}).items()
        if key in ("name", "tenant", "labels", "annotations", "resourceVersion")
    }
    return {
        "apiVersion": plain["apiVersion"],
        "kind": plain["kind"],
        "metadata": metadata,
        "spec": plain.get("spec", {}),
    }


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="KIND NAME", shell_complete=completing.kind_or_name)
@options.connection
@click.pass_context
def edit(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Change an object in an editor.

    Opens the object in $VISUAL, $EDITOR or vi and applies what you saved. Where that is refused, the reason stands on top of
    the file and the editor opens again; save it unchanged to give up. What you wrote is kept then.
    """
    from casemate_cli.client import Client, request_key
    from casemate_core.errors import InvalidSpec
    from casemate_wire import manifest

    wanted = kinds.targets(arguments)
    if len(wanted) != 1 or not wanted[0].name:
        raise Failure("one object is edited at a time", remedy="name it as KIND NAME")
    target = wanted[0]
    if not target.kind.writable:
        raise Failure(f"{target.kind.plural} are written by the manager only", remedy="edit the environment instead")
    settings = options.settings(ctx)
    with Client(settings) as client:
        resource = client.get(target.kind.name, target.name, settings.tenant if target.kind.of_tenant else "")
        original = output.to_yaml(editable(output.plain(resource)))
        text = original
        handle, name = tempfile.mkstemp(prefix=f"casemate-{target.kind.word}-", suffix=".yaml")
        os.close(handle)
        path = Path(name)
        last: Failure | None = None
        while True:
            path.write_text(_commented(last) + text)
            _run_editor(path)
            saved = _uncommented(path.read_text())
            if saved == text and last is not None:
                term.say(f"what you wrote is kept in {path}")
                raise last
            if saved == original:
                path.unlink()
                term.say(f"{target} is unchanged")
                return
            text = saved
            try:
                parsed = manifest.load(saved.encode(), str(path))
                answer = client.apply(parsed, key=request_key(), doing=f"editing {target}")
            except InvalidSpec as invalid:
                last = from_violations(f"{target} is refused", invalid.violations)
                continue
            except Failure as failure:
                last = failure
                continue
            break
        path.unlink()
    for result in answer.results:
        term.out(f"{kinds.BY_NAME[result.ref.kind].word}/{term.clean(result.ref.name)} {term.clean(result.action)}")


def _run_editor(path: Path) -> None:
    command = [*_editor(), str(path)]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise Failure(f"cannot run the editor {command[0]}: {error.strerror}", remedy="set EDITOR") from error
    if code:
        raise Failure(f"the editor ended with {code}; nothing was applied", remedy=f"what you wrote is kept in {path}")


def _commented(failure: Failure | None) -> str:
    if failure is None:
        return ""
    return "".join(f"#! {term.clean(line)}\n" for line in lines(failure))


def _uncommented(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#! "))
