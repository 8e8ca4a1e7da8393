"""Builds the Debian guest image, and the small container that the first example runs.

For: ``python -m casemate_agent.guestimage build --out DIR``. Nothing here runs on a host in production: a fleet imports
images by digest, and this is where the first one comes from.

Theory of operation. `recipe` is data: the suite, the packages, what is masked, the kernel's command line. ``files/``
holds what goes into the root file system and the initial RAM disk, as ordinary files. `build` is the shell: it asks apt
where this machine's mirror is (`mirror`), lets mmdebstrap fetch and verify the packages, lays the files over them, and
packs a disk, a kernel (`kernel`) and an initial RAM disk (`cpio`). `archive` makes the container image. The result is
kept in a folder named after the digest of all inputs, so that a second build finds it by name, and is renamed into
place as a whole, so that a killed build leaves nothing that looks finished.
"""
