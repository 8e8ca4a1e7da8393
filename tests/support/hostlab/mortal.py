"""The agent on the emulated server, killed at a call of its drivers.

Here is what a test does with it (`prepare`, `arm`, `until_dead`); ``HOOK`` is what runs in the agent: Python loads it by itself
(as ``sitecustomize``), and on SIGUSR2 it puts a SIGKILL before, during or after the one call that a file names. Nothing of the
agent is another than in production until then, and the agent that systemd starts after that death is unarmed again.
"""

import shlex

from support.hostlab.server import Server

FOLDER = "/opt/mortal"
HOOK = """
import inspect, os, signal, sys, threading

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def then_die(answer):
    await answer
    die()

def arm(number, frame):
    with open("/opt/mortal/at") as file:
        when, where = file.read().split()
    module, _, path = where.partition(":")
    owner = sys.modules[module]
    *names, name = path.split(".")
    for each in names:
        owner = getattr(owner, each)
    real = getattr(owner, name)

    def fatal(*positional, **named):
        if when == "before":
            die()
        if when == "during":
            threading.Timer(0.3, die).start()
        answer = real(*positional, **named)
        if when == "after":
            if inspect.iscoroutine(answer):
                return then_die(answer)
            die()
        return answer

    setattr(owner, name, fatal)

signal.signal(signal.SIGUSR2, arm)
"""
UNIT = f"[Service]\nEnvironment=PYTHONPATH={FOLDER}\n"


def prepare(server: Server) -> None:
    """Have the agent load the hook from its next start on, and start it again."""
    server.machine.write(f"{FOLDER}/sitecustomize.py", HOOK.encode())
    server.machine.write("/etc/systemd/system/casemate-agent.service.d/mortal.conf", UNIT.encode())
    server.machine.run("systemctl daemon-reload; systemctl restart casemate-agent", timeout_s=300)
    server.until("it has joined again", server.joined)


def undo(server: Server) -> None:
    """As `prepare` found it."""
    server.machine.run("rm -f /etc/systemd/system/casemate-agent.service.d/mortal.conf; systemctl daemon-reload")


def pid(server: Server) -> str:
    """Of the agent; "0" while there is none."""
    return server.machine.run("systemctl show -P MainPID casemate-agent").strip()


def arm(server: Server, at: str) -> str:
    """Have the agent die ``at`` (``before|during|after MODULE:CLASS.METHOD``) the next time; its pid."""
    now = pid(server)
    server.machine.run(f"echo {shlex.quote(at)} > {FOLDER}/at; kill -USR2 {now}")
    return now


def until_dead(server: Server, before: str) -> None:
    """Until that agent is dead and another runs."""
    server.until("the agent has died where it was told to", lambda: pid(server) not in ("0", before))
