"""Probes of readiness."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import time
from collections import deque

from .children import run
from .files import read_text, remove_folder, write_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .containers import Container, Pod
    from .frames import Message
    from .pods import Pods


class Readiness:
    """Whether containers are ready: each that has a probe is asked for as long as a run of it lasts."""

    def __init__(self, pods: Pods) -> None:
        self.pods, self.loop, self.paths = pods, pods.loop, pods.paths

    def watch(self, pod: Pod, container: Container) -> None:
        """A container runs: it is ready, or its probe is begun."""
        specs = [c for c in pod.spec().get("containers", ()) if c["name"] == container.name]
        probe = specs[0].get("readinessProbe") if specs else None
        if not probe:
            container.ready = True
            self.pods.changed(save=False)
        else:
            self.loop.start(self._probe(pod, container, probe))

    async def _probe(self, pod: Pod, container: Container, probe: Message) -> None:
        """Probe a container for as long as this run of it lasts."""
        run_number = container.restarts
        period = max(1.0, float(probe.get("periodSeconds", 10)))
        timeout = max(1.0, float(probe.get("timeoutSeconds", 1)))
        # Sluggish emulated guests need longer than a second to start any process at all.
        timeout = max(timeout, 5.0) if "exec" in probe else timeout
        needed = {True: int(probe.get("successThreshold", 1)), False: int(probe.get("failureThreshold", 3))}
        streak, last = 0, False
        await self.loop.sleep(float(probe.get("initialDelaySeconds", 0)))
        while (
            container.state == "running"
            and container.restarts == run_number
            and pod.containers.get(container.name) is container
        ):
            good = await self._probe_once(pod, container, probe, timeout)
            streak = streak + 1 if good == last else 1
            last = good
            same_run = container.state == "running" and container.restarts == run_number
            if same_run and good != container.ready and streak >= max(1, needed[good]):
                container.ready = good
                self.pods.changed(save=False)
            # Until it is ready for the first time, look once a second: nobody waits ten for a server that starts in two.
            await self.loop.sleep(period if container.ready else min(period, 1.0))

    async def _probe_once(self, pod: Pod, container: Container, probe: Message, timeout_s: float) -> bool:
        if "exec" in probe:
            return await self._probe_command(container, probe["exec"].get("command", ()), timeout_s)
        where = probe.get("httpGet") or probe.get("tcpSocket") or {}
        address = (str(where.get("host") or pod.address), int(where.get("port", 80)))
        with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as peer:
            peer.setblocking(False)
            deadline = time.monotonic() + timeout_s
            if peer.connect_ex(address) not in (0, errno.EINPROGRESS):
                return False
            await self.loop.ready(peer.fileno(), select.EPOLLOUT, timeout_s)
            if peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or time.monotonic() >= deadline:
                return False
            if "httpGet" not in probe:
                return True
            path = str(where.get("path") or "/")
            request = f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n\r\n"
            if any(ord(c) < 32 or ord(c) == 127 for c in path):
                return False
            if where.get("scheme") == "HTTPS":
                return await self._https(peer, request.encode(), deadline)
            peer.sendall(request.encode())
            answer = b""
            while b"\n" not in answer and len(answer) < 4096:
                if not await self.loop.ready(peer.fileno(), select.EPOLLIN, max(0.0, deadline - time.monotonic())):
                    return False
                data = peer.recv(4096)
                if not data:
                    break
                answer += data
            return _good_status(answer)
        return False

    async def _probe_command(self, container: Container, argv: list[str], timeout_s: float) -> bool:
        folder = f"{self.paths.run}/probe-{container.id[:12]}"
        try:
            process = self.pods.process_of(container.id)
            process.update(args=list(argv), terminal=False)
            os.makedirs(folder, mode=0o700, exist_ok=True)
            write_text(f"{folder}/process.json", json.dumps(process))
        except (OSError, LookupError):
            return False
        words = [self.paths.crun, "exec", "--process", f"{folder}/process.json", "--pid-file", f"{folder}/pid"]
        ended = await run(self.loop, [*words, container.id], timeout_s=timeout_s, keep=0)
        if ended.code == 137:  # what ran too long is in the container still, where crun put it
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(read_text(f"{folder}/pid")), signal.SIGKILL)
        remove_folder(folder)
        return ended.code == 0

    async def _https(self, peer: socket.socket, request: bytes, deadline: float) -> bool:
        """A request over TLS; like the kubelet's, it does not check the certificate of the pod in its own guest."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        answer = b""
        with context.wrap_socket(peer, do_handshake_on_connect=False) as channel:
            steps: deque[Callable[[], Any]] = deque([channel.do_handshake, lambda: channel.send(request)])
            while b"\n" not in answer and len(answer) < 4096 and time.monotonic() < deadline:
                events = select.EPOLLIN
                try:
                    if steps:
                        steps[0]()
                        steps.popleft()
                        continue
                    data = channel.recv(4096)
                    if not data:
                        break
                    answer += data
                except ssl.SSLWantReadError:
                    await self.loop.ready(channel.fileno(), events, max(0.0, deadline - time.monotonic()))
                except ssl.SSLWantWriteError:
                    await self.loop.ready(channel.fileno(), select.EPOLLOUT, max(0.0, deadline - time.monotonic()))
        return _good_status(answer)


def _good_status(answer: bytes) -> bool:
    words = answer.split(None, 2)
    return len(words) >= 2 and words[0].startswith(b"HTTP/") and words[1].isdigit() and 200 <= int(words[1]) < 400
