"""How long `casemate` takes to answer: help, its version, and the environments of a fleet that has many.

    python tests/bench/cli_startup.py [--environments 5000] [--runs 15]

Prints a table of milliseconds from the start of the process: to the first line of its output and to its end, lowest and
median of the runs, and the processor time of the program itself (which says more on a busy machine), beside a bare
interpreter. The fleet is a manager with one simulated host, started for this run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fleet import casemate, clean_environment, free_port

#: Objects of one request.
CHUNK = 60


def fill(environ: dict[str, str], environments: int) -> float:
    """Apply that many small environments; the seconds it took."""
    from casemate_cli.client import Client, request_key
    from casemate_cli.manifests import parse
    from casemate_cli.settings import resolve

    def manifest(i: int) -> str:
        return (
            f"apiVersion: casemate/v1\nkind: Environment\nmetadata: {{name: e-{i:05d}, labels: {{app: bench}}}}\n"
            "spec: {cpu: {count: 1}, memory: {size: 256Mi}, image: debian-13, run: stopped}\n"
        )

    started_s = time.perf_counter()
    with Client(resolve(request_timeout_s=300, environ=environ)) as client:
        for first in range(0, environments, CHUNK):
            text = "---\n".join(manifest(i) for i in range(first, min(first + CHUNK, environments)))
            client.apply(parse(text.encode(), "bench", tenant="default"), key=request_key())
    return time.perf_counter() - started_s


def measure(argv: list[str], environ: dict[str, str], runs: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds to the first line, to the end, and of processor time, one of each for each run."""
    first: list[float] = []
    whole: list[float] = []
    processor: list[float] = []
    for _ in range(runs):
        started_s = time.perf_counter()
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            first.append((time.perf_counter() - started_s) * 1e3)
            child.stdout.read()
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        whole.append((time.perf_counter() - started_s) * 1e3)
        processor.append((used.ru_utime + used.ru_stime) * 1e3)
    return first, whole, processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--environments", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as name:
        folder = Path(name)
        port = free_port()
        environ = clean_environment(folder, f"127.0.0.1:{port}")
        os.environ["CASEMATE_CONFIG"] = environ["CASEMATE_CONFIG"]  # the operator's certificate is in it
        where = ("--dir", str(folder / "dev"))
        try:
            casemate(
                "dev",
                "up",
                "--simulated",
                "1",
                "--no-example",
                "--port",
                str(port),
                *where,
                environ=environ,
                timeout_s=100,
            ).ok()
            took_s = fill(environ, given.environments)
            print(f"applied {given.environments} environments in {took_s:.1f} s")
            table(environ, given.runs)
        finally:
            casemate("dev", "down", *where, environ=environ, timeout_s=200)
    return 0


def table(environ: dict[str, str], runs: int) -> None:
    program = [sys.executable, "-m", "casemate_cli"]
    rows = {
        "bare interpreter": [sys.executable, "-c", "print()"],
        "casemate --help": [*program, "--help"],
        "casemate version --client": [*program, "version", "--client"],
        "casemate explain environment": [*program, "explain", "environment"],
        "casemate get env NAME": [*program, "get", "env", "e-00042"],
        "casemate get environments": [*program, "get", "environments"],
        "casemate get env -o name": [*program, "get", "env", "-o", "name"],
    }
    print(f"{runs} runs each, {os.cpu_count()} CPUs; milliseconds from the start of the process")
    print(f"{'command':<32}{'first line':>24}{'end':>24}{'CPU':>12}")
    print(f"{'':<32}{'min':>12}{'median':>12}{'min':>12}{'median':>12}{'median':>12}")
    for name, argv in rows.items():
        first, whole, processor = measure(argv, environ, runs)
        figures = (
            min(first),
            statistics.median(first),
            min(whole),
            statistics.median(whole),
            statistics.median(processor),
        )
        print(f"{name:<32}" + "".join(f"{figure:>12.0f}" for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
