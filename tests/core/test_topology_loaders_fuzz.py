"""Whatever a host's files or libvirt's capabilities say, the loaders give a topology or name the place that is wrong."""

import json
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from casemate_core.topology_loaders import BadRecording, HostFacts, from_capabilities, from_sysfs
from support.hosts import FOLDER

FILES: dict[str, str] = json.loads((FOLDER / "recorded" / "small-vm.json").read_text())["files"]
CAPABILITIES = Path(FOLDER / "recorded" / "libvirt-test.xml").read_text()
TEXTS = st.one_of(
    st.sampled_from(
        ["", "\n", "-1", "0-", "9999999", "0-8191", "x", "1 2", "N", "٣", "²", "MemTotal:", "MemTotal: kB", "0,0"]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.text(max_size=12),
)


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from(sorted(FILES)), TEXTS, max_size=4),
    st.sets(st.sampled_from(sorted(FILES)), max_size=3),
)
@example({"proc/meminfo": "MemTotal:"}, set())
def test_any_text_of_sysfs_gives_a_topology_or_names_its_file(changed: dict[str, str], gone: set[str]) -> None:
    files = {path: text for path, text in (FILES | changed).items() if path not in gone}
    try:
        found = from_sysfs(files, HostFacts(reserved_mib=100, disk_mib=5))
    except BadRecording as error:
        assert error.path
    else:
        assert found.online


@settings(max_examples=150)
@given(st.integers(0, len(CAPABILITIES)), st.integers(0, 60), TEXTS)
@example(CAPABILITIES.rindex("<pages"), 0, "<pages unit='KiB' size='4'>x</pages>")
def test_any_capabilities_give_a_topology_or_name_their_place(at: int, cut: int, put: str) -> None:
    xml = CAPABILITIES[:at] + put + CAPABILITIES[at + cut :]
    try:
        from_capabilities(xml, facts=HostFacts(reserved_mib=100))
    except BadRecording as error:
        assert error.path
