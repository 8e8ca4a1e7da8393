"""Every verb, wronged in every way that it can be: each answer has the one shape, the right exit code, and nothing else.

The verbs and their options are read off the program, so a new one is tried as soon as it is there; what a verb is given to
name stands in `ROWS`, and one without a row is tried with what needs none. A wrong is one of: a flag that is not there, a value that an option does
not take, an argument too few, an object that is not there, a kind that is not there, a name that nothing can have, no
manager, a caller that nobody knows, one that may nothing, a file that is not there or is no manifest.

The shape (`casemate_cli.failure`): ``error: what failed``, then field, value, problem and remedy where there are any, and a
remedy always.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

import support.many_runs
from casemate_cli.app import root
from support.fleet import Fleet

CHILDREN = 8
NOBODY = "nobody"
#: What no name can be, and what no terminal should get to see raw.
BAD_NAME = "Bad\x1b[31m_Name"
LINE = re.compile(r"  (field|value|problem|remedy): +\S|  \| |$")
#: Connection's own, which every verb has.
CONNECTION = ("--manager", "--context", "--tenant", "--request-timeout")


@dataclass(frozen=True, slots=True)
class Row:
    """What a verb is given. ``{}`` in ``args`` is the name of an object; ``code`` the answer where it is not there."""

    args: tuple[str, ...] = ()
    code: int = 4
    #: Whether it speaks with a manager at all.
    calls: bool = True
    #: Whether it says what is there, and so has an answer for whoever may see nothing.
    lists: bool = False
    #: How what it tells of its progress begins, which may stand before the error.
    tells: str = ""
    #: Whether it has an answer without the manager's.
    answers: bool = False


def row(
    *args: str, code: int = 4, calls: bool = True, lists: bool = False, tells: str = "", answers: bool = False
) -> Row:
    return Row(args, code, calls, lists, tells, answers)


ROWS: Mapping[str, Row] = {
    "apply": row("-f", "{file}"),
    "diff": row("-f", "{file}"),
    "get": row("env", "{}"),
    "describe": row("env/{}"),
    "explain": row("environment.spec.{}", code=4, calls=False),
    "edit": row("env", "{}"),
    "label": row("env", "{}", "a=b"),
    "annotate": row("env", "{}", "a=b"),
    "delete": row("env", "{}"),
    "wait": row("env/{}", "--for", "ready", "--timeout", "5s", tells="waiting for "),
    "start": row("{}"),
    "stop": row("{}"),
    "restart": row("{}"),
    "reboot": row("{}"),
    "reset": row("{}"),
    "pause": row("{}"),
    "resume": row("{}"),
    "rebuild": row("{}", "--yes"),
    "migrate": row("inst/{}-0"),
    "logs": row("{}"),
    "exec": row("{}", "--", "true"),
    "console": row("{}"),
    "cp": row("{}:/etc/hostname", "{folder}/copied"),
    "ssh": row("{}"),
    "port-forward": row("{}", "0:80"),
    "events": row("env", "{}", lists=True, code=0),
    "audit": row("--actor", "{}", lists=True, code=0),
    "why": row("{}"),
    "certify": row("{}"),
    "fsck host": row("{}"),
    "host list": row(lists=True),
    "host revoke": row("{}"),
    "host token create": row("h1"),
    "host token list": row(lists=True),
    "host token revoke": row("{}"),
    "top fleet": row(lists=True),
    "top host": row("{}"),
    "cordon": row("{}"),
    "uncordon": row("{}"),
    "gpu quarantine": row("{}"),
    "gpu release": row("{}"),
    "gpu sanitise": row("{}"),
    "ca list": row(lists=True),
    "ca retire": row("{}"),
    "ca roll": row(),
    "whoami": row(lists=True),
    "key create": row("{}", code=0),  # a user of an identity provider has no object
    "key delete": row("{}"),
    "key disable": row("{}"),
    "key enable": row("{}"),
    "key list": row("{}", code=0, lists=True),
    "key rotate": row("{}"),
    "token": row("{}", code=1),
    "dev down": row("--dir", "{folder}/nothing", calls=False, code=0),
    "dev status": row("--dir", "{folder}/nothing", calls=False, code=0),
    "dev up": row("--simulated", "1", "--dir", "{folder}/{file}", calls=False),
    "context delete": row("{}", calls=False),
    "context import": row("{folder}/{}", calls=False, code=1),
    "context list": row(calls=False),
    "context set": row("{}", calls=False, code=1),
    "context use": row("{}", calls=False),
    "completion": row("{}", calls=False, code=1),
    "support-bundle": row("-o", "{folder}/bundle.tar.gz", tells="support bundle"),
    "version": row(answers=True),
}


def leaves(command: click.Command, ctx: click.Context, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every verb that does something, by its words."""
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    for name in command.list_commands(ctx):
        found = command.get_command(ctx, name)
        assert found is not None
        yield from leaves(found, click.Context(found, info_name=name, parent=ctx), (*path, name))


VERBS: Mapping[str, Any] = dict(leaves(root, click.Context(root, info_name="casemate")))


@dataclass(frozen=True, slots=True)
class Wrong:
    """One command line, and what its answer must be."""

    how: str
    argv: tuple[str, ...]
    codes: frozenset[int]
    #: What must stand in the answer.
    says: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)


def filled(given: Row, name: str, folder: Path, file: str = "good.yaml") -> tuple[str, ...]:
    places = {"{}": name, "{folder}": str(folder), "{file}": str(folder / file)}
    words = []
    for word in given.args:
        for place, text in places.items():
            word = word.replace(place, text)
        words.append(word)
    return tuple(words)


def wrongs(verb: str, folder: Path, tokens: Mapping[str, str]) -> Iterator[Wrong]:
    """All that can be wrong with a verb's command line."""
    words, command, given = tuple(verb.split()), VERBS[verb], ROWS.get(verb)

    def wrong(how: str, args: tuple[str, ...], *codes: int, says: str = "", **environ: str) -> Wrong:
        return Wrong(how, (*words, *args), frozenset(codes), says, environ)

    if given is None:  # new, and its row to come: what needs none
        yield wrong("no such flag", ("--no-such-flag",), 1, says="--no-such-flag")
        if any(isinstance(p, click.Argument) and p.required for p in command.params):
            yield wrong("nothing given", (), 1)
        return
    good = filled(given, NOBODY, folder)
    names = any("{}" in word for word in given.args)
    yield wrong("no such flag", ("--no-such-flag", *good), 1, says="--no-such-flag")
    yield from _bad_values(verb, wrong, good)
    if any(isinstance(p, click.Argument) and p.required for p in command.params):
        yield wrong("nothing given", (), 1)
    else:
        yield wrong("too much given", (*good, *["too-much"] * 9), 1, 4)
    if names and given.code:
        yield wrong("missing object", good, given.code, says=NOBODY)
    if names:
        # Whoever lists by a name that nothing can have finds nothing.
        bad = filled(given, BAD_NAME, folder)
        yield wrong("wrong name", bad, *((0, 1) if given.code == 0 else (1, 4)), says="" if given.lists else "Name")
    if any(word.partition("/")[0] == "env" for word in given.args):
        kinds = tuple(re.sub(r"^env(?=/|$)", "nokind", word) for word in good)
        yield wrong("wrong kind", kinds, 1, says="nokind")
    if verb in ("apply", "diff"):
        yield wrong("bad value", ("-f", str(folder / "badvalue.yaml")), 1, says="spec.memory.size")
    if verb in ("apply", "diff", "delete"):
        for file, problem in FILES.items():
            yield wrong(f"{problem} file", ("-f", str(folder / file)), 1, says=file)
    if given.calls:
        yield wrong("no manager", ("--manager", "127.0.0.1:1", "--request-timeout", "2", *good), 8, says="127.0.0.1:1")
        yield wrong("no address", ("--manager", "no address", *good), 1, says="no address")
        yield wrong("no such context", ("--context", "nowhere", *good), 1, 4, says="nowhere")
    if given.calls and verb != "version":  # which anybody may see
        yield wrong("unknown caller", good, 5, CASEMATE_TOKEN=tokens["unknown"])
        codes = (0, 4, 5) if given.lists else (4, 5)
        yield wrong("no rights", good, *codes, CASEMATE_TOKEN=tokens["powerless"])


def _bad_values(verb: str, wrong: Any, good: tuple[str, ...]) -> Iterator[Wrong]:
    """A word that no option can take, for each that does not take any word."""
    for option in VERBS[verb].params:
        if not isinstance(option, click.Option) or option.is_flag or option.count:
            continue
        name = max(option.opts, key=len)
        if type(option.type) is type(click.STRING) and name not in ("--manager",):
            continue
        if isinstance(option.type, click.Path):
            continue
        yield wrong(
            f"{name} no value",
            (*good_before_dashes(good)[0], name, "no\x1bsense", *good_before_dashes(good)[1]),
            1,
            says="sense",
        )


def good_before_dashes(args: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments before ``--`` and from it on: what stands behind is not ours."""
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at:]


#: File → what is wrong with it.
FILES: Mapping[str, str] = {
    "absent.yaml": "absent",
    "broken.yaml": "broken",
    "binary.yaml": "binary",
    "other.yaml": "foreign",
    "unknown.yaml": "of an unknown kind",
    "badfield.yaml": "with an unknown field",
    "nameless.yaml": "without a name",
    "list.yaml": "which is a list",
    "folder.yaml": "which is an empty folder",
}
HEAD = "apiVersion: casemate/v1\nkind: Environment\nmetadata: {name: x}\n"
SPEC = "spec: {cpu: {count: 1}, memory: {size: 256Mi}, image: debian-13}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong")
    texts = {
        "good.yaml": HEAD + SPEC,
        "broken.yaml": "a: [\n",
        "other.yaml": HEAD.replace("casemate/v1", "apps/v7") + SPEC,
        "unknown.yaml": HEAD.replace("Environment", "Nonsense") + SPEC,
        "badfield.yaml": HEAD + SPEC.replace("cpu:", "cqu:"),
        "badvalue.yaml": HEAD + SPEC.replace("256Mi", "lots\\u001b"),
        "nameless.yaml": HEAD.replace("name: x", "") + SPEC,
        "list.yaml": "- a\n- b\n",
    }
    for name, text in texts.items():
        (made / name).write_text(text)
    (made / "binary.yaml").write_bytes(bytes(range(256)) * 8)
    (made / "folder.yaml").mkdir()
    return made


@pytest.fixture(scope="module")
def tokens(fleet: Fleet) -> Iterator[dict[str, str]]:
    """Credentials of nobody, and of somebody who may nothing."""
    user = "apiVersion: casemate/v1\nkind: User\nmetadata: {name: powerless}\nspec: {type: service}\n"
    fleet.run("apply", "-f", "-", stdin=user).ok()
    key = fleet.run("key", "create", "powerless").ok().strip()
    yield {"powerless": key, "unknown": key[:-4] + ("AAAA" if key[-4:] != "AAAA" else "BBBB")}
    fleet.run("delete", "user", "powerless").ok()


def test_rows_are_of_verbs_and_most_verbs_have_one() -> None:
    assert set(ROWS) <= set(VERBS)
    assert len(set(VERBS) - set(ROWS)) <= len(VERBS) // 10


def faults(wrong: Wrong, answer: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the answer to a wrong."""
    words = " ".join(wrong.argv)
    given = next((ROWS[verb] for verb in sorted(ROWS, key=len, reverse=True) if words.startswith(verb)), Row())
    code, out, err = answer["code"], answer["out"], answer["err"]
    if code not in wrong.codes:
        yield f"exit {code}, not {sorted(wrong.codes)}"
    if "Traceback" in err:
        yield "a traceback"
        return
    if any(c < " " and c != "\n" for c in out + err):
        yield "control characters"
    if code == 0:
        return
    if out and not given.answers:
        yield f"standard output: {out[:80]!r}"
    lines = err.splitlines()
    while given.tells and lines and lines[0].startswith(given.tells):
        lines.pop(0)
    first, *rest = lines or [""]
    if not re.match(r"error: \S", first):
        yield f"does not begin with error: {first[:80]!r}"
    yield from (f"a line of another shape: {line[:80]!r}" for line in rest if not LINE.match(line))
    if not any(line.startswith("  remedy:") for line in rest):
        yield "no remedy"
    if wrong.says not in err:
        yield f"does not say {wrong.says!r}"


def answered(fleet: Fleet, folder: Path, cases: list[Wrong]) -> list[dict[str, Any]]:
    """What each of the cases says. Several processes, since whoever finds no manager waits a while for one."""
    children = []
    for own in (cases[n::CHILDREN] for n in range(CHILDREN)):
        with tempfile.TemporaryFile("w+") as given:
            json.dump([{"argv": c.argv, "environ": dict(c.environ)} for c in own], given)
            given.seek(0)
            children.append(
                subprocess.Popen(
                    [sys.executable, str(support.many_runs.__file__)],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=folder,
                    env=dict(fleet.environ),
                )
            )
    try:
        told = [child.communicate(timeout=280) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    answers: list[dict[str, Any]] = [{}] * len(cases)
    for n, (out, err) in enumerate(told):
        found = [json.loads(line) for line in out.splitlines()]
        assert len(found) == len(cases[n::CHILDREN]), err
        answers[n::CHILDREN] = found
    return answers


@pytest.mark.timeout(300)
def test_every_wrong_is_answered_in_the_one_shape(fleet: Fleet, folder: Path, tokens: dict[str, str]) -> None:
    cases = [wrong for verb in VERBS for wrong in wrongs(verb, folder, tokens)]
    assert len(cases) > 300
    answers = answered(fleet, folder, cases)
    found = [
        f"{wrong.how}: casemate {' '.join(wrong.argv)}\n    {'; '.join(told)}\n    {answer['err']!r}"
        for wrong, answer in zip(cases, answers, strict=True)
        if (told := list(faults(wrong, answer)))
    ]
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)
