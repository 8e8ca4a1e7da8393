"""The coverage-guided fuzzer over the targets: atheris, which is libFuzzer for Python. Linux on x86-64 or arm64.

    python tests/fuzz/run.py [--seconds 60] [--target NAME ...]

Each target runs in a process of its own for its share of the time, from its seeds and from what it learnt before, which is kept in the
cache folder. An input that breaks one is written to tests/fuzz/found/NAME, where the suite tries it from then on; the exit code is 1.
A single input that takes longer than 10 s or more than 2 GiB breaks its target too. Prints a table: inputs tried, edges reached.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

#: Longest input, in bytes.
LONGEST = 8192
EDGES = re.compile(r"cov: (\d+)")
RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def fuzz(name: str, arguments: list[str]) -> None:
    """In a process of its own: libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(
        include=["casemate_core", "casemate_wire", "casemate_agent", "casemate_manager", "yaml", "json", "fuzz"],
        enable_loader_override=False,
    ):
        from fuzz.targets import tried

    atheris.Setup([sys.argv[0], *arguments], lambda data: tried(name, data))
    atheris.Fuzz()


def run(name: str, seconds: int, cache: Path) -> bool:
    """Whether the target held; prints its line."""
    from fuzz.targets import TARGETS

    corpus, seeds, found = cache / name, cache / f"{name}.seeds", HERE / "found" / name
    for folder in (corpus, seeds):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(TARGETS[name][1]()):
        (seeds / str(number)).write_bytes(data)
    broke = cache / f"{name}.broke"
    broke.unlink(missing_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
    ]
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "--one",
            name,
            "--",
            *options,
            f"-exact_artifact_path={broke}",
            str(corpus),
            str(seeds),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds + 300,
        check=False,
    )
    runs, edges = RUNS.findall(done.stdout), EDGES.findall(done.stdout)
    print(f"{name:16} {runs[-1] if runs else '?':>10} inputs {edges[-1] if edges else '?':>6} edges", flush=True)
    if done.returncode == 0:
        return True
    print(done.stdout[-6000:])
    if broke.exists():
        found.mkdir(parents=True, exist_ok=True)
        kept = found / f"{hashlib.sha256(broke.read_bytes()).hexdigest()[:12]}.bin"
        broke.rename(kept)
        print(f"{name}: broken by {kept}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", action="append", help="this one alone; may be given again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        fuzz(options.one, options.rest)
        return 0
    from fuzz.targets import TARGETS

    if wrong := set(options.target or ()) - TARGETS.keys():
        print(f"no target {', '.join(sorted(wrong))}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "casemate/fuzz"
    held = [run(name, options.seconds, cache) for name in options.target or TARGETS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
