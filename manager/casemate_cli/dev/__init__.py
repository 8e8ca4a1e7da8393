"""`casemate dev`: a private fleet of one machine, for trying and developing.

Theory of operation. Everything lives in one folder: a record of what the fleet is, the state of its manager and agent, logs,
and for each process a file with its pid and time of start. `up` is a list of steps, each of which first looks whether
what it makes is there already; so a second `up` adopts what runs, and an `up` that was cut off at any point is mended by the
next one. `down` asks the manager to delete the instances, ends the processes in the reverse order of their start, and
removes the folder. Every process carries the folder's path in its environment (`CASEMATE_DEV_DIR`), by which `down` finds
even one whose pid file was never written. No process is ended that is not found by one of the two.

The manager, the agent and the private libvirtd are other programs and are started as such; nothing of them is imported.
"""
