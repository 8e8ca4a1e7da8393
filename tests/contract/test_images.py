"""What the agent relies on of the store of images and files."""

from dataclasses import replace

import pytest

from casemate_core.errors import CallerError
from casemate_core.spec.instance import File
from support.contract import UIDS, Bench


async def test_an_image_is_fetched_once_and_removed(bench: Bench) -> None:
    empty = await bench.images.observe(20)
    assert (dict(empty.images), dict(empty.overlays), dict(empty.seeds), empty.strays) == ({}, {}, {}, ())
    assert 0 < empty.free_mib <= empty.total_mib
    for _ in range(2):
        await bench.images.fetch(bench.image, 60)
    stored = await bench.images.observe(20)
    assert bench.image.file.digest in stored.images
    assert stored.strays == ()
    for digest in stored.images:
        await bench.images.remove_image(digest, 20)
        await bench.images.remove_image(digest, 20)
    assert dict((await bench.images.observe(20)).images) == {}


async def test_files_of_an_instance_are_made_and_removed(bench: Bench) -> None:
    desired = bench.wanted()
    await bench.images.fetch(desired.image, 60)
    for _ in range(2):
        await bench.images.create_overlay(desired.uid, desired.image, desired.disk_mib, 20)
        await bench.images.write_seed(desired, 20)
    stored = await bench.images.observe(20)
    assert set(stored.overlays) == {desired.uid}
    assert set(stored.seeds) == {desired.uid}
    files = bench.images.files(desired)
    assert (files.root, files.seed) == (stored.overlays[desired.uid], stored.seeds[desired.uid])
    assert files.backing == stored.images[desired.image.file.digest]
    assert (files.root_format, files.backing_format) == ("qcow2", desired.image.format)
    for _ in range(2):
        await bench.images.remove_instance(desired.uid, 20)
    after = await bench.images.observe(20)
    assert (dict(after.overlays), dict(after.seeds)) == ({}, {})
    assert set(after.images) == set(stored.images)


async def test_an_overlay_that_is_there_is_kept_as_it_is(bench: Bench) -> None:
    desired = bench.wanted()
    await bench.images.fetch(desired.image, 60)
    await bench.images.create_overlay(desired.uid, desired.image, desired.disk_mib, 20)
    path = (await bench.images.observe(20)).overlays[desired.uid]
    await bench.images.create_overlay(desired.uid, desired.image, desired.disk_mib, 20)
    assert (await bench.images.observe(20)).overlays[desired.uid] == path


async def test_removing_what_is_not_there_is_no_error(bench: Bench) -> None:
    await bench.images.remove_instance(UIDS[1], 20)
    await bench.images.remove_image("sha256:" + "0" * 64, 20)
    await bench.images.remove_strays(20)


@pytest.mark.parametrize("bench", [pytest.param("real", marks=pytest.mark.libvirt)], indirect=True)
async def test_content_of_another_digest_is_refused_and_leaves_nothing(bench: Bench) -> None:
    wrong = replace(bench.image, file=File(bench.image.file.source, "sha256:" + "0" * 64))
    with pytest.raises(CallerError):
        await bench.images.fetch(wrong, 60)
    after = await bench.images.observe(20)
    assert (dict(after.images), after.strays) == ({}, ())


async def test_a_new_disk_stands_beside_the_old_one_until_that_is_removed(bench: Bench) -> None:
    desired = await bench.prepared(bench.wanted())
    assert (await bench.images.observe(20)).disks_of(desired.uid) == (0,)
    rebuilt = replace(desired, disk=2)
    for _ in range(2):
        await bench.images.create_overlay(desired.uid, desired.image, desired.disk_mib, 20, rebuilt.disk)
    assert (await bench.images.observe(20)).disks_of(desired.uid) == (0, 2)
    assert bench.images.files(rebuilt).root != bench.images.files(desired).root
    for _ in range(2):
        await bench.images.remove_disks(desired.uid, rebuilt.disk, 20)
    assert (await bench.images.observe(20)).disks_of(desired.uid) == (2,)
    await bench.images.remove_instance(desired.uid, 20)
    assert (await bench.images.observe(20)).disks_of(desired.uid) == ()
