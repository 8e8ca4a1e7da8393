"""What the tests of the command line share: a fleet of processes."""

from support.fleet import fleet

__all__ = ["fleet"]
