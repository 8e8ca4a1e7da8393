"""The agent's memory on disk.

What may live here: reading and writing of the records of :mod:`casemate_agent.ledger.records`, and the rules by which desired
state enters them. What the records mean for the machine is decided in :mod:`casemate_agent.plan.reconcile`.

Theory of operation. One file for the host (``host.json``), one an instance (``instances/<uid>.json``) and one a GPU
(``gpus/<uuid>.json``), each replaced as a whole: written beside, fsynced, renamed, folder fsynced. A reader therefore finds
the old record or the new one. Each file carries its format's version and a digest of its record; what does not check out is
set aside, reported, and the host is then *not complete*: the manager is asked for a snapshot, and until it comes nothing
unknown is cleaned away. Records of running instances are rebuilt from their domains' metadata meanwhile. Texts of secrets have
files of their own (``private/<uid>.json``), so that a record can be shown and copied; the record has their fingerprints.

An update of desired state is written instance by instance, the host's revision last: killed in between, the agent asks
for the same update again. In memory a record changes only after it is on disk; a write that fails fails the operation.
Everything runs in the event loop's thread but for the system calls, which ``offload`` takes elsewhere.
"""

import asyncio
import errno
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, TypeVar

from casemate_agent.gpu.records import GpuEntry
from casemate_agent.ledger.files import Files
from casemate_agent.ledger.records import (
    RECORD_VERSION,
    Book,
    HostRecord,
    InstanceRecord,
    domain_digest,
)
from casemate_core.errors import CallerError, MachineError
from casemate_core.plain import from_plain, to_plain
from casemate_core.spec.secret import SecretText
from casemate_wire.session import next_counter
from casemate_wire.stream import Desired

log = logging.getLogger("casemate.agent.ledger")

T = TypeVar("T")

#: What a file system says of a file that a power cut or a bad disk has taken from it.
LOST: Final = (errno.EISDIR, errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ELOOP)
Offload = Callable[[Callable[[], Any]], Awaitable[Any]]

HOST_FILE = "host.json"
FOLDER = "instances"
#: Texts of secrets, a file an instance; nowhere else on this host.
PRIVATE = "private"
GPU_FOLDER = "gpus"
_GPU = re.compile(r"[\x21-\x7e]{1,128}\Z", re.ASCII)
_UID = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]{0,63}\Z", re.ASCII)


class StaleEpoch(CallerError):
    """The sender's term is over: this host has heard of a later one."""

    reason = "StaleEpoch"

    def __init__(self, epoch: int, seen: int) -> None:
        self.epoch = epoch
        self.seen = seen
        super().__init__(f"epoch {epoch} is over; this host has seen epoch {seen}")


class LedgerFailed(MachineError):
    """The ledger's disk did not take a write; what was asked was not accepted."""

    reason = "LedgerFailed"


class Damaged(MachineError):
    """A file of the ledger is torn, altered, or of a later release."""

    reason = "LedgerDamaged"


class Lost(Damaged):
    """The file system does not have the file's content any more."""


class Threaded:
    """Runs system calls in one thread of their own, in order. ``close`` lets it go."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")

    async def __call__(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        self._pool.shutdown()


async def inline(call: Callable[[], Any]) -> Any:
    """Runs a call at once: for disks that are memory."""
    return call()


def encode(record: HostRecord | InstanceRecord | GpuEntry) -> bytes:
    """A record as its file: JSON with version and digest."""
    return _encoded(to_plain(record))


def _encoded(plain: Any) -> bytes:
    body = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"version":{RECORD_VERSION},"sha256":"{digest}","record":{body}}}\n'.encode()


def decode(kind: type[T], data: bytes) -> T:
    """The record of a file. Raises Damaged."""
    try:
        return from_plain(kind, _decoded(data), ignore_unknown=True)
    except (ValueError, TypeError, CallerError) as error:
        raise Damaged(f"cannot be read: {error}") from error


def _decoded(data: bytes) -> Any:
    try:
        whole = json.loads(data)
        version, digest, plain = whole["version"], whole["sha256"], whole["record"]
        if not isinstance(version, int) or version > RECORD_VERSION:
            raise Damaged(f"version {version!r} is of a later release")
        body = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            raise Damaged("its digest does not match")
        return plain
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"cannot be read: {error}") from error


class Ledger:
    """The records of one host. Make it with :meth:`load`."""

    def __init__(self, files: Files, offload: Offload, book: Book) -> None:
        self._files = files
        self._offload = offload
        self._host = book.host
        self._instances = dict(book.instances)
        self._gpus = dict(book.gpus)
        self._damage = book.damage
        #: What is on disk of secrets, by instance: fingerprint and text by place.
        self._private = {uid: _texts(record) for uid, record in book.instances.items()}
        self._lock = asyncio.Lock()

    @classmethod
    async def load(cls, files: Files, offload: Offload) -> "Ledger":
        """Read the folder, set damaged files aside, and keep the highest epoch that any record names."""
        book = await offload(lambda: _load(files))
        for problem in book.damage:
            log.warning("ledger damaged: %s", problem)
        return cls(files, offload, book)

    @property
    def book(self) -> Book:
        """The ledger as a value, as it is on disk."""
        return Book(self._host, dict(self._instances), dict(self._gpus), self._damage)

    @property
    def host(self) -> HostRecord:
        return self._host

    def get(self, uid: str) -> InstanceRecord | None:
        return self._instances.get(uid)

    def gpu(self, uuid: str) -> GpuEntry | None:
        return self._gpus.get(uuid)

    async def amend_gpu(self, uuid: str, change: Callable[[GpuEntry | None], GpuEntry]) -> GpuEntry:
        """Change the record of a GPU, and return it once it is on disk. What ``change`` raises leaves it as it was."""
        async with self._lock:
            old = self._gpus.get(uuid)
            new = change(old)
            if new != old:
                data, name = encode(new), _gpu_file(uuid)
                await self._write(lambda: write_whole(self._files, GPU_FOLDER, name, data))
                self._gpus[uuid] = new
            return new

    async def accept(self, update: Desired) -> frozenset[str]:
        """Make an update durable; returns the uids whose record changed. Raises StaleEpoch, LedgerFailed."""
        async with self._lock:
            host = self._host
            if update.epoch < host.epoch:
                raise StaleEpoch(update.epoch, host.epoch)
            if not update.snapshot and update.epoch == host.epoch and update.revision < host.revision:
                return frozenset()  # a repetition of what was accepted before
            if update.epoch > host.epoch:
                # first of all: from here on nobody of an older term is obeyed, even if the rest is cut short
                await self._save_host(replace(host, epoch=update.epoch))
            changed = set()
            for record in self._changes(update):
                await self._save_instance(record)
                changed.add(record.uid)
            networks = {} if update.snapshot else {n.name: n for n in host.networks}
            networks |= {n.name: n for n in update.networks}
            for name in update.networks_removed:
                networks.pop(name, None)
            after = replace(
                self._host,
                revision=update.revision,
                networks=tuple(networks[name] for name in sorted(networks)),
                complete=host.complete or update.snapshot,
                volumes_removed=tuple(map(_checked_uid, update.volumes_removed)),
                gpu_orders=self._host.gpu_orders if update.gpu_orders is None else update.gpu_orders,
            )
            if after != self._host:
                await self._save_host(after)
            if update.snapshot:
                self._damage = ()
            return frozenset(changed)

    def _changes(self, update: Desired) -> list[InstanceRecord]:
        changes = []
        named = {desired.uid for desired in update.instances}
        for desired in update.instances:
            _check_uid(desired.uid)
            old = self._instances.get(desired.uid)
            if old is None:
                changes.append(InstanceRecord(desired))
                continue
            new = replace(old, desired=desired, removed=False, adopted=False)
            if desired.generation != old.desired.generation or desired.run != old.desired.run:
                new = replace(new, failure=None)
            # Ends by itself count until it is another machine, or was asked to run anew: a field that is live (how long it
            # lives, whom it may be deleted by) starts nothing that was left off.
            if desired.run != old.desired.run or domain_digest(desired) != domain_digest(old.desired):
                new = replace(new, exits=0)
            if new != old:
                changes.append(new)
        gone = set(self._instances) - named if update.snapshot else set(update.removed) - named
        changes += [
            replace(old, removed=True) for uid in sorted(gone) if (old := self._instances.get(uid)) and not old.removed
        ]
        return changes

    async def save(self, base: InstanceRecord, record: InstanceRecord) -> bool:
        """Replace ``base`` by ``record``. False, and nothing done, where the record changed meanwhile: plan anew."""
        async with self._lock:
            if self._instances.get(base.uid) is not base:
                return False
            if record != base:
                await self._save_instance(record)
            return True

    async def amend(self, uid: str, change: Callable[[InstanceRecord], InstanceRecord]) -> None:
        """Change what the record is now; nothing where it is gone."""
        async with self._lock:
            old = self._instances.get(uid)
            if old is not None and (new := change(old)) != old:
                await self._save_instance(new)

    async def adopt(self, records: Iterable[InstanceRecord]) -> None:
        """Take records rebuilt from domains. The ledger is not complete then: a snapshot is needed."""
        async with self._lock:
            missing = [r for r in records if r.uid not in self._instances]
            epoch = max([self._host.epoch, *(r.claim_epoch for r in missing)])
            host = replace(self._host, epoch=epoch, complete=False, revision=0)
            if host != self._host:
                await self._save_host(host)
            for record in missing:
                await self._save_instance(record)

    async def forget(self, uid: str) -> bool:
        """Remove the record of an instance that is no longer wanted. False where it is wanted again."""
        async with self._lock:
            record = self._instances.get(uid)
            if record is None:
                return True
            if not record.removed:
                return False
            await self._write(lambda: _remove(self._files, uid))
            self._private.pop(uid, None)
            del self._instances[uid]
            return True

    async def next_session(self, now_s: float) -> int:
        """Raise the session counter and make it durable; for each dial anew."""
        async with self._lock:
            await self._save_host(replace(self._host, session=next_counter(self._host.session or None, now_s)))
            return self._host.session

    async def _save_host(self, host: HostRecord) -> None:
        data = encode(host)
        await self._write(lambda: write_whole(self._files, "", HOST_FILE, data))
        self._host = host

    async def _save_instance(self, record: InstanceRecord) -> None:
        uid, texts = record.uid, _texts(record)
        data = encode(_without(record))
        kept = self._private.get(uid, {})

        def write() -> None:
            # Texts first: a record never names what is not there.
            if texts and texts != kept:
                write_whole(self._files, PRIVATE, f"{PRIVATE}/{uid}.json", _encoded(texts))
            write_whole(self._files, FOLDER, f"{FOLDER}/{uid}.json", data)
            if kept and not texts:
                _remove_private(self._files, uid)

        await self._write(write)
        self._private[uid] = texts
        self._instances[uid] = record

    async def _write(self, call: Callable[[], None]) -> None:
        try:
            await self._offload(call)
        except OSError as error:
            raise LedgerFailed(f"the ledger's disk: {error.strerror or error}") from error


def _gpu_file(uuid: str) -> str:
    """Its file: what a UUID has that a name of a file should not is written in hex."""
    if not _GPU.match(uuid):
        raise CallerError(f"{uuid!r} is no identity of a GPU")
    return f"{GPU_FOLDER}/{''.join(c if c.isalnum() or c in '-_' else f'%{ord(c):02x}' for c in uuid)}.json"


def _check_uid(uid: str) -> None:
    if not _UID.match(uid):
        raise CallerError(f"instance uid {uid!r} is not a uid")


def _checked_uid(uid: str) -> str:
    _check_uid(uid)
    return uid


def write_whole(files: Files, folder: str, name: str, data: bytes) -> None:
    """The one way a file of the ledger is written: durable when this returns, and never half."""
    beside = f"{name}.new"
    files.write(beside, data)
    files.sync(beside)
    files.rename(beside, name)
    files.sync_folder(folder)


def _remove(files: Files, uid: str) -> None:
    _remove_private(files, uid)
    files.remove(f"{FOLDER}/{uid}.json")
    files.sync_folder(FOLDER)


def _remove_private(files: Files, uid: str) -> None:
    files.remove(f"{PRIVATE}/{uid}.json")
    files.sync_folder(PRIVATE)


Texts = dict[str, tuple[str, str]]


def _texts(record: InstanceRecord) -> Texts:
    """What is in confidence of a record: fingerprint and text by place."""
    return {p: (s.fingerprint, s.text) for p, s in record.desired.secrets.items() if s.text is not None}


def _without(record: InstanceRecord) -> InstanceRecord:
    """The record without texts of secrets; it says by their fingerprints which ones belong to it."""
    if not record.desired.secrets:
        return record
    named = {place: SecretText(secret.fingerprint) for place, secret in record.desired.secrets.items()}
    return replace(record, desired=replace(record.desired, secrets=named))


def _with(record: InstanceRecord, files: Files, damage: list[str]) -> InstanceRecord:
    """The record with its texts, where they are there and are the ones that it names."""
    named, path = record.desired.secrets, f"{PRIVATE}/{record.uid}.json"
    if not named:
        return record
    try:
        plain = _decoded(_bytes_of(files, path))
        kept: Texts = {str(place): (str(mark), str(text)) for place, (mark, text) in plain.items()}
    except (FileNotFoundError, Damaged, ValueError, TypeError, AttributeError) as error:
        damage.append(f"{path} cannot be read: {type(error).__name__}")
        if isinstance(error, Lost):
            files.rename(path, f"{FOLDER}/{record.uid}.texts.damaged")  # or nothing could be written in its place
        return record
    if any(kept.get(place, ("", ""))[0] != secret.fingerprint for place, secret in named.items()):
        damage.append(f"{path} does not have what the record names")
        return record
    texts = {place: SecretText(*kept[place]) for place in named}
    return replace(record, desired=replace(record.desired, secrets=texts))


def _bytes_of(files: Files, name: str) -> bytes:
    """A file's content. Raises Lost, and OSError where it is the machine that is short of something."""
    try:
        return files.read(name)
    except OSError as error:
        if error.errno not in LOST:
            raise
        raise Lost(f"cannot be read: {error.strerror}") from error


def _load(files: Files) -> Book:
    files.make_folder(FOLDER)
    files.make_folder(PRIVATE)
    damage: list[str] = []
    host: HostRecord | None = None
    if HOST_FILE in files.listing(""):
        host = _read(files, HostRecord, HOST_FILE, damage)
    instances: dict[str, InstanceRecord] = {}
    for name in files.listing(FOLDER):
        path = f"{FOLDER}/{name}"
        if name.endswith(".new"):
            files.remove(path)  # a write that was cut short; the record it was to replace is whole
            continue
        if not name.endswith(".json"):
            continue
        record = _read(files, InstanceRecord, path, damage)
        if record is not None and record.uid != name.removesuffix(".json"):
            damage.append(f"{path} is the record of {record.uid}")
            continue
        if record is not None:
            instances[record.uid] = _with(record, files, damage)
    for name in files.listing(PRIVATE):
        if name.removesuffix(".json") not in instances:
            files.remove(f"{PRIVATE}/{name}")  # of an instance that is gone, or a write that was cut short
    gpus = _load_gpus(files, damage)
    if host is None or damage:
        # without the host's record nobody knows whether these are all the instances
        host = replace(host or HostRecord(), revision=0, complete=False)
    epoch = max([host.epoch, *(r.desired.placement.epoch for r in instances.values())])
    return Book(replace(host, epoch=epoch), instances, gpus, tuple(damage))


def _load_gpus(files: Files, damage: list[str]) -> dict[str, GpuEntry]:
    """Records of GPUs. One that is damaged is none: its GPU is dirty until it was sanitised, whoever had it."""
    files.make_folder(GPU_FOLDER)
    gpus: dict[str, GpuEntry] = {}
    for name in files.listing(GPU_FOLDER):
        path = f"{GPU_FOLDER}/{name}"
        if name.endswith(".new"):
            files.remove(path)
        elif name.endswith(".json"):
            entry = _read(files, GpuEntry, path, damage)
            if entry is not None and _gpu_file(entry.uuid) != path:
                damage.append(f"{path} is the record of {entry.uuid}")
            elif entry is not None:
                gpus[entry.uuid] = entry
    return gpus


def _read(files: Files, kind: type[T], name: str, damage: list[str]) -> T | None:
    try:
        return decode(kind, _bytes_of(files, name))
    except Damaged as error:
        damage.append(f"{name} {error}")
        files.rename(name, f"{name}.damaged")
        return None
