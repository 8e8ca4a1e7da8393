"""`casemate dev`: a private fleet on this machine."""

import click


@click.group()
def dev() -> None:
    """A private fleet on this machine: a manager, an agent or simulated hosts, a private libvirtd."""
