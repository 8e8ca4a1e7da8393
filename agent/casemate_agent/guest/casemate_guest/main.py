"""The helper as a process."""

from __future__ import annotations

import os
import select
import signal

from .files import Paths, log


def main(arguments: list[str]) -> int:
    """Run until SIGTERM. Arguments are ``name=value``: root, podman, crun, socket; all for tests."""
    options = dict(word.partition("=")[::2] for word in arguments)
    # Each of the two loads what it needs, and no more: every module is compiled at every start.
    if "copy" in options:
        from .copying import copy_main

        return copy_main(options)
    from .frames import VERSION
    from .helper import Helper

    paths = Paths(options.get("root", ""), options.get("podman", "podman"), options.get("crun", "crun"))
    helper = Helper(paths)
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(helper.loop, "stopping", True))

    def woken(_: int) -> None:
        os.read(read, 64)

    helper.loop.watch(read, select.EPOLLIN, woken)
    helper.start(options.get("socket", ""))
    log(f"helper {VERSION} runs")
    helper.loop.run()
    return 0
