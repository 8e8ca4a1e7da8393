"""Fifty texts of secrets through a real libvirtd and a real guest: what libvirt, QEMU, the seed, the console and the disks keep of them.

libvirtd says everything that it can say (its lowest level), QMP and domain XML among it. Texts that are files of the guest are nowhere
on the host but in the one place that is documented; texts of variables lie on the guest's own disk too, as documented.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.devfleet import DevFleet

pytestmark = pytest.mark.libvirt

BOOT_S = 420.0
COUNT = 50
CANARIES = [f"canary-{n:02d}-quothe-{n * 104729:08x}" for n in range(COUNT)]
VARIABLES, FILES = CANARIES[:25], CANARIES[25:]


def secret() -> dict[str, Any]:
    data = {f"k{n}": text for n, text in enumerate(CANARIES)}
    return {"apiVersion": "casemate/v1", "kind": "Secret", "metadata": {"name": "s"}, "spec": {"data": data}}


def environment() -> dict[str, Any]:
    variables = [
        {"name": f"V{n}", "valueFrom": {"secretKeyRef": {"name": "s", "key": f"k{n}"}}} for n in range(len(VARIABLES))
    ]
    items = [{"key": f"k{n}", "path": f"f{n}"} for n in range(len(VARIABLES), COUNT)]
    container = {
        "name": "c",
        "image": "localhost/hello:1",
        "imagePullPolicy": "Never",
        "env": variables,
        "volumeMounts": [{"name": "s", "mountPath": "/s"}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web"},
        "spec": {"containers": [container], "volumes": [{"name": "s", "secret": {"secretName": "s", "items": items}}]},
    }
    spec = {"cpu": {"count": 2}, "memory": {"size": "1Gi"}, "image": "debian-13", "archives": ["hello"], "pods": [pod]}
    return {"apiVersion": "casemate/v1", "kind": "Environment", "metadata": {"name": "a"}, "spec": spec}


def found_in(path: Path, texts: list[str]) -> list[str]:
    """Those of the texts that a file has, also where it is much larger than memory."""
    done = subprocess.run(
        ["grep", "-a", "-o", "-h", "-F", "-f", "-", str(path)],
        input="\n".join(texts).encode(),
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stderr
    return sorted(set(done.stdout.decode().split()))


@pytest.mark.timeout(2400)
def test_neither_libvirt_nor_qemu_nor_a_disk_of_the_host_keeps_a_text(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    dev = DevFleet(tmp_path_factory.mktemp("c"))
    debug = dev.root / "libvirtd-debug.log"
    try:
        dev.up("--no-example", timeout_s=BOOT_S + 600)
        admin = ["virt-admin", "-c", f"libvirtd:///system?socket={dev.root}/virt/sock/libvirt-admin-sock"]
        for setting in (("daemon-log-outputs", f"1:file:{debug}"), ("daemon-log-filters", "1:*")):
            subprocess.run([*admin, *setting], check=True, capture_output=True, timeout=60)
        dev.run("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, (secret(), environment())))).ok()
        dev.until("the pod runs", lambda: dev.get("pod", "a-0.web").get("status", {}).get("ready"), BOOT_S)
        inside = dev.run("exec", "a-0.web", "--", "/bin/sh", "-c", "env; cat /s/*", timeout_s=180).ok()
        assert [text for text in CANARIES if text not in inside] == [], "the pod has each of them"
        (pid,) = dev.qemus().values()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert b"dump-guest-core=off" in arguments, "nor would a core dump of QEMU have the guest's memory"
        assert not [text for text in CANARIES if text.encode() in arguments]
        dev.run("stop", "a", "--wait", timeout_s=240).ok()  # what the guest wrote is on its disk now
        assert debug.stat().st_size > 100_000, "libvirtd did say all that it can"
        files = [p for p in dev.root.rglob("*") if p.is_file() and not p.is_symlink()]
        kept = {str(p.relative_to(dev.root)): found_in(p, CANARIES) for p in files}
    finally:
        down = dev.down()
    down.ok()
    names = {Path(name).name for name in kept}
    assert {"libvirtd-debug.log", "seed.iso", "console.log", "root.qcow2", "agent.log", "manager.log"} <= names, names
    assert any(name.endswith(".log") and "/qemu/" in name for name in kept), "the log of QEMU was looked at"
    hits = {name: texts for name, texts in kept.items() if texts}
    (private,) = [name for name in hits if "/private/" in name]
    assert hits.pop(private) == CANARIES, "each is in the one place of the host"
    disk = [name for name in hits if name.endswith("root.qcow2")]
    assert [text for name in disk for text in hits.pop(name) if text in FILES] == [], (
        "files are never on the guest's disk"
    )
    assert hits == {}
