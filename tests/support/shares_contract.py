"""What the agent relies on of ``gpuports.GpuShares``: one story, on a GPU that has room for two slices of the profile. It imports
nothing of the tests, so that it can be told on a server too."""

from casemate_agent.drivers.gpuports import GpuShares
from casemate_agent.gpu.shares import Share, share_id
from casemate_core.errors import CasemateError


def share(owner: str, gpu: str, profile: str) -> Share:
    """A slice for an instance."""
    return Share(share_id(owner, gpu), owner, gpu, profile)


async def refused(work: "object", *reasons: str) -> None:
    """The call is refused with one of these words."""
    try:
        await work  # type: ignore[misc]
    except CasemateError as error:
        assert error.reason in reasons, f"{error.reason}: {error}"
    else:
        raise AssertionError(f"not refused as {' or '.join(reasons)}")


async def story(shares: GpuShares, gpu: str, profile: str, other: str, deadline_s: float = 60.0) -> None:
    """Two are made and destroyed; a third has no room. ``other``: a profile that does not go beside it."""
    assert await shares.look(deadline_s) == {}
    one, two, three = (share(f"instance-{n}", gpu, profile) for n in (1, 2, 3))
    made = await shares.create(one, deadline_s)
    assert (made.id, made.gpu, made.profile, made.owner) == (one.id, gpu, profile, "instance-1")
    assert await shares.create(one, deadline_s) == made, "made is made"
    await refused(shares.create(share("instance-1", gpu, other), deadline_s), "ShareFailed")
    await refused(shares.create(share("instance-2", gpu, other), deadline_s), "ShareFailed")
    again = await shares.create(two, deadline_s)
    assert again.address != made.address or not made.address
    await refused(shares.create(three, deadline_s), "ShareFailed")
    assert await shares.look(deadline_s) == {one.id: made, two.id: again}
    for _ in range(2):
        await shares.remove(one.id, deadline_s)
        assert await shares.look(deadline_s) == {two.id: again}
    # its place is the next one's
    await shares.create(three, deadline_s)
    for gone in (two, three):
        await shares.remove(gone.id, deadline_s)
    assert await shares.look(deadline_s) == {}
    await refused(shares.create(share("instance-1", "GPU-none", profile), deadline_s), "Unavailable")
    await refused(shares.create(share("instance-1", gpu, "no such profile"), deadline_s), "ShareFailed")
    assert await shares.look(deadline_s) == {}
