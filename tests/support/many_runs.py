"""Runs many command lines of `casemate` in one process, which costs milliseconds each instead of a start of Python.

Reads a list of ``{"argv": […], "environ": {…}}`` as JSON from standard input; writes a line of JSON for each: its exit code
and what it wrote to each output. What a program that is started for one command would print as a traceback stands in ``err``.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from typing import Any


def main() -> None:
    cases = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    usual = dict(os.environ)
    for case in cases:
        os.environ.clear()
        os.environ.update(usual | case["environ"])
        json.dump(one(case["argv"]), answers)
        answers.write("\n")
        answers.flush()


def one(argv: list[str]) -> dict[str, Any]:
    from casemate_cli.__main__ import run

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code: Any = run(argv)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            for fd, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, fd)
                os.close(saved)
        told = []
        for file in (out, err):
            file.seek(0)
            told.append(file.read().decode("utf-8", "replace"))
    return {"argv": argv, "code": int(code), "out": told[0], "err": told[1]}


if __name__ == "__main__":
    main()
