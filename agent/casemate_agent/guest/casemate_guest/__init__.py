"""The Casemate helper: runs an instance's pods inside its guest, and tells the host about them.

What it is for: one process in the guest that turns a set of Kubernetes v1 Pod manifests into running containers (by
``podman kube play``), pushes every change of their state, streams logs, runs commands, and does the few things that a
guest must do for itself (addresses at boot, new processors). Standard library alone, Python 3.9 or later; the agent
delivers it on the seed as one file (:mod:`casemate_agent.guest.archive`), whatever the guest's image, and
``/usr/bin/python3 -I -S -E casemate_guest.py`` is the whole installation. It imports neither asyncio, subprocess nor typing:
on an emulated processor the first two cost a good part of a second each. Names that annotations alone need are imported
under ``TYPE_CHECKING``.

Theory of operation. One thread, one epoll loop, no polling: whatever the helper reacts to wakes it by a descriptor (the
port, a child's pidfd, inotify, netlink) or is a timer that a manifest asked for (a probe, a back-off). Waiting code is
written as coroutines on a loop of a few dozen lines (`Loop`, `Future`). Each pod has one task (`Pods.work`) that makes
what is there equal to what is wanted; podman itself never restarts a container, the helper does, by the rules of
Kubernetes: immediately, then after 10, 20, 40 ... 300 s, forgotten after ten quiet minutes.
The end of a container is read from the file that conmon writes into podman's ``exits`` folder, watched with inotify.
What must outlive the helper is in ``/var/lib/casemate/guest.json``; containers outlive it anyway.

The protocol (docs/guest-protocol.md has the table of messages) runs over the virtio-serial port ``casemate.guest.0``:

* A frame is ``FF <stuffed> FF``. The byte FF occurs nowhere else, so whoever sees it knows that a frame ends or begins:
  a frame that was cut off by a reconnect, and any garbage, is dropped at the next FF. Inside, FE is written FE 01 and
  FF is written FE 02. Unstuffed: CRC-32 of the rest (4 bytes, big-endian), length of the header (2 bytes), header (a
  JSON object), payload (any bytes). At most 65,535 bytes of header and 2 MiB of payload.
* The helper says ``here`` when it starts, so that a host that never left the port knows. The host begins with
  ``hello`` and a session name of its own; the guest answers ``hello`` with the same session, and what it sent before
  that is of an older session and is ignored. The host then asks for ``notes``. A session ends when the host leaves the
  port or says ``hello`` again; its streams end with it, pods do not.
* State goes by level: ``pods`` carries all pods as they are, after ``hello`` and after each change.
* A stream (``logs``, ``exec``) has a number chosen by the host. Payload of streams costs credit that the receiver
  grants, so that no stream holds up another or grows a buffer; control messages cost nothing and are small.
* The position of a log record is its byte offset in the container's log, which only grows, across restarts of the
  container, the helper and the agent. Old parts are given back to the disk as holes; a reader that asks for them is
  told which bytes are gone (``gap``).
"""
