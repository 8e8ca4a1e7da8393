"""Pods: what runs is made equal to what is wanted."""

from __future__ import annotations

import json
import os
import time
from binascii import crc32

from .children import Ended
from .containers import BACKOFF_FIRST_S, BACKOFF_FORGET_S, Container, Pod, backoff, restarts_after
from .files import log, read_text, size_of
from .frames import MAX_TEXT
from .kernel import IN_CLOSE_WRITE, IN_MODIFY, IN_MOVED_TO, IN_ONESHOT
from .logs import trim_log
from .needs import Lacking, Needs
from .nics import PodNics
from .podman import Podman
from .readiness import Readiness
from .secrets import SecretFiles, secret_volumes, take_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .frames import Message
    from .helper import Helper

LOG_TRIM_EVERY_S = 10.0


class Pods:
    """Makes what runs equal to what is wanted."""

    def __init__(self, helper: Helper) -> None:
        self.helper, self.loop, self.paths = helper, helper.loop, helper.paths
        self.pods: dict[str, Pod] = {}
        self.needs = Needs(self)
        self.revision = ""
        self.nics = PodNics(self.loop, self.paths)
        self.loaded: dict[str, list[str]] = {}  # fingerprint of an archive -> names of the images that came from it
        self._by_id: dict[str, tuple[Pod, Container]] = {}
        self._early_exits: dict[str, tuple[int, float]] = {}  # of containers whose id is not known yet
        self.podman = Podman(self.loop, self.paths.podman)
        self.secrets = SecretFiles(self.paths.secrets)
        self.readiness = Readiness(self)
        os.makedirs(self.paths.exits, exist_ok=True)
        helper.inotify.add(self.paths.exits, IN_MOVED_TO | IN_CLOSE_WRITE, self._exit_file)

    # What is kept on disk.

    def save(self) -> None:
        """Write what must outlive the helper."""
        state = {
            "boot": self.helper.boot_id,
            "revision": self.revision,
            "loaded": self.loaded,
            "pods": [
                {
                    "manifest": pod.wanted,
                    "playing": pod.playing,
                    "infra": pod.infra,
                    "address": pod.address,
                    "started": pod.started,
                    "containers": {
                        c.name: {field: getattr(c, field) for field in Container.SAVED} for c in pod.containers.values()
                    },
                }
                for pod in self.pods.values()
                if pod.wanted is not None
            ],
        }
        path = self.paths.state
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)

    def restore(self) -> None:
        """Take up what the last helper left, in this boot of the guest or an earlier one."""
        text = read_text(self.paths.state, 16 << 20)
        if not text:
            return
        try:
            state = json.loads(text)
            self.revision, self.loaded = str(state["revision"]), dict(state["loaded"])
            for entry in state["pods"]:
                pod = Pod(entry["manifest"]["metadata"]["name"], self.loop)
                pod.wanted, pod.playing, pod.address = entry["manifest"], entry["playing"], entry["address"]
                pod.started, pod.maybe_there, pod.infra = entry["started"], True, str(entry.get("infra", ""))
                for name, saved in entry["containers"].items():
                    container = pod.containers[name] = Container(name, saved["image"])
                    for field in Container.SAVED:
                        if field in saved:  # an older helper knew fewer
                            setattr(container, field, saved[field])
                    if container.id:
                        self._by_id[container.id] = (pod, container)
                self.pods[pod.name] = pod
        except (ValueError, KeyError, TypeError) as error:
            log(f"the saved state is unreadable, the host will send it again: {error!r}")
            self.pods.clear()
            return
        if any(self.secrets.lacks(pod) for pod in self.pods.values()):
            self.revision = ""  # the host gives them once more
        rebooted = state.get("boot") != self.helper.boot_id
        for pod in self.pods.values():
            self.loop.start(self._adopt(pod, rebooted))

    async def _adopt(self, pod: Pod, rebooted: bool) -> None:
        """Compare a restored pod with what podman has, then look after it as after any other."""
        known = [c for c in pod.containers.values() if c.id]
        if rebooted:
            for container in known:
                if container.state != "terminated" or container.restart_at:
                    self._ended(pod, container, 137, "GuestRebooted", look=False)
        elif known:
            facts = await self.podman.inspect([c.id for c in known])
            for container in known:
                fact = facts.get(container.id)
                if fact is None:
                    pod.playing = ""  # somebody removed it: play the pod anew
                    continue
                if fact["State"]["Running"]:
                    container.state, container.reason = "running", ""
                    self.readiness.watch(pod, container)
                elif container.state == "running":
                    self._ended(pod, container, int(fact["State"]["ExitCode"]), look=True)
                elif container.state == "waiting":
                    container.restart_at = time.monotonic()
        await self.work(pod)

    # From the host.

    def apply(self, manifests: list[Message], revision: str) -> None:
        """Make these the pods of the guest. Raises ValueError for what is no list of pods."""
        wanted: dict[str, Message] = {}
        for manifest in manifests:
            try:
                name = manifest["metadata"]["name"]
                valid = isinstance(name, str) and name and all(c.isalnum() or c in "-." for c in name)
                if not valid or not manifest["spec"]["containers"]:
                    raise ValueError(f"bad pod {name!r}")
            except (KeyError, TypeError) as error:
                raise ValueError(f"not a pod: {error!r}") from error
            wanted[name] = manifest
        files = {name: take_files(manifest) for name, manifest in wanted.items()}
        if len(wanted) != len(manifests) or len(wanted) > 256:
            raise ValueError("pods need names of their own, and are at most 256")
        for name, pod in self.pods.items():
            if name not in wanted and pod.wanted is not None:
                pod.wanted = None
                pod.reason = "Terminating"
                pod.wake.set()
        for name, manifest in wanted.items():
            known = self.pods.get(name)
            if known is None:
                known = self.pods[name] = Pod(name, self.loop)
                known.wanted, known.files = manifest, files[name]
                self.loop.start(self.work(known))
                continue
            known.files = files[name]
            if known.wanted == manifest:
                if known.files and self.secrets.lacks(known):
                    self.secrets.write(known)
                known.wake.set()
            else:
                known.wanted, known.reason, known.retry_at, known.failures = manifest, "", 0.0, 0
                known.wake.set()
        self.revision = revision
        self.changed()

    async def load(self, device: str) -> Ended:
        """Load the images of an archive disk, once for the same contents."""
        digest = await self._fingerprint(device)
        if digest in self.loaded:
            return Ended(0, b"", b"")
        ended = await self.podman.run(["load", "--quiet", "--input", device])
        if ended.code == 0:
            lines = ended.out.decode(errors="replace").splitlines()
            self.loaded[digest] = [line.partition(":")[2].strip() for line in lines if line.startswith("Loaded image")]
            self.save()
        return ended

    async def _fingerprint(self, device: str) -> str:
        """Length and checksum of a disk: enough to know again what was loaded before. Raises OSError."""
        check, length = 0, 0
        with open(device, "rb", buffering=0) as file:  # noqa: ASYNC230 (this loop has no other way)
            while block := file.read(1 << 20):
                check, length = crc32(block, check), length + len(block)
                await self.loop.sleep(0.0)  # others have their turn
        return f"{length}-{check:08x}"

    def changed(self, save: bool = True) -> None:
        """A pod's state is not what it was."""
        if save:
            self.save()
        self.helper.pods_changed()

    def settle(self) -> None:
        """Release the rest of the boot once no pod is about to be played for the first time."""
        if not any(pod.wanted is not None and not pod.playing and not pod.failures for pod in self.pods.values()):
            self.helper.release_boot()

    # Containers by name and identity.

    def process_of(self, container_id: str) -> Message:
        """The process that a container was started with: user, environment, capabilities, folder. Raises OSError."""
        found = self._by_id[container_id][1]
        with open(f"{os.path.dirname(found.log_path)}/config.json", encoding="utf-8") as file:
            process: Message = json.load(file)["process"]
        return process

    def pid_of(self, container: Container) -> int:
        """The first process of a container that runs, by the runtime's own record. Raises LookupError."""
        if container.state != "running":
            raise LookupError(f"container {container.name} is {container.state}")
        try:
            return int(json.loads(read_text(f"{self.paths.crun_state}/{container.id}/status"))["pid"])
        except (ValueError, KeyError, TypeError) as error:
            raise LookupError(f"container {container.name} has no process") from error

    def find(self, pod: str, container: str) -> Container:
        """A container by name; the only one where no name is given. Raises LookupError."""
        found = self.pods.get(pod)
        if found is None:
            raise LookupError(f"no pod {pod}")
        if not container and len(found.containers) == 1:
            return next(iter(found.containers.values()))
        if container not in found.containers:
            raise LookupError(f"pod {pod} has no container {container}, but {', '.join(found.containers)}")
        return found.containers[container]

    # One pod.

    async def work(self, pod: Pod) -> None:
        """Look after one pod until it is wanted no longer and gone."""
        while True:
            # Both are texts of JSON made by us, so that they compare by value and are kept as they are.
            wanted = "" if pod.wanted is None else json.dumps(pod.wanted, sort_keys=True)
            now = time.monotonic()
            blocked = "" if pod.wanted is None else self.helper.volumes.problem(pod.wanted)
            if not blocked and pod.reason == "VolumeNotMounted":
                pod.reason, pod.message, pod.failures = "", "", 0
                self.changed()
            if blocked:
                # Without its volume it would write into a folder of the root disk.
                if (pod.reason, pod.message) != ("VolumeNotMounted", blocked):
                    pod.reason, pod.message, pod.failures = "VolumeNotMounted", blocked, pod.failures + 1
                    self.changed()
                    self.settle()
                await pod.wake.wait(None)
                continue
            if pod.wanted is None:
                if await self._remove(pod):
                    break
                pod.retry_at = time.monotonic() + BACKOFF_FIRST_S
            elif self.secrets.lacks(pod) and not pod.files:
                pod.reason, pod.message = "SecretsMissing", "the host has not given its secrets yet, since this boot"
                self.changed()
                await pod.wake.wait(None)
                pod.reason, pod.message = "", ""
                continue
            elif wanted != pod.playing and now >= pod.retry_at:
                await self._play(pod, wanted)
                continue
            due = [c for c in pod.containers.values() if c.restart_at and c.restart_at <= now]
            if due and wanted == pod.playing:
                for container in due:
                    await self._start(pod, container)
                continue
            times = [c.restart_at for c in pod.containers.values() if c.restart_at]
            if wanted != pod.playing:
                times = [pod.retry_at]
            await pod.wake.wait(max(0.0, min(times) - time.monotonic()) if times else None)
        if self.pods.get(pod.name) is pod:
            del self.pods[pod.name]
        self.changed()

    async def _remove(self, pod: Pod) -> bool:
        if pod.maybe_there:
            grace = int(pod.spec().get("terminationGracePeriodSeconds", 10))
            ended = await self.podman.run(["pod", "rm", "--force", "--ignore", "--time", str(grace), pod.name])
            if ended.code != 0:
                pod.reason, pod.message = "RemoveFailed", ended.reason()
                self.changed()
                return False
            if problem := await self.nics.take_back(pod.name):
                self.helper.note(pod.name, "", "NicNotBack", problem, "Warning")
        self._forget(pod)
        await self.needs.take_back(pod)
        return True

    def _forget(self, pod: Pod) -> None:
        for container in pod.containers.values():
            self._by_id.pop(container.id, None)
            self.helper.log_complete(container)
        pod.containers = {}
        pod.playing, pod.maybe_there, pod.infra = "", False, ""
        if pod.wanted is None:
            self.secrets.remove(pod)

    async def _play(self, pod: Pod, wanted: str) -> None:
        if pod.maybe_there and not await self._remove(pod):
            pod.retry_at = time.monotonic() + BACKOFF_FIRST_S
            return
        manifest = json.loads(wanted)
        spec = manifest["spec"]
        if pod.files and pod.wanted is not None and json.dumps(pod.wanted, sort_keys=True) == wanted:
            try:
                self.secrets.write(pod)
            except (OSError, ValueError, KeyError, TypeError) as error:
                pod.failures += 1
                pod.retry_at = time.monotonic() + max(BACKOFF_FIRST_S, backoff(pod.failures))
                pod.reason, pod.message = "SecretFilesFailed", f"{type(error).__name__}"
                self.helper.note(pod.name, "", pod.reason, pod.message, "Warning")
                self.changed()
                self.settle()
                return
        if not secret_volumes(manifest):
            self.secrets.remove(pod)
        self.secrets.mount(pod, spec)
        pod.containers = {c["name"]: Container(c["name"], c.get("image", "")) for c in spec["containers"]}
        pod.maybe_there = True
        self.changed()
        # The helper restarts and probes by the rules of Kubernetes; podman's own rules are others.
        spec["restartPolicy"] = "Never"
        for container in spec["containers"]:
            for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                container.pop(probe, None)
        try:
            ended = await self._begin(pod, manifest)
        except Lacking as lack:
            self._not_played(pod, lack.reason, str(lack))
            return
        if ended.code != 0:
            self._not_played(pod, "PlayFailed", ended.reason())
            return
        names = [f"{pod.name}-{c}" for c in pod.containers]
        facts = await self.podman.inspect([*names, pod.infra] if pod.infra and not spec.get("hostNetwork") else names)
        pod.playing, pod.reason, pod.message, pod.failures = wanted, "", "", 0
        pod.started = time.time()
        for fact in facts.values():
            name = str(fact.get("Name", "")).removeprefix(f"{pod.name}-")
            container = pod.containers.get(name)
            if container is None:
                networks = (fact.get("NetworkSettings") or {}).get("Networks") or {}
                addresses = [n.get("IPAddress") for n in networks.values() if isinstance(n, dict)]
                pod.address = next((str(a) for a in addresses if a), pod.address)
                continue
            container.id = str(fact["Id"])
            container.log_path = str(fact["HostConfig"]["LogConfig"]["Path"])
            container.started, container.starts = time.time(), [0]
            container.state, container.reason = "running", ""
            self._by_id[container.id] = (pod, container)
            self._guard_log(container)
            early = self._early_exits.pop(container.id, None)
            if early is not None:
                self._ended(pod, container, early[0], look=True)
            elif not fact["State"]["Running"]:
                self._ended(pod, container, int(fact["State"]["ExitCode"]), look=True)
        for container in pod.containers.values():
            if container.state == "running":
                self.needs.started(pod, container)
                self.readiness.watch(pod, container)
        self.changed()
        self.settle()

    async def _begin(self, pod: Pod, manifest: Message) -> Ended:
        """Have podman make and start a pod. Its own interfaces are in its network, and CPUs of their own set on its
        containers, before the first of them starts. Raises Lacking."""
        nics, pinned = self.nics.of(pod.name), await self.needs.give(pod, manifest)
        words = ["kube", "play", "--quiet", *(["--start=false"] if nics or pinned else []), "-"]
        ended = await self.podman.run(words, json.dumps(manifest).encode())
        if ended.code != 0:
            return ended
        words = ended.out.decode(errors="replace").split()
        pod.infra = f"{words[words.index('Pod:') + 1][:12]}-infra" if "Pod:" in words[:-1] else ""
        if not nics and not pinned:
            return ended
        if problem := await self._give_nics(pod):
            return Ended(1, b"", problem.encode())
        if (unpinned := await self.needs.pin(pod)) is not None:
            return unpinned
        started = await self.podman.run(["pod", "start", pod.name])
        return ended if started.code == 0 else started

    async def _give_nics(self, pod: Pod) -> str:
        """Have a pod's network, and its interfaces in it; why not, or nothing."""
        if not self.nics.of(pod.name):
            return ""
        ended = await self.podman.run(["start", pod.infra])
        if ended.code != 0:
            return f"the network of pod {pod.name}: {ended.reason()}"
        for fact in (await self.podman.inspect([pod.infra])).values():
            return await self.nics.give(pod.name, int(fact["State"]["Pid"]))
        return f"the network of pod {pod.name} is gone"

    def _not_played(self, pod: Pod, reason: str, message: str) -> None:
        pod.failures += 1
        pod.retry_at = time.monotonic() + max(BACKOFF_FIRST_S, backoff(pod.failures))
        pod.reason, pod.message = reason, message
        self.helper.note(pod.name, "", reason, message, "Warning")
        self.changed()
        self.settle()

    async def _start(self, pod: Pod, container: Container) -> None:
        if problem := await self._give_nics(pod):
            # Not without what it was promised: it is tried again as a container that failed to start is.
            self.helper.note(pod.name, container.name, "NicMissing", problem, "Warning")
            container.restart_at = time.monotonic() + BACKOFF_FIRST_S
            container.state, container.reason, container.message = "waiting", "NicMissing", problem[:MAX_TEXT]
            self.changed()
            return
        container.restart_at = 0.0
        try:
            await self.needs.again(pod)
        except Lacking as lack:
            self.helper.note(pod.name, container.name, lack.reason, str(lack), "Warning")
            self._ended(pod, container, 128, lack.reason)
            return
        container.starts = [*container.starts, size_of(container.log_path)][-8:]
        self._early_exits.pop(container.id, None)
        container.restarts += 1
        container.state, container.reason = "running", ""
        container.started = time.time()
        # podman's own clean-up after the last run may be under way still, and then the start fails: once more, and again.
        for pause_s in (1.0, 3.0, 0.0):
            ended = await self.podman.run(["start", container.id])
            if pod.wanted is None or container.state != "running":
                return  # it has ended again already, which was seen
            if ended.code == 0:
                break
            log(f"podman start {pod.name}/{container.name}: {ended.reason()}")
            if pause_s:
                await self.loop.sleep(pause_s)
        else:
            self.helper.note(pod.name, container.name, "StartFailed", ended.reason(), "Warning")
            self._ended(pod, container, 128, "StartFailed")
            return
        container.message = ""
        self.needs.started(pod, container)
        self.readiness.watch(pod, container)
        self.helper.note(pod.name, container.name, "ContainerRestarted", f"restart {container.restarts}")
        self.changed()

    # The end of a container.

    def _exit_file(self, name: str) -> None:
        text = read_text(f"{self.paths.exits}/{name}", 16).strip()
        if not text.lstrip("-").isdigit():
            return  # it is being written under another name, or was read and removed by podman
        found = self._by_id.get(name)
        if found is None:
            self._early_exits[name] = (int(text), time.time())
            while len(self._early_exits) > 256:
                del self._early_exits[next(iter(self._early_exits))]
        elif found[1].state == "running":
            self._ended(*found, int(text), look=True)

    def _ended(self, pod: Pod, container: Container, code: int, reason: str = "", look: bool = False) -> None:
        """A container has ended: say so, and decide whether and when it is started again."""
        now = time.time()
        if now - container.started > BACKOFF_FORGET_S:
            container.failures = 0
        container.failures += 1
        container.finished, container.exit_code, container.ready = now, code, False
        if look and os.path.exists(f"{os.path.dirname(container.log_path)}/oom"):
            reason = "OOMKilled"
        last = reason or ("Completed" if code == 0 else "Error")
        container.state, container.reason = "terminated", last
        if pod.wanted is not None and restarts_after(pod.spec().get("restartPolicy", "Always"), code):
            delay = 0.0 if reason == "GuestRebooted" else backoff(container.failures)
            container.restart_at = time.monotonic() + max(delay, 0.001)
            if delay:
                container.state, container.reason = "waiting", "CrashLoopBackOff"
                container.message = f"{last} with exit code {code}; next start in {delay:.0f} s"
        if container.over():
            self.helper.log_complete(container)
        severity = "Normal" if code == 0 else "Warning"
        self.helper.note(pod.name, container.name, "ContainerExited", f"{last} with exit code {code}", severity)
        self.changed()
        pod.wake.set()

    # Logs stay within bounds.

    def _guard_log(self, container: Container) -> None:
        def changed(_: str) -> None:
            end, lines = trim_log(container.log_path)
            if end:
                container.trimmed = [*container.trimmed, (end, lines)][-64:]
                self.save()
            if container.id in self._by_id:
                self.loop.after(LOG_TRIM_EVERY_S, watch)

        def watch() -> None:
            if container.id in self._by_id:
                self.helper.inotify.add(container.log_path, IN_MODIFY | IN_ONESHOT, changed)

        watch()
