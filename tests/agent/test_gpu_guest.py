"""What guests tell of the GPUs that they have: read as hostile, joined with what the host sees, and done about by policy."""

import asyncio
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate_agent.drivers.simulated_gpus import Board, guest_line
from casemate_agent.execute.guestrun import GuestSaysTooMuch, gpus_in_guest
from casemate_agent.gpu.guestside import GivenGpu, readings
from casemate_agent.gpu.health import Health, figures, judge
from casemate_agent.gpu.link import LinkReading
from casemate_agent.gpu.metrics import BUSY, ECC_UNCORRECTED, HEALTH, POWER, ROWS_FAILED, TEMPERATURE, gpu_values
from casemate_agent.gpu.planning import response_to
from casemate_agent.gpu.readings import GpuFault, GpuReading
from casemate_agent.gpu.records import GpuPolicy, Response
from casemate_agent.gpu.settings import gpu_policy
from casemate_agent.metrics.scrape import AgentMetrics
from casemate_core.claims import HostClaims
from casemate_core.errors import CasemateError
from casemate_core.fit import CpuPolicy, CpuRequest, EmulatorPolicy, Fit, GpuRequest, MemoryRequest, Request, fit
from casemate_core.gpu import GpuFigures
from casemate_core.spec.instance import Placement
from casemate_core.topology_loaders import from_line
from casemate_wire.codec.gpus import figures_from_message, figures_to_message
from support.agents import Rig, uid
from support.gpus import GPU_SETTINGS, GPUS, HOST, SCRUBBED, gpu_states, told_of, with_gpus
from support.guest_bench import guest_bench
from support.virtual import VirtualLoop, run_virtual

GPU = GPUS[0]
QUIET = from_line("1s 8k/c 2t 64G disk=1T hk=1 iso=5 gpu=3xH200 name=box")
OWN = {GPU: GivenGpu(GPU, "0000:17:00.0", "H200")}
LINE = guest_line(GPU, Board())


def said(**words: str) -> str:
    """An answer with some fields changed, by their place."""
    parts = LINE.strip().split(", ")
    for place, word in words.items():
        parts[int(place[1:])] = word
    return ", ".join(parts)


def test_an_answer_is_read() -> None:
    (gpu,) = readings(LINE, OWN)
    assert (gpu.uuid, gpu.address, gpu.model) == (GPU, "0000:17:00.0", "H200"), "who it is knows the host"
    assert (gpu.temperature_c, gpu.power_mw, gpu.gpu_busy_percent) == (61, 310250, 87)
    assert (gpu.ecc_uncorrected, gpu.rows_pending, gpu.rows_failed, gpu.memory_mib) == (0, False, False, None)


@pytest.mark.parametrize(
    "word", ["[N/A]", "", "-5", "1e9", "nan", "inf", "9" * 16, "61 C", "６１", "\x1b[2J", "400", "0x10"]
)
def test_what_is_no_figure_is_unknown(word: str) -> None:
    (gpu,) = readings(said(_1=word), OWN)
    assert gpu.temperature_c is None and gpu.gpu_busy_percent == 87


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found",
        "GPU-other" + LINE[len(GPU) :],
        LINE.replace(",", ";"),
        LINE.strip() + ", more",
        "\0" * 999,
    ],
)
def test_what_is_not_about_its_own_gpu_is_nothing(text: str) -> None:
    assert readings(text, OWN) == ()


def test_a_gpu_that_is_named_twice_counts_once() -> None:
    (gpu,) = readings(f"{LINE}{said(_1='99')}", OWN)
    assert gpu.temperature_c == 61
    assert readings("x\n" * 64 + LINE, OWN) == (), "what comes after so many lines is not read"


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.text(alphabet="0123456789.,-eE[]N/A Yes\x00\x1b", max_size=12)).map(", ".join)))
def test_nothing_that_a_guest_says_breaks_the_reading(text: str) -> None:
    for gpu in readings(f"{GPU}, {text}\n{text}", OWN):
        assert gpu.uuid == GPU
        for field in fields(gpu):
            value = getattr(gpu, field.name)
            assert not isinstance(value, float) and (not isinstance(value, int) or 0 <= value < 1 << 50), field.name


LINK = LinkReading("0000:17:00.0", "vfio-pci", 32.0, 32.0, 16, 16, 0, 0, 0)


def test_one_record_from_the_link_the_xids_and_the_guest() -> None:
    (told,) = readings(said(_8="3", _12="Yes"), OWN)
    health = judge(GPU, None, LINK, guest=told)
    assert (health.owner, health.told_by, health.own, health.health) == ("guest", "guest", Health.WELL, Health.BROKEN)
    assert health.reasons == (
        "its guest says: a row of its memory could not be remapped",
        "its guest says: 3 uncorrected ECC errors since the driver was loaded",
    )
    both = judge(GPU, None, LINK, (GpuFault(GPU, 79),), guest=told)
    assert both.own is Health.BROKEN and both.reasons[0] == "XID 79: the GPU has fallen off the bus"
    host = GpuReading(GPU, "0000:17:00.0", "H200", temperature_c=30)
    assert judge(GPU, host, LINK, guest=told).health is Health.WELL, (
        "the host's own reading comes before a guest's word"
    )
    hot = judge(GPU, replace(host, temperature_c=87), LINK)
    assert hot.reasons == ("it is 87 °C hot, less than 87 is wanted",)
    assert judge(GPU, replace(host, temperature_c=87), LINK, hot_c=95).health is Health.WELL
    shown = figures(told, LINK, "guest", 12.0)
    assert (shown.temperature_c, shown.power_w, shown.ecc_uncorrected, shown.rows_failed) == (61, 310.25, 3, True)
    assert (shown.link_width, shown.link_errors, shown.memory_used_mib) == (16, 0, 512)
    assert figures_from_message(figures_to_message(shown)) == shown
    assert figures_from_message(figures_to_message(GpuFigures())) == GpuFigures(), "what is unknown stays unknown"


def test_metrics_have_what_a_guest_tells_and_no_more() -> None:
    (told,) = readings(said(_3="[N/A]", _8="2"), OWN)
    values = gpu_values("box", [judge(GPU, None, LINK, guest=told)], {})
    board = ("0", GPU, "0000:17:00.0", "nvidia0", "H200", "box")
    assert (values[TEMPERATURE], values[POWER], values[ROWS_FAILED]) == ({board: 61.0}, {board: 310.25}, {board: 0.0})
    assert values[ECC_UNCORRECTED] == {board: 2.0}
    assert BUSY not in values, "unknown is absent"
    assert values[HEALTH][GPU, "guest", "suspect"] == 1.0
    assert TEMPERATURE not in gpu_values("box", [judge(GPU, None, LINK)], {})


@pytest.mark.parametrize("guest", list(Response))
@pytest.mark.parametrize("broken", list(Response))
def test_a_guests_word_counts_for_as_much_as_the_policy_says(broken: Response, guest: Response) -> None:
    policy = GpuPolicy(broken=broken, guest=guest)
    (told,) = readings(said(_12="Yes"), OWN)
    order = list(Response)
    assert response_to(judge(GPU, None, LINK, guest=told), policy) is min(broken, guest, key=order.index)
    assert response_to(judge(GPU, None, LINK, (GpuFault(GPU, 79),), guest=told), policy) is broken
    assert response_to(judge(GPU, None, LINK, guest=readings(LINE, OWN)[0]), policy) is Response.TELL


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"guest": "drain"}, "gpu.guest: 'drain' is not known; write one of tell, quarantine, cordon"),
        ({"guest_health_s": 1}, "gpu.guest_health_s: 1 is not a number of seconds from 5"),
        ({"guest_health_s": True}, "gpu.guest_health_s: True"),
        ({"hot_c": 1000}, "gpu.hot_c: 1000 is not a temperature from 40 to 120"),
    ],
)
def test_settings_that_have_no_meaning(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        gpu_policy(table)
    kept = gpu_policy({"guest": "quarantine", "guest_health_s": 0, "hot_c": 90})
    assert (kept.guest, kept.guest_health_s, kept.hot_c) == (Response.QUARANTINE, 0.0, 90)


def told_by(rig: Rig) -> str:
    told = told_of(rig, GPU).figures
    return str(told.told_by) if told is not None else "nobody yet"


async def until(rig: Rig, condition: Callable[[], object], within_s: float = 600.0) -> None:
    end = rig.loop.time() + within_s
    while not condition():
        assert rig.loop.time() < end, (gpu_states(rig), rig.states())
        await asyncio.sleep(0.5)


async def running(loop: VirtualLoop, policy: GpuPolicy = SCRUBBED, *, realtime: bool = False) -> Rig:
    """A host on which an instance runs with a GPU."""
    rig = Rig(loop, QUIET if realtime else HOST, settings=replace(GPU_SETTINGS, gpu=policy))
    await rig.start()
    await until(rig, lambda: gpu_states(rig) == dict.fromkeys(GPUS, "HostOwned"))
    wanted = with_gpus(1, GPU)
    if realtime:
        cpu = CpuRequest(2, policy=CpuPolicy.DEDICATED, emulator=EmulatorPolicy.ISOLATE, realtime=True)
        request = Request(cpu, MemoryRequest(1024), 4096, gpus=(GpuRequest(1),))
        found = fit(QUIET, HostClaims.empty(), request, owner=uid(1), epoch=1, generation=1)
        assert isinstance(found, Fit) and found.claim.gpus == (GPU,), found
        wanted = replace(wanted, cpus=2, placement=Placement(found.claim, 1, 1))
    await rig.want(wanted)
    await until(rig, lambda: uid(1) in rig.active() and gpu_states(rig)[GPU] == "Attached")
    return rig


def test_what_the_guest_tells_is_shown_while_it_has_the_card_and_no_longer() -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await running(loop)
        await until(rig, lambda: told_by(rig) == "guest")
        told = told_of(rig, GPU)
        assert (told.health, told.figures.temperature_c, told.figures.power_w) == ("well", 61, 310.25)
        assert rig.agent is not None
        rows = {r.family.name: r.values for r in await AgentMetrics(rig.agent, None, "1").rows()}
        assert [v for labels, v in rows["DCGM_FI_DEV_GPU_TEMP"].items() if GPU in labels] == [61.0]
        await rig.unwant(uid(1))
        await until(rig, lambda: gpu_states(rig)[GPU] == "HostOwned")
        await until(rig, lambda: told_by(rig) == "host")
        assert told_of(rig, GPU).figures.temperature_c == 30
        assert rig.agent.told_by_guest(GPU) is None
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize("guest", [Response.TELL, Response.QUARANTINE])
def test_a_guest_that_says_its_gpu_is_broken(guest: Response) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await running(loop, replace(SCRUBBED, guest=guest))
        rig.host.guest_gpus[uid(1)] = said(_12="Yes").encode()
        await until(rig, lambda: told_of(rig, GPU).health == "broken")
        await asyncio.sleep(60)
        assert uid(1) in rig.active(), "nobody is ended"
        assert told_of(rig, GPU).reasons == ("its guest says: a row of its memory could not be remapped",)
        await rig.unwant(uid(1))
        await until(rig, lambda: gpu_states(rig)[GPU] == ("Quarantined" if guest is not Response.TELL else "HostOwned"))
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize("answer", [b"x" * 100_000, b"\xff\xfe" * 99, b"GPU-box-0-01, 99\n", b""])
def test_a_guest_that_says_anything_else_tells_nothing(answer: bytes) -> None:
    async def story(loop: VirtualLoop) -> None:
        rig = await running(loop)
        rig.host.guest_gpus[uid(1)] = answer
        await asyncio.sleep(300)
        assert told_by(rig) == "" and told_of(rig, GPU).health == "well"
        rig.host.guest_programs.discard("nvidia-smi")
        await asyncio.sleep(120)
        rig.host.guest_programs.add("nvidia-smi")
        del rig.host.guest_gpus[uid(1)]
        await until(rig, lambda: told_by(rig) == "guest")
        # what is old is not taken for what is
        rig.host.guest_gpus[uid(1)] = b""
        await until(rig, lambda: told_by(rig) == "")
        await rig.kill()

    run_virtual(story)


@pytest.mark.parametrize("how", ["real-time", "never"])
def test_a_guest_that_is_not_to_be_asked_is_not(how: str) -> None:
    async def story(loop: VirtualLoop) -> None:
        policy = replace(SCRUBBED, guest_health_s=0.0) if how == "never" else SCRUBBED
        rig = await running(loop, policy, realtime=how == "real-time")
        await asyncio.sleep(300)
        assert told_by(rig) == ""
        await rig.kill()

    run_virtual(story)


async def test_the_real_helper_runs_the_guests_own_program_and_takes_no_more_than_is_asked(tmp_path: Path) -> None:
    async with guest_bench("real", tmp_path) as bench:
        assert await gpus_in_guest(bench.guests, bench.uid, OWN, 60) == (), "there is no such program"
        program = tmp_path / "bin/nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\nprintf "{LINE.strip()}\\n"\n')
        program.chmod(0o755)
        (gpu,) = await gpus_in_guest(bench.guests, bench.uid, OWN, 60)
        assert (gpu.temperature_c, gpu.power_mw) == (61, 310250)
        assert (tmp_path / "asked").read_text().startswith("--query-gpu=uuid,temperature.gpu,")
        program.write_text("#!/bin/sh\nexit 9\n")
        assert await gpus_in_guest(bench.guests, bench.uid, OWN, 60) == (), "No devices were found"
        program.write_text("#!/bin/sh\nexec cat /dev/zero\n")
        with pytest.raises(GuestSaysTooMuch):
            await gpus_in_guest(bench.guests, bench.uid, OWN, 60)
        program.write_text("#!/bin/sh\nexec sleep 600\n")
        with pytest.raises((TimeoutError, CasemateError)):
            await gpus_in_guest(bench.guests, bench.uid, OWN, 1)
