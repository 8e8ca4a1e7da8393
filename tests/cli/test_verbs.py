"""The verbs on a fleet of simulated hosts, as a person uses them: one story a test, names of its own, nothing left."""

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.fleet import HOSTS, Fleet

MANIFEST = """\
apiVersion: casemate/v1
kind: Environment
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  cpu: {{count: 1}}
  memory: {{size: 256Mi}}
  image: debian-13
  archives: [hello]
  pods:
    - apiVersion: v1
      kind: Pod
      metadata: {{name: web}}
      spec:
        hostNetwork: true
        containers: [{{name: hello, image: "localhost/hello:1"}}]
"""


def manifest(name: str, app: str = "test") -> str:
    return MANIFEST.format(name=name, app=app)


@pytest.fixture
def name(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of this test's own; the environment of that name is deleted at the end."""
    own = f"t-{abs(hash(request.node.name)) % 10**8}"
    yield own
    fleet.run("delete", "env", own, "--ignore-not-found").ok()


@pytest.fixture
def ready(fleet: Fleet, name: str) -> str:
    """An environment that is Ready."""
    fleet.run("apply", "-f", "-", stdin=manifest(name)).ok()
    fleet.run("wait", f"env/{name}", "--for", "ready", "--timeout", "30s").ok()
    return name


def test_apply_is_idempotent_and_dry_run_does_nothing(fleet: Fleet, name: str) -> None:
    assert (
        fleet.run("apply", "-f", "-", "--dry-run", stdin=manifest(name)).ok()
        == f"environment/{name} created (dry run)\n"
    )
    assert fleet.run("get", "env", name).code == 4
    assert fleet.run("apply", "-f", "-", stdin=manifest(name)).ok() == f"environment/{name} created\n"
    assert fleet.run("apply", "-f", "-", stdin=manifest(name)).ok() == f"environment/{name} unchanged\n"


def test_more_objects_than_one_request_takes(fleet: Fleet, name: str) -> None:
    names = [f"{name}-{i}" for i in range(61)]
    text = "---\n".join(manifest(n, app=name).replace("\nspec:", "\nspec:\n  run: stopped") for n in names)
    done = fleet.run("apply", "-f", "-", stdin=text)
    assert done.ok().splitlines() == [f"environment/{n} created" for n in names]
    assert "61 objects go in 2 requests" in done.err
    assert len(fleet.run("get", "env", "-l", f"app={name}", "-o", "name").ok().splitlines()) == 61
    fleet.run("delete", "env", "-l", f"app={name}", "--no-wait").ok()
    fleet.run("wait", "env", "-l", f"app={name}", "--for", "delete", "--timeout", "60s").ok()


def test_apply_waits_and_tells_how_far_it_is(fleet: Fleet, name: str) -> None:
    done = fleet.run("apply", "-f", "-", "--wait", "--timeout", "40s", stdin=manifest(name))
    assert done.ok() == f"environment/{name} created\n"
    assert f"{name}-0 " in done.err and f"environment/{name} is Ready" in done.err
    assert fleet.run("get", "env", name, "-o", "jsonpath={.status.phase}").ok() == "Ready\n"
    late = fleet.run(
        "apply", "-f", "-", "--wait", "--timeout", "1s", stdin=manifest(f"{name}-s").replace("256Mi", "900Gi")
    )
    assert late.code == 6 and "did not reach" in late.err
    stopped = manifest(f"{name}-s").replace("spec:\n  cpu", "spec:\n  run: stopped\n  cpu")
    assert fleet.run("apply", "-f", "-", "--wait", stdin=stopped).code == 0, "what should not run is not waited for"
    fleet.run("delete", "env", f"{name}-s").ok()


def test_diff_says_what_would_change_and_how(fleet: Fleet, ready: str) -> None:
    same = fleet.run("diff", "-f", "-", stdin=manifest(ready))
    assert (same.code, same.out) == (0, "")
    other = fleet.run("diff", "-f", "-", stdin=manifest(ready).replace("256Mi", "512Mi"))
    assert other.code == 3
    assert "spec.memory.size" in other.out
    assert "(restart)" in other.out
    plain = fleet.run("diff", "-f", "-", "-o", "json", stdin=manifest(ready).replace("256Mi", "512Mi"))
    assert plain.code == 3
    change = json.loads(plain.out)[0]["changes"][0]
    assert (change["before"], change["after"], change["effect"]) == ("256Mi", "512Mi", "restart")


def test_every_form_of_get(fleet: Fleet, ready: str) -> None:
    table = fleet.run("get", "env", ready).ok().splitlines()
    assert table[0].split()[:3] == ["NAME", "PHASE", "READY"]
    assert table[1].split()[:3] == [ready, "Ready", "1/1"]
    assert len(fleet.run("get", "env", ready, "-o", "wide").ok().splitlines()[0]) > len(table[0])
    assert fleet.run("get", "env", ready, "-o", "name").ok() == f"environment/{ready}\n"
    assert json.loads(fleet.run("get", "env", ready, "-o", "json").ok())["metadata"]["name"] == ready
    assert yaml.safe_load(fleet.run("get", "env", ready, "-o", "yaml").ok())["spec"]["memory"]["size"] == "256Mi"
    assert fleet.run("get", "env", ready, "-o", "jsonpath={.status.phase}").ok() == "Ready\n"
    listed = json.loads(fleet.run("get", "instances", "--of", ready, "-o", "json").ok())
    assert [i["metadata"]["name"] for i in listed["items"]] == [f"{ready}-0"]
    everything = fleet.run("get", "all").ok()
    for text in (f"environment/{ready}", f"instance/{ready}-0", f"pod/{ready}-0.web", "image/hello", "network/default"):
        assert text in everything


def test_what_get_prints_can_be_applied_again(fleet: Fleet, ready: str) -> None:
    for form in ("yaml", "json"):
        text = fleet.run("get", "env", ready, "-o", form).ok()
        assert fleet.run("apply", "-f", "-", stdin=text).ok() == f"environment/{ready} unchanged\n"


def test_selectors(fleet: Fleet, name: str) -> None:
    fleet.run("apply", "-f", "-", stdin=manifest(name, app="picked")).ok()
    assert fleet.run("get", "env", "-l", "app=picked", "-o", "name").ok() == f"environment/{name}\n"
    none = fleet.run("get", "env", "-l", "app=nobody")
    assert (none.code, none.out) == (0, "")
    assert "there are no environments" in none.err
    assert fleet.run("get", "env", "-l", "app in (").code == 1


def test_a_missing_name_is_told_beside_those_that_are_there(fleet: Fleet, ready: str) -> None:
    done = fleet.run("get", "env", ready, "nobody")
    assert done.code == 4
    assert ready in done.out
    assert "nobody" in done.err


def test_label(fleet: Fleet, ready: str) -> None:
    assert fleet.run("label", "env", ready, "tier=web").ok() == f"environment/{ready} labelled\n"
    refused = fleet.run("label", "env", ready, "tier=db")
    assert refused.code == 1
    assert "--overwrite" in refused.err
    fleet.run("label", "env", ready, "tier=db", "--overwrite").ok()
    assert fleet.run("get", "env", ready, "-o", "jsonpath={.metadata.labels.tier}").ok() == "db\n"
    fleet.run("label", f"env/{ready}", "tier-").ok()
    assert fleet.run("get", "env", ready, "-o", "jsonpath={.metadata.labels.tier}").ok() == "\n"


def test_annotate(fleet: Fleet, ready: str) -> None:
    said = fleet.run("annotate", "env", ready, "casemate.example/owner=the ran team").ok()
    assert said == f"environment/{ready} annotated\n"
    refused = fleet.run("annotate", "env", ready, "casemate.example/owner=others")
    assert refused.code == 1 and "--overwrite" in refused.err
    found = json.loads(fleet.run("get", "env", ready, "-o", "json").ok())["metadata"]["annotations"]
    assert found == {"casemate.example/owner": "the ran team"}
    fleet.run("annotate", f"env/{ready}", "casemate.example/owner-").ok()
    assert "annotations" not in json.loads(fleet.run("get", "env", ready, "-o", "json").ok())["metadata"]


def editor(folder: Path, program: str) -> str:
    path = folder / "editor"
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    return str(path)


def test_edit(fleet: Fleet, ready: str, tmp_path: Path) -> None:
    kept = editor(tmp_path, "true")
    assert "is unchanged" in fleet.run("edit", "env", ready, EDITOR=kept).err
    changed = editor(tmp_path, "sed -i 's/priority: .*//; s/^spec:/spec:\\n  priority: 7/' \"$1\"")
    assert fleet.run("edit", "env", ready, EDITOR=changed).ok() == f"environment/{ready} changed\n"
    assert fleet.run("get", "env", ready, "-o", "jsonpath={.spec.priority}").ok() == "7\n"


def test_an_edit_that_is_refused_is_kept(fleet: Fleet, ready: str, tmp_path: Path) -> None:
    broken = editor(tmp_path, 'grep -q cuont "$1" || sed -i \'s/count:/cuont:/\' "$1"')
    done = fleet.run("edit", "env", ready, EDITOR=broken, TMPDIR=str(tmp_path))
    assert done.code == 1
    assert "cuont" in done.err
    path = Path(done.err.partition("is kept in ")[2].splitlines()[0])
    assert "cuont" in path.read_text()


def test_stop_and_start(fleet: Fleet, ready: str) -> None:
    assert fleet.run("stop", ready, "--wait", "--timeout", "30s").ok() == f"environment/{ready} will be stopped\n"
    assert fleet.run("get", "env", ready, "-o", "jsonpath={.status.phase}").ok() == "Stopped\n"
    assert "is unchanged" in fleet.run("stop", ready).ok()
    fleet.run("start", ready, "--wait", "--timeout", "30s").ok()
    fleet.run("wait", f"env/{ready}", "--for", "condition=Ready", "--timeout", "30s").ok()


def test_describe_tells_the_story(fleet: Fleet, ready: str) -> None:
    story = fleet.run("describe", "env", ready).ok()
    for text in (ready, "Spec:", "Status:", "Instances:", f"{ready}-0", "Pods:", "Events:", "asked for it", "GuestUp"):
        assert text in story
    assert f"{ready}-0" in fleet.run("describe", "inst", f"{ready}-0").ok()
    host = fleet.run("get", "inst", f"{ready}-0", "-o", "jsonpath={.spec.host}").ok().strip()
    told = fleet.run("describe", f"host/{host}").ok()
    assert f"{ready}-0" in told
    assert re.search(r"^  Virtualisation +True .*Simulated: guests are simulated", told, re.MULTILINE)
    assert all(f"\n  {kind} " in told for kind in ("Hypervisor", "Network", "DiskSpace"))


def test_events(fleet: Fleet, ready: str) -> None:
    table = fleet.run("events", f"env/{ready}").ok()
    assert f"instance/{ready}-0" in table
    lines = [json.loads(line) for line in fleet.run("events", "env", ready, "-o", "json").ok().splitlines()]
    assert all(line["reason"] for line in lines)


def test_logs(fleet: Fleet, ready: str) -> None:
    done = fleet.run("logs", ready)
    assert done.code == 0, done.err
    assert fleet.run("logs", f"{ready}-0.web", "--tail", "1", "--timestamps", "--prefix").code == 0
    missing = fleet.run("logs", ready, "-c", "nobody")
    assert missing.code == 4


def test_why(fleet: Fleet, ready: str, name: str) -> None:
    told = fleet.run("why", ready).ok()
    assert told.startswith(f"instance {ready}-0 is placed on ")
    assert "CPUs of the pool of cell 0" in told and "Other hosts:" in told
    missing = fleet.run("why", "nobody")
    assert missing.code == 4 and "Environment 'nobody' not found" in missing.err


def test_what_fits_nowhere_is_explained_with_exit_2(fleet: Fleet, name: str) -> None:
    fleet.run("apply", "-f", "-", stdin=manifest(name).replace("256Mi", "4Ti")).ok()
    done = fleet.run("why", name)
    assert done.code == 2
    assert f"none of {HOSTS} hosts" in done.out
    plain = json.loads(fleet.run("why", f"env/{name}", "-o", "json").out)
    assert plain.get("placed", False) is False
    late = fleet.run("wait", f"env/{name}", "--for", "ready", "--timeout", "1s")
    assert late.code == 6
    assert "did not reach" in late.err


def test_cordon(fleet: Fleet) -> None:
    host = fleet.run("get", "hosts", "-o", "jsonpath={.items[0].metadata.name}").ok().strip()
    try:
        assert fleet.run("cordon", host).ok() == f"host/{host} cordoned\n"
        assert "Cordoned" in fleet.run("host", "list").ok()
        assert "already" in fleet.run("cordon", f"host/{host}").ok()
    finally:
        assert fleet.run("uncordon", host).ok() == f"host/{host} uncordoned\n"


def test_prune_deletes_only_what_is_selected_and_not_applied(fleet: Fleet, name: str) -> None:
    other = f"{name}-b"
    both = manifest(name, app=name) + "---\n" + manifest(other, app=name)
    fleet.run("apply", "-f", "-", stdin=both).ok()
    one = manifest(name, app=name)
    would = fleet.run("apply", "-f", "-", "--prune", "-l", f"app={name}", "--dry-run", stdin=one).ok()
    assert f"environment/{other} pruned (dry run)" in would
    done = fleet.run("apply", "-f", "-", "--prune", "-l", f"app={name}", stdin=one).ok()
    assert f"environment/{name} unchanged" in done
    assert f"environment/{other} pruned" in done
    fleet.run("wait", f"env/{other}", "--for", "delete", "--timeout", "30s").ok()
    assert fleet.run("get", "env", "-l", f"app={name}", "-o", "name").ok() == f"environment/{name}\n"


def test_volumes_are_among_all_and_are_pruned_after_who_uses_them(fleet: Fleet, name: str) -> None:
    volume = f"apiVersion: casemate/v1\nkind: Volume\nmetadata: {{name: {name}-v, labels: {{app: {name}}}}}\nspec: {{size: 64Mi}}\n"
    fleet.run("apply", "-f", "-", stdin=manifest(name, app=name) + "---\n" + volume).ok()
    assert f"volume/{name}-v" in fleet.run("get", "all").ok()
    kept = fleet.run("apply", "-f", "-", "--prune", "-l", f"app={name}", stdin=volume).ok()
    assert f"environment/{name} pruned" in kept and f"volume/{name}-v pruned" not in kept
    fleet.run("wait", f"env/{name}", "--for", "delete", "--timeout", "30s").ok()
    fleet.run("apply", "-f", "-", stdin=manifest(name, app=name)).ok()
    done = fleet.run("apply", "-f", "-", "--prune", "-l", f"app={name}", stdin=manifest(name, app=name)).ok()
    assert f"volume/{name}-v pruned" in done
    fleet.run("wait", f"volume/{name}-v", "--for", "delete", "--timeout", "30s").ok()


def test_delete_by_file_waits_until_it_is_gone(fleet: Fleet, name: str) -> None:
    fleet.run("apply", "-f", "-", stdin=manifest(name)).ok()
    fleet.run("delete", "-f", "-", stdin=manifest(name)).ok()
    assert fleet.run("get", "env", name).code == 4
    assert fleet.run("delete", "env", name).code == 4
    fleet.run("delete", "env", name, "--ignore-not-found").ok()


def test_watch_shows_changes_and_ends_well(fleet: Fleet, name: str) -> None:
    child = fleet.start("get", "env", "-l", f"app={name}", "-w", "-o", "json")
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        fleet.run("apply", "-f", "-", stdin=manifest(name, app=name)).ok()
        first = json.loads(child.stdout.readline())
        assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", name)
        while first["object"]["status"].get("phase") != "Ready":
            first = json.loads(child.stdout.readline())
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.communicate()


def test_another_tenant_sees_nothing_of_it(fleet: Fleet, ready: str) -> None:
    assert fleet.run("get", "env", ready, "--tenant", "other").code == 4
    assert ready not in fleet.run("get", "env", "--tenant", "other", "-o", "name").ok()
    assert ready in fleet.run("get", "env", "-A").ok()
    assert fleet.run("get", "env", "-A").ok().startswith("TENANT")


def test_version(fleet: Fleet) -> None:
    told = json.loads(fleet.run("version", "-o", "json").ok())
    assert told["client"] == told["manager"]
    assert told["epoch"] >= 1


def test_live_names_are_completed(fleet: Fleet, ready: str) -> None:
    def complete(*words: str) -> list[str]:
        done = fleet.run(
            _CASEMATE_COMPLETE="bash_complete", COMP_WORDS="casemate " + " ".join(words), COMP_CWORD=str(len(words))
        )
        return [line.partition(",")[2] for line in done.out.splitlines()]

    assert "get" in complete("g")
    assert "environments" in complete("get", "env")
    assert complete("get", "env", ready[:4]) == [ready]
    assert complete("describe", f"env/{ready[:4]}") == [f"env/{ready}"]
    assert complete("logs", ready[:4]) == [ready, f"{ready}-0"]


def test_completion_is_silent_without_a_manager(fleet: Fleet) -> None:
    started_s = time.monotonic()
    done = fleet.run(
        CASEMATE_MANAGER="127.0.0.1:1",
        _CASEMATE_COMPLETE="bash_complete",
        COMP_WORDS="casemate get env x",
        COMP_CWORD="3",
    )
    assert (done.out.strip(), done.err) == ("", "")
    assert time.monotonic() - started_s < 60


def test_dev_status_and_a_second_up(fleet: Fleet) -> None:
    where = ("--dir", str(fleet.folder / "dev"))
    told = json.loads(fleet.run("dev", "status", "-o", "json", *where).ok())
    assert told["hostsReady"] == HOSTS
    started_s = time.monotonic()
    again = fleet.run("dev", "up", "--no-example", *where)
    again.ok()
    assert time.monotonic() - started_s < 120
    for name, measured in (("manager", "casemate_hosts"), ("agent", "libvirt_up")):
        url = told[f"{name}Metrics"]
        assert f"metrics of the {name}: {url}" in again.err
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert f"\n{measured}{{" in answer.read().decode()
    assert json.loads(fleet.run("dev", "status", "-o", "json", *where).ok())["managerPid"] == told["managerPid"]
    other = fleet.run("dev", "up", "--simulated", "9", *where)
    assert other.code == 1
    assert "dev down" in other.err


def test_an_up_that_is_interrupted_is_ended_by_down(fleet: Fleet, tmp_path: Path) -> None:
    from casemate_cli.dev import processes
    from casemate_cli.dev.state import Folder
    from support.fleet import free_port

    folder = Folder(tmp_path / "dev")
    where = ("--dir", str(folder.root))
    child = fleet.start("dev", "up", "--simulated", "2", "--port", str(free_port()), *where)
    try:
        give_up_s = time.monotonic() + 60
        while not (folder.pids / "manager.json").exists():
            assert time.monotonic() < give_up_s
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130, err
    assert "interrupted" in err
    assert processes.marked(folder)
    fleet.run("dev", "down", *where).ok()
    assert processes.marked(folder) == []
    assert not folder.root.exists()
    assert "no fleet lives" in fleet.run("dev", "down", *where).err


def test_output_into_a_closed_pipe_is_no_error(fleet: Fleet, ready: str) -> None:
    program = f"{sys.executable} -m casemate_cli get env -o yaml | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", program], env=dict(fleet.environ), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_support_bundle_names_what_it_holds(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    told = fleet.run("support-bundle", "-o", str(path), timeout_s=120)
    assert told.ok() == f"{path}\n"
    assert f"{HOSTS} of {HOSTS} hosts" in told.err
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"summary.json", "manager/objects/Host.json", "manager/log.txt"} <= names
    assert len({name for name in names if name.endswith("/doctor.json")}) == HOSTS
    again = fleet.run("support-bundle", "-o", str(path))
    assert again.code == 1
    assert "is there already" in again.err
    unknown = fleet.run("support-bundle", "--host", "nobody", "-o", str(tmp_path / "c.tar.gz"))
    assert unknown.code == 4
    assert [each.name for each in tmp_path.iterdir()] == ["b.tar.gz"]


def test_a_host_without_functions_has_nothing_left_of_anybody(fleet: Fleet) -> None:
    assert fleet.run("fsck", "host", "sim-1").ok() == "0 virtual functions, 0 devices, 0 free\n"
    repaired = fleet.run("fsck", "host", "host/sim-1", "--repair", "-o", "json")
    assert json.loads(repaired.ok()) == {}
    audit = fleet.run("audit", "-o", "json").ok()
    assert '"fsck"' in audit and "host/sim-1" in audit
    unknown = fleet.run("fsck", "host", "nobody")
    assert unknown.code == 4
