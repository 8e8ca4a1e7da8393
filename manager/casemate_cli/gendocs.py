"""docs/cli.md and docs/casemate.1, made from the verbs themselves.

python -m casemate_cli.gendocs           write them
python -m casemate_cli.gendocs --check   exit 1 and name what is stale
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from casemate_cli.app import VERBS, root
from casemate_cli.failure import Exit
from casemate_cli.kinds import KINDS

DOCS = Path(__file__).resolve().parents[2] / "docs"
_EXITS = {
    Exit.OK: "done",
    Exit.ERROR: "an error; standard error says which field, which value, and the remedy",
    Exit.UNSCHEDULABLE: "`why`: the instance fits nowhere",
    Exit.DIFFERENT: "`diff`: apply would change something",
    Exit.NOT_FOUND: "there is no such object",
    Exit.DENIED: "permission denied",
    Exit.TIMEOUT: "it did not happen in time",
    Exit.CONFLICT: "somebody else changed the object meanwhile, or its state does not allow that",
    Exit.UNREACHABLE: "no manager answers",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}


def commands() -> Iterator[tuple[str, tuple[str, ...], click.Command]]:
    """Every command as (family, words, command), groups before what is in them."""
    context = click.Context(root, info_name="casemate")
    for family, verbs in VERBS.items():
        for name in verbs:
            command = root.get_command(context, name)
            assert command is not None
            yield family, (name,), command
            if isinstance(command, click.Group):
                for below in command.list_commands(context):
                    inner = command.get_command(context, below)
                    assert inner is not None
                    yield family, (name, below), inner


def _usage(words: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(command, info_name=" ".join(("casemate", *words)))
    return " ".join((context.command_path, *command.collect_usage_pieces(context)))


def _paragraphs(command: click.Command) -> list[tuple[bool, str]]:
    """The help's paragraphs, each with whether it is to be kept as it stands."""
    import inspect

    found = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        kept = paragraph.startswith("\b")
        text = paragraph.removeprefix("\b\n")
        found.append((kept, text if kept else " ".join(text.split())))
    return found


def _options(command: click.Command, words: tuple[str, ...]) -> list[tuple[str, str]]:
    context = click.Context(command, info_name=" ".join(words))
    rows = [param.get_help_record(context) for param in command.get_params(context)]
    return [
        (left, " ".join(right.split())) for left, right in filter(None, rows) if right and not left.endswith("--help")
    ]


_SHARED = ("--manager", "--context", "--tenant", "-t, --tenant", "--request-timeout")


def markdown() -> str:
    """docs/cli.md."""
    lines = [
        "# The command line",
        "",
        "Made from the program by `python -m casemate_cli.gendocs`. Data goes to standard output, talk to standard error.",
        "",
        "Options of every verb that asks a manager, before or after the verb:",
        "",
        *[f"- `{left}` {right}" for left, right in _options(root, ("casemate",)) if left.startswith(_SHARED)],
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        *[f"| {code.value} | {text} |" for code, text in _EXITS.items()],
        "",
        "## Kinds",
        "",
        "| kind | also | of a tenant |",
        "|---|---|---|",
        *[
            f"| {k.plural} | {', '.join((k.word, *k.aliases))} | {'yes' if k.of_tenant else 'no'} |"
            for k in KINDS
            if k.served
        ],
    ]
    last = ""
    for family, words, command in commands():
        if family != last:
            lines += ["", f"## {family}"]
            last = family
        lines += ["", f"### casemate {' '.join(words)}", ""]
        if not isinstance(command, click.Group):
            lines += ["```", _usage(words, command), "```", ""]
        for kept, text in _paragraphs(command):
            if kept:
                head, *examples = text.splitlines()
                kept_lines = [line.strip() for line in examples] if head.endswith(":") else text.splitlines()
                lines += ["```console", *[f"$ {line}" for line in kept_lines], "```", ""]
            else:
                lines += [text, ""]
        own = [row for row in _options(command, words) if not row[0].startswith(_SHARED)]
        if own:
            lines += [f"- `{left}` {right}" for left, right in own] + [""]
        while lines[-1] == "":
            lines.pop()
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def manual() -> str:
    """docs/casemate.1, for man(1)."""
    lines = [
        '.TH CASEMATE 1 "" "Casemate" "User commands"',
        ".SH NAME",
        "casemate \\- run container pods inside virtual machines, on a fleet of hosts",
        ".SH SYNOPSIS",
        ".B casemate",
        "[OPTIONS] VERB [ARGUMENTS]",
        ".SH DESCRIPTION",
        *[_roff(text) for _, text in _paragraphs(root)],
        ".SH OPTIONS",
    ]
    for left, right in _options(root, ("casemate",)):
        lines += [".TP", f".B {_roff(left)}", _roff(right)]
    last = ""
    for family, words, command in commands():
        if family != last:
            lines.append(f".SH {_roff(family.upper())}")
            last = family
        lines.append(f".SS {_roff(_usage(words, command))}")
        for kept, text in _paragraphs(command):
            lines += [".nf", _roff(text), ".fi"] if kept else [".PP", _roff(text)]
        for left, right in _options(command, words):
            if not left.startswith(_SHARED):
                lines += [".TP", f".B {_roff(left)}", _roff(right)]
    lines += [".SH EXIT STATUS"]
    for code, text in _EXITS.items():
        lines += [".TP", f".B {code.value}", _roff(text.replace("`", ""))]
    lines += [
        ".SH FILES",
        ".TP",
        ".I ~/.config/casemate/config.yaml",
        "Contexts.",
        ".SH ENVIRONMENT",
        "CASEMATE_MANAGER, CASEMATE_TENANT, CASEMATE_CONFIG, NO_COLOR, VISUAL, EDITOR.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the documents, or check that they are fresh."""
    parser = argparse.ArgumentParser(
        prog="python -m casemate_cli.gendocs", description="Write docs/cli.md, docs/casemate.1."
    )
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    given = parser.parse_args(arguments)
    stale = 0
    for path, text in ((DOCS / "cli.md", markdown()), (DOCS / "casemate.1", manual())):
        if given.check:
            if not path.exists() or path.read_text() != text:
                sys.stderr.write(f"stale: docs/{path.name}; run: python -m casemate_cli.gendocs\n")
                stale = 1
        else:
            path.write_text(text)
    return stale


if __name__ == "__main__":
    sys.exit(main())
