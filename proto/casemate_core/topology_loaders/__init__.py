"""Ways to a topology: text in, value out, no reading of files.

``line``: one line of text. ``libvirt``: the capabilities XML and files of sysfs, given as text. ``folder``: the layout of
recorded machines.
"""

from casemate_core.topology_loaders.line import BadLine, from_line

__all__ = ["BadLine", "from_line"]
