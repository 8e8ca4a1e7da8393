"""What the agent relies on of ``gpuports.GpuCards``: one story, for a card that nobody has. It imports nothing of the tests, so
that it can be told on a server too."""

from casemate_agent.drivers.gpuports import GpuCards
from casemate_core.errors import CasemateError
from casemate_core.gpu import Rung


async def refused(work: "object", *reasons: str) -> None:
    """The call is refused with one of these words."""
    try:
        await work  # type: ignore[misc]
    except CasemateError as error:
        assert error.reason in reasons, f"{error.reason}: {error}"
    else:
        raise AssertionError(f"not refused as {' or '.join(reasons)}")


async def story(cards: GpuCards, uuid: str, deadline_s: float = 90.0) -> None:
    """It is left with the driver that it had."""
    before = (await cards.look(deadline_s))[uuid]
    card = await cards.card(uuid, deadline_s)
    assert card.holders == () and card.methods
    assert (await cards.link(uuid, deadline_s)).address == before.address
    for _ in range(2):  # binding what is bound is no error, and changes nothing
        assert await cards.bind(uuid, deadline_s) == before.address
        assert (await cards.look(deadline_s))[uuid].driver == "vfio-pci"
    rung = Rung.FUNCTION_RESET if "flr" in card.methods else Rung.BUS_RESET
    assert await cards.reset(uuid, rung, deadline_s)
    proof = await cards.prove(uuid, deadline_s)
    assert proof.answers and proof.found == proof.expected and proof.kept is not True
    for _ in range(2):
        await cards.unbind(uuid, deadline_s)
        assert (await cards.look(deadline_s))[uuid].driver == before.driver
    for work in (
        cards.card("GPU-none", deadline_s),
        cards.link("GPU-none", deadline_s),
        cards.bind("GPU-none", deadline_s),
        cards.unbind("GPU-none", deadline_s),
        cards.reset("GPU-none", rung, deadline_s),
        cards.scrub("GPU-none", deadline_s),
    ):
        await refused(work, "Unavailable", "ScrubFailed")
