"""Names of live objects, as each shell asks for them."""

import shutil
import subprocess
import time

import pytest

from support.fleet import Fleet

MANIFEST = """
apiVersion: casemate/v1
kind: Environment
metadata: {name: tabbed}
spec:
  cpu: {count: 1}
  memory: {size: 256Mi}
  image: debian-13
  run: stopped
  pods:
    - apiVersion: v1
      kind: Pod
      metadata: {name: web}
      spec: {containers: [{name: app, image: "localhost/hello:1"}]}
"""


def asked(fleet: Fleet, shell: str, words: list[str]) -> list[str]:
    """What the shell's script would offer for the last of the words."""
    line = " ".join(words)
    environ = {"bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}}
    environ["zsh"] = environ["bash"]
    environ["fish"] = {"COMP_WORDS": line, "COMP_CWORD": words[-1]}
    told = fleet.run(**environ[shell], _CASEMATE_COMPLETE=f"{shell}_complete").ok().splitlines()  # type: ignore[arg-type]
    if shell == "zsh":  # type, word and help, a line each
        return told[1::3]
    return [word.partition(",")[2].partition("\t")[0] for word in told]


def offered(fleet: Fleet, shell: str, words: list[str], wanted: list[str]) -> bool:
    """Whether it comes to offer these: a completion waits a second for the manager, which a busy machine may exceed."""
    end = time.monotonic() + 60
    while (told := asked(fleet, shell, words)) != wanted:
        assert set(told) <= set(wanted)
        assert time.monotonic() < end, f"offered {told}, wanted {wanted}"
    return True


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_offered_live_names(fleet: Fleet, shell: str) -> None:
    fleet.run("apply", "-f", "-", stdin=MANIFEST).ok()
    try:
        assert offered(fleet, shell, ["casemate", "logs", "tabb"], ["tabbed", "tabbed-0"])
        assert offered(fleet, shell, ["casemate", "exec", "tabbed-0."], ["tabbed-0.web"])
        assert offered(fleet, shell, ["casemate", "console", "tabbed-"], ["tabbed-0"])
        assert offered(fleet, shell, ["casemate", "describe", "env", "tabb"], ["tabbed"])
        assert offered(fleet, shell, ["casemate", "port-fo"], ["port-forward"])
    finally:
        fleet.run("delete", "env/tabbed").ok()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_one_that_its_shell_reads(fleet: Fleet, shell: str) -> None:
    script = fleet.run("completion", shell).ok()
    assert "_CASEMATE_COMPLETE" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)
