"""A support bundle of a whole fleet: everything of use is in it, and no secret that was planted anywhere."""

import asyncio
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from casemate_agent.logs import Console
from casemate_agent.uplink.support import bounded, redacted_xml, safe
from casemate_cli.failure import Failure
from casemate_cli.verbs.support import files, write
from casemate_core.errors import CasemateError
from casemate_core.spec.fleet import Image, ImageSpec
from casemate_core.spec.instance import File
from casemate_core.spec.meta import Meta
from casemate_manager.api.support import host_files
from casemate_wire.logtail import MOST_BYTES, LogTail
from casemate_wire.v1 import support_pb2 as pb
from casemate_wire.v1.support_pb2_grpc import SupportStub
from support.agents import pod
from support.whole_fleet import WholeFleet, environment, until, whole_fleet

LINE = "1s 4k/c 1t 16G disk=1T"
CANARIES = [f"canary{number:02d}zzz" for number in range(12)]


@pytest.fixture
def tail() -> Iterator[LogTail]:
    """The tail of a process's log, as its logging sets it up."""
    kept = LogTail()
    kept.setFormatter(Console())
    root = logging.getLogger()
    root.addHandler(kept)
    yield kept
    root.removeHandler(kept)


async def collected(fleet: WholeFleet, **request: Any) -> dict[str, bytes]:
    async with grpc.aio.insecure_channel(fleet.address) as channel:
        parts = [part async for part in SupportStub(channel).Collect(pb.CollectRequest(**request))]
    found = list(files(parts))
    assert len({name for name, _ in found}) == len(found), "pieces of a file follow each other"
    return dict(found)


async def refusal(fleet: WholeFleet, **request: Any) -> grpc.StatusCode | None:
    try:
        await collected(fleet, **request)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


async def planted(fleet: WholeFleet) -> None:
    """Secrets wherever a tenant or an administrator could have put one."""
    c = iter(CANARIES)
    manifest: dict[str, Any] = pod("hello")
    manifest["metadata"]["annotations"] = {"note": next(c)}
    container = manifest["spec"]["containers"][0]
    container |= {"env": [{"name": "DB", "value": next(c)}], "command": ["run", next(c)], "args": [f"--x={next(c)}"]}
    web = environment(
        "web",
        pods=(manifest,),
        user_data=f"#cloud-config\npassword: {next(c)}",
        ssh_keys=(f"ssh-ed25519 AAAA {next(c)}",),
    )
    web = replace(web, meta=replace(web.meta, annotations={"deploy": next(c)}))
    source = f"https://user:{next(c)}@images.example/d.qcow2?signature={next(c)}"
    image = Image(Meta("signed"), ImageSpec(File(source, "sha256:" + "1" * 64), "qcow2", size_mib=1024))
    await fleet.apply(image, web, key=f"request-{next(c)}")
    logging.getLogger("casemate.agent").warning("fetch of https://u:%s@images.example failed", next(c))
    logging.getLogger("casemate.manager").warning("token=%s was refused", next(c))
    assert next(c, "") == ""
    await fleet.until_ready(1)


async def test_a_bundle_holds_what_helps_and_no_planted_secret(tmp_path: Path, tail: LogTail) -> None:
    async with whole_fleet(tmp_path, {"a": LINE, "b": LINE}) as fleet:
        await planted(fleet)
        found = await collected(fleet)
    everything = b"\n".join(found.values())
    assert not [canary for canary in CANARIES if canary.encode() in everything]
    summary = json.loads(found["summary.json"])
    assert (summary["answered"], summary["silent"], summary["cutOff"]) == (["a", "b"], {}, {})
    assert list(found)[-1] == "summary.json"
    environments = json.loads(found["manager/objects/Environment.json"])
    assert environments[0]["metadata"]["name"] == "web"
    assert environments[0]["spec"]["pods"][0]["spec"]["containers"][0]["env"] == [{"name": "DB", "value": "(left out)"}]
    assert {event["reason"] for event in json.loads(found["manager/objects/Event.json"])} >= {
        "Created",
        "Placed",
        "Started",
    }
    assert b"casemate_hosts{phase=" in found["manager/metrics.txt"]
    assert b"was refused" in found["manager/log.txt"]
    assert json.loads(found["manager/versions.json"])["manager"] == "test"
    for host in ("a", "b"):
        doctor = json.loads(found[f"hosts/{host}/doctor.json"])
        assert {finding["check"] for finding in doctor["findings"]} >= {"virtualisation", "libvirt", "disk"}
        assert b"libvirt_up 1.0" in found[f"hosts/{host}/metrics.txt"]
        assert json.loads(found[f"hosts/{host}/versions.json"])["agent"] == "test"
        assert found[f"hosts/{host}/log.txt"]
    ledgers = [json.loads(found[f"hosts/{host}/ledger.json"])["instances"] for host in ("a", "b")]
    assert sum(map(len, ledgers)) == 1
    assert [name for name in found if "/domains/" in name and name.endswith(".xml")]


async def test_hosts_that_do_not_answer_are_named_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with whole_fleet(tmp_path, {"a": LINE, "b": LINE, "c": LINE}) as fleet:
        never = asyncio.Event()

        async def hangs() -> dict[str, str]:
            await never.wait()
            return {}

        support = fleet.hosts["b"].link.support
        assert support is not None
        monkeypatch.setattr(support, "files", hangs)
        fleet.hosts["c"].link.support = None
        found = await collected(fleet, host_timeout_s=1.0)
        never.set()
        summary = json.loads(found["summary.json"])
        assert summary["answered"] == ["a"]
        assert summary["silent"]["b"] == "no answer within 1 s"
        assert "support" in summary["silent"]["c"]
        assert "hosts/a/doctor.json" in found
        one = await collected(fleet, hosts=["a"])
        assert {name.split("/")[1] for name in one if name.startswith("hosts/")} == {"a"}
        for wrong, code in (
            ({"hosts": ["x"]}, grpc.StatusCode.NOT_FOUND),
            ({"max_bytes": -1}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            assert await refusal(fleet, **wrong) is code


async def test_a_part_that_cannot_be_had_says_so_and_the_bundle_is_bounded(tmp_path: Path) -> None:
    async with whole_fleet(tmp_path, {"a": LINE}) as fleet:
        await until(lambda: bool(fleet.manager.writer.state.hosts))
        fleet.hosts["a"].host.faults.failing["look"] = 1
        found = await collected(fleet)
        assert found["hosts/a/doctor.json"].startswith(b"not to be had: look failed")
        small = await collected(fleet, max_bytes=4000)
    assert sum(map(len, small.values())) < 4000 + 2_000_000
    cut = json.loads(small["summary.json"])["cutOff"]
    assert "manager/metrics.txt" in cut
    assert "manager/metrics.txt" not in small


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no json",
        b"[]",
        b'{"a": 1}',
        b'{"../x": ""}',
        b'{"/etc/x": ""}',
        b'{"a/../b": ""}',
        b'{"a\\u0000": ""}',
        b'{".x": ""}',
    ],
)
def test_what_a_host_sends_that_are_no_files_is_refused(data: bytes) -> None:
    with pytest.raises(CasemateError):
        host_files(data)


def test_what_a_host_sends_is_searched_once_more() -> None:
    assert host_files(b'{"domains/x.xml": "token=canary"}') == {"domains/x.xml": "token=(left out)"}


@pytest.mark.parametrize("opened", ["<metadata>", '<metadata xmlns:c="urn:casemate:instance:1">', "<metadata\n a='b'>"])
def test_xml_goes_without_metadata_and_passwords(opened: str) -> None:
    xml = f"<domain>{opened}<a b='canary'>canary</a>\n</metadata><graphics passwd='canary'/><name>n</name></domain>"
    kept = redacted_xml(xml)
    assert "canary" not in kept
    assert "<name>n</name>" in kept and "<metadata />" in kept
    assert redacted_xml("<metadata>canary") == "(left out): it is no XML\n"
    assert (safe("a b/../c"), safe("...")) == ("a-b-..-c", "unnamed")


def test_files_are_cut_at_their_beginning_and_what_does_not_fit_is_told() -> None:
    found = bounded({"log": "x" * 50 + "end", "big": "y" * 40, "small": "z"}, most_file=40, most=100)
    assert found["log"].startswith("(the first 13 bytes were cut off)") and found["log"].endswith("end")
    assert "big" in found["cut-off.txt"] and found["small"] == "z"


def test_the_tail_of_a_log_is_bounded() -> None:
    kept = LogTail()
    for number in range(5000):
        kept.emit(logging.LogRecord("x", logging.INFO, "", 0, f"{number} " + "x" * 400, None, None))
    text = kept.text()
    assert len(text) <= MOST_BYTES + 5000
    assert "4999 " in text and "\n0 " not in text


def parts(**given: bytes) -> list[pb.CollectPart]:
    return [pb.CollectPart(name=name.replace("__", "/"), data=data) for name, data in given.items()]


SUMMARY = {"answered": ["a"], "hosts": 1, "silent": {}, "cutOff": {}}


def test_the_file_is_whole_or_not_there_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    told = write(
        path,
        [
            *parts(manager__a=b"1"),
            *parts(manager__a=b"2"),
            *parts(summary=b"")[:0],
            pb.CollectPart(name="summary.json", data=json.dumps(SUMMARY).encode()),
        ],
        None,
    )
    assert told == SUMMARY
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        assert archive.getnames() == ["b/manager/a", "b/summary.json"]
        member = archive.extractfile("b/manager/a")
        assert member is not None and member.read() == b"12"
    for wrong in (
        parts(manager__a=b"1"),
        [pb.CollectPart(name="../x", data=b"")],
        [pb.CollectPart(name="/x", data=b"")],
    ):
        with pytest.raises(Failure):
            write(tmp_path / "c.tar.gz", wrong, None)
    assert [each.name for each in tmp_path.iterdir()] == ["b.tar.gz"]
