"""The image store on a real file system, with a real web server."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from casemate_agent.drivers.fetch import DiskFull, SourceRules
from casemate_agent.drivers.http import SourceFailed, public_url
from casemate_agent.drivers.image import ImageStore
from casemate_agent.drivers.imageformat import HEAD_BYTES, ImageRefused, read_qcow2
from casemate_core.errors import DeadlineExceeded, InternalError, NotFound
from casemate_core.spec.instance import File, ImageRef
from support.instances import UID, digest_of, empty_disk, image, instance, some_digest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


@pytest.fixture
async def store(tmp_path: Path, sources: Path) -> AsyncIterator[ImageStore]:
    made = ImageStore(tmp_path / "state", SourceRules(folders=(str(sources),), max_mib=4))
    yield made
    await made.aclose()


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """URL of a web server on the loopback that answers every GET by ``handler``."""
    app = web.Application()
    app.router.add_get("/{tail:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def nothing_half_made(store: ImageStore) -> None:
    seen = await store.observe(5)
    assert not seen.images and not seen.strays


async def test_a_local_image_is_copied_checked_and_known_by_its_digest(store: ImageStore, sources: Path) -> None:
    ref = empty_disk(sources / "a.qcow2")
    await store.fetch(ref, 10)
    await store.fetch(ref, 10)
    seen = await store.observe(5)
    assert list(seen.images) == [ref.file.digest] and not seen.strays
    stored = Path(seen.images[ref.file.digest])
    assert digest_of(stored.read_bytes()) == ref.file.digest
    assert stored.stat().st_mode & 0o777 == 0o444
    # A copy of its own: what the owner of the source does to it later changes nothing.
    (sources / "a.qcow2").write_bytes(b"changed")
    assert digest_of(stored.read_bytes()) == ref.file.digest
    await store.remove_image(ref.file.digest, 5)
    await store.remove_image(ref.file.digest, 5)
    await nothing_half_made(store)


async def test_a_wrong_digest_is_refused(store: ImageStore, sources: Path) -> None:
    ref = empty_disk(sources / "a.qcow2")
    with pytest.raises(ImageRefused, match="has the digest sha256:"):
        await store.fetch(replace(ref, file=replace(ref.file, digest=some_digest(1))), 10)
    await nothing_half_made(store)


async def test_a_dangerous_header_is_refused_and_the_file_forgotten(store: ImageStore, sources: Path) -> None:
    ref = empty_disk(sources / "a.qcow2")
    data = bytearray((sources / "a.qcow2").read_bytes())
    data[79] |= 1 << 2  # external data file
    (sources / "a.qcow2").write_bytes(data)
    with pytest.raises(ImageRefused, match="in another file"):
        await store.fetch(replace(ref, file=replace(ref.file, digest=digest_of(bytes(data)))), 10)
    await nothing_half_made(store)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("file:///etc/passwd", "outside the folders"),
        ("file://{sources}/../secret", "outside the folders"),
        ("file://{sources}/%2e%2e/secret", "outside the folders"),
        ("file://{sources}/link", "outside the folders"),
        ("file://{sources}/none", "No such file"),
        ("file://{sources}", "regular file"),
        ("file://{sources}/fifo", "regular file"),
        ("file://elsewhere/a", "not a file of this host"),
        ("ftp://example/a", "no file, http or https"),
        ("/etc/passwd", "no file, http or https"),
        ("file:relative", "no absolute path"),
    ],
)
async def test_a_source_outside_what_is_allowed_is_refused(
    store: ImageStore, sources: Path, source: str, words: str
) -> None:
    (sources.parent / "secret").write_text("secret")
    (sources / "link").symlink_to(sources.parent / "secret")
    os.mkfifo(sources / "fifo")
    ref = image(file=File(source.format(sources=sources), some_digest(1)), kernel=None, initrd=None)
    with pytest.raises(ImageRefused, match=words):
        await store.fetch(ref, 10)
    await nothing_half_made(store)


async def test_a_file_larger_than_the_bound_is_refused(store: ImageStore, sources: Path) -> None:
    (sources / "big").write_bytes(bytes(5 * 2**20))
    ref = image(file=File(f"file://{sources}/big", some_digest(1)), kernel=None, initrd=None, format="raw")
    with pytest.raises(ImageRefused, match="larger than the 4Mi"):
        await store.fetch(ref, 10)
    await nothing_half_made(store)


async def test_many_who_want_one_image_share_one_transfer(store: ImageStore) -> None:
    data, asked = bytes(2**20), 0

    async def handler(_request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)
        return web.Response(body=data)

    async with served(handler) as url:
        ref = image(file=File(f"{url}/a.raw", digest_of(data)), kernel=None, initrd=None, format="raw")
        await asyncio.gather(*(store.fetch(ref, 10) for _ in range(8)))
    assert asked == 1
    assert list((await store.observe(5)).images) == [ref.file.digest]


async def test_servers_that_fail_leave_nothing(store: ImageStore) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/missing":
            return web.Response(status=404)
        if request.path == "/endless":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(64):
                await response.write(bytes(2**18))
            return response
        if request.path == "/cut":
            response = web.StreamResponse(headers={"Content-Length": "1000000"})
            await response.prepare(request)
            await response.write(bytes(1000))
            assert request.transport is not None
            request.transport.abort()
            return response
        if request.path == "/huge":
            response = web.StreamResponse(headers={"Content-Length": str(2**40)})
            await response.prepare(request)
            return response
        raise web.HTTPFound("file:///etc/passwd")

    async with served(handler) as url:
        for path, error, words in (
            ("/missing", SourceFailed, "404"),
            ("/endless", ImageRefused, "larger than"),
            ("/cut", SourceFailed, "Payload"),
            ("/huge", ImageRefused, "larger than"),
            ("/redirect", SourceFailed, "Redirect"),
        ):
            ref = image(file=File(f"{url}{path}", some_digest(1)), kernel=None, initrd=None)
            with pytest.raises(error, match=words):
                await store.fetch(ref, 10)
            await nothing_half_made(store)
    with pytest.raises(SourceFailed):
        await store.fetch(ref, 10)  # nobody listens any more


async def test_a_transfer_that_is_late_is_given_up_and_leaves_nothing(store: ImageStore) -> None:
    release = asyncio.Event()

    async def handler(_request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.Response()

    async with served(handler) as url:
        ref = image(file=File(f"{url}/a", some_digest(1)), kernel=None, initrd=None)
        with pytest.raises((DeadlineExceeded, SourceFailed)):
            await store.fetch(ref, 0.2)
        await nothing_half_made(store)
        release.set()


async def test_an_overlay_names_its_backing_file_and_format(store: ImageStore, sources: Path) -> None:
    ref = empty_disk(sources / "a.qcow2", virtual_mib=8)
    desired = instance(image=ref)
    with pytest.raises(NotFound):
        await store.create_overlay(UID, ref, 16, 10)
    await store.fetch(ref, 10)
    with pytest.raises(ImageRefused, match="smaller than its image"):
        await store.create_overlay(UID, ref, 4, 10)
    await store.create_overlay(UID, ref, 16, 10)
    await store.create_overlay(UID, ref, 16, 10)
    files = store.files(desired)
    head = Path(files.root).read_bytes()[:HEAD_BYTES]
    info = read_qcow2(head, Path(files.root).stat().st_size)
    assert (info.backing, info.backing_format, info.virtual_bytes) == (files.backing, "qcow2", 16 * 2**20)
    other = empty_disk(sources / "b.qcow2", virtual_mib=9)
    await store.fetch(other, 10)
    with pytest.raises(InternalError, match="lies over"):
        await store.create_overlay(UID, other, 16, 10)
    assert list((await store.observe(5)).overlays) == [UID]
    await store.remove_instance(UID, 5)
    await store.remove_instance(UID, 5)
    assert not (await store.observe(5)).overlays


async def test_a_seed_is_for_root_alone(store: ImageStore) -> None:
    await store.write_seed(instance(user_data="#cloud-config\npassword: hunter2\n"), 10)
    seen = await store.observe(5)
    assert list(seen.seeds) == [UID]
    assert Path(seen.seeds[UID]).stat().st_mode & 0o777 == 0o600
    await store.remove_instance(UID, 5)
    assert not (await store.observe(5)).seeds


async def test_what_a_crash_left_is_listed_and_removed_and_nothing_else(store: ImageStore, tmp_path: Path) -> None:
    state = tmp_path / "state"
    await store.write_seed(instance(), 10)
    left = [
        state / "images/.sha256-x.abc.part",
        state / "images/strange",
        state / f"instances/{UID}/.root.qcow2.x.part",
    ]
    for path in left:
        path.write_bytes(b"x")
    leftover = state / "instances/0b6e1c2a-0000-4000-8000-000000000001"
    leftover.mkdir()
    (leftover / "console.log").write_text("x")
    assert set((await store.observe(5)).strays) == {*map(str, left), str(leftover)}
    await store.remove_strays(5)
    seen = await store.observe(5)
    assert not seen.strays and list(seen.seeds) == [UID]


async def test_an_archive_must_be_a_tar_file(store: ImageStore, sources: Path) -> None:
    for data, good in ((bytes(257) + b"ustar\x0000" + bytes(2000), True), (b"\x1f\x8b" + bytes(600), False)):
        (sources / "a.tar").write_bytes(data)
        ref = ImageRef("a", "oci-archive", File(f"file://{sources}/a.tar", digest_of(data)), "")
        if good:
            await store.fetch(ref, 10)
        else:
            with pytest.raises(ImageRefused, match="no tar file"):
                await store.fetch(ref, 10)
        assert (ref.file.digest in (await store.observe(5)).images) is good


async def test_kernel_and_initrd_are_fetched_with_the_disk(store: ImageStore, sources: Path) -> None:
    (sources / "k").write_bytes(b"kernel")
    (sources / "i").write_bytes(b"initrd")
    kernel = File(f"file://{sources}/k", digest_of(b"kernel"))
    initrd = File(f"file://{sources}/i", digest_of(b"initrd"))
    ref = replace(empty_disk(sources / "a.qcow2"), kernel=kernel, initrd=initrd)
    await store.fetch(ref, 10)
    assert set((await store.observe(5)).images) == {ref.file.digest, kernel.digest, initrd.digest}
    files = store.files(instance(image=ref))
    assert Path(files.kernel).read_bytes() == b"kernel" and Path(files.initrd).read_bytes() == b"initrd"


async def test_a_digest_or_a_uid_that_is_none_never_becomes_a_path(store: ImageStore) -> None:
    with pytest.raises(ImageRefused):
        await store.remove_image("sha256:../../../etc/passwd", 5)
    with pytest.raises(InternalError):
        await store.remove_instance("../images", 5)


def test_a_url_is_shown_without_its_secrets() -> None:
    assert public_url("https://user:pw@images.example:8443/a.img?token=x#y") == "https://images.example:8443/a.img"
    assert public_url("http://[bad") == "(not a URL)"


@pytest.mark.libvirt
async def test_a_full_disk_leaves_nothing_half_made(tmp_path: Path, sources: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small))
    assert await mount.wait() == 0
    store = ImageStore(small, SourceRules(folders=(str(sources),), max_mib=4))
    data = os.urandom(2 * 2**20)
    try:
        (sources / "big").write_bytes(data)
        local = image(file=File(f"file://{sources}/big", digest_of(data)), kernel=None, initrd=None, format="raw")
        with pytest.raises(DiskFull):
            await store.fetch(local, 10)
        await nothing_half_made(store)

        async def handler(_request: web.Request) -> web.StreamResponse:
            return web.Response(body=data)

        async with served(handler) as url:
            with pytest.raises(DiskFull, match="no room"):
                await store.fetch(replace(local, file=File(f"{url}/big", digest_of(data))), 10)
        await nothing_half_made(store)
        (small / "ballast").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
        with pytest.raises(DiskFull):
            await store.write_seed(instance(), 10)
        assert not (await store.observe(5)).seeds
    finally:
        await store.aclose()
        umount = await asyncio.create_subprocess_exec("umount", str(small))
        assert await umount.wait() == 0
