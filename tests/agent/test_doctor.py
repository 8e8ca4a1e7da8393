"""The doctor: machines that are written down as text are read, judged, and told what they lack and the remedy."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate_agent.__main__ import main
from casemate_agent.doctor.facts import (
    Cgroup,
    Clock,
    Disk,
    HostSurvey,
    Libvirt,
    Nvml,
    PciFunction,
    Pool,
    Virtualisation,
)
from casemate_agent.doctor.verdicts import CHECKS, REQUIRED, UnknownCheck, Verdict, diagnose, lines, plain, required_of
from casemate_agent.drivers.survey import ask_clock, ask_disk, read_files
from casemate_core.cpuset import CpuSet

#: A link is written as "-> target".
Files = dict[str, str]

CPU = "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: x\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"
INTEL = CPU.format(vendor="GenuineIntel", flags="vmx pdpe1gb")
NIC = "sys/bus/pci/devices/0000:18:00.0"
GPU = "sys/bus/pci/devices/0000:3b:00.0"

GPU_SERVER: Files = {
    "proc/cpuinfo": INTEL,
    "proc/cmdline": "BOOT_IMAGE=/vmlinuz intel_iommu=on iommu=pt isolcpus=managed_irq,domain,2-N nohz_full=2-7 rcu_nocbs=all\n",
    "sys/devices/system/cpu/online": "0-7\n",
    "sys/firmware/acpi/tables/DMAR": "",
    "sys/kernel/iommu_groups/0/type": "DMA-FQ\n",
    "sys/kernel/iommu_groups/1/type": "DMA-FQ\n",
    "sys/bus/pci/drivers/vfio-pci/new_id": "",
    f"{NIC}/vendor": "0x8086\n",
    f"{NIC}/class": "0x020000\n",
    f"{NIC}/sriov_totalvfs": "64\n",
    f"{NIC}/sriov_numvfs": "8\n",
    f"{NIC}/driver": "-> ../../drivers/ice",
    f"{NIC}/iommu_group": "-> ../../../kernel/iommu_groups/0",
    f"{GPU}/vendor": "0x10de\n",
    f"{GPU}/class": "0x030200\n",
    f"{GPU}/driver": "-> ../../drivers/vfio-pci",
    f"{GPU}/iommu_group": "-> ../../../kernel/iommu_groups/1",
    "sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages": "16\n",
    "sys/devices/system/node/node0/hugepages/hugepages-1048576kB/free_hugepages": "4\n",
    "sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
    "sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages": "0\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids\n",
}
#: What is no file.
WELL: dict[str, Any] = {
    "virtualisation": Virtualisation("kvm"),
    "libvirt": Libvirt("qemu:///system", (11, 3, 0), (10, 0, 2)),
    "nvml": Nvml("580.1", 1),
    "clock": Clock(True, 900),
    "disk": Disk("/var/lib/casemate", 1_000_000, 400_000),
    "mkfs_ext4": "/usr/sbin/mkfs.ext4",
    "network_problem": "",
}


def machine(tmp_path: Path, files: Files, **more: Any) -> HostSurvey:
    """A machine that is only text, as the driver reads it."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text.removeprefix("-> "))
        else:
            path.write_text(text)
    facts, problems = read_files(tmp_path)
    return HostSurvey(**facts, **(WELL | more), problems=problems)


def without(*names: str, **changed: str) -> Files:
    kept = {name: text for name, text in GPU_SERVER.items() if not any(name.startswith(gone) for gone in names)}
    return kept | {name.replace("__", "/"): text for name, text in changed.items()}


def verdicts(survey: HostSurvey) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in diagnose(survey)}


def test_a_server_that_has_everything_is_fit(tmp_path: Path) -> None:
    findings = diagnose(machine(tmp_path, GPU_SERVER))
    shown = {finding.check: (finding.verdict, finding.message) for finding in findings}
    assert {check for check, (verdict, _) in shown.items() if verdict != Verdict.OK} == {"nvml"}
    assert shown["nvml"] == (Verdict.NOT_APPLICABLE, "all 1 NVIDIA GPUs are held by vfio-pci for guests")
    assert shown["hugepages"][1] == "cell 0: 16 of 1Gi, 4 free"
    assert shown["sriov"][1] == "0000:18:00.0: 8 of 64"
    assert shown["vfio"][1] == "vfio-pci is loaded and holds 1 functions"
    assert shown["kernel-line"][1] == "threads 2-7 are isolated, without ticks and callbacks"
    assert not any(finding.blocks or finding.remedy for finding in findings)


def survey_of(**changes: Any) -> HostSurvey:
    """A well machine without a device, as values."""
    base = HostSurvey(
        cmdline="", cpu_vendor="GenuineIntel", cpu_flags=frozenset({"vmx", "pdpe1gb"}), threads=CpuSet.parse("0-7"),
        iommu_table=True, iommu_groups=4, vfio_loaded=True, vfio_available=True, functions=(),
        pools=(Pool(0, 2048, 8, 8),), cgroup=Cgroup(2, frozenset({"cpu", "cpuset", "memory"})), **WELL,
    )  # fmt: skip
    return replace(base, **changes)


NVIDIA_GPU = PciFunction("0000:3b:00.0", 0x10DE, 0x030200, "nvidia")
AN_NIC = PciFunction("0000:18:00.0", 0x8086, 0x020000, "ice", total_vfs=64)
GUEST = frozenset({"hypervisor"})
LACKS: list[tuple[str, dict[str, Any], str, str]] = [
    ("virtualisation", {"virtualisation": Virtualisation("tcg", "no vmx"), "cpu_flags": GUEST}, "no vmx", "nested"),
    ("virtualisation", {"virtualisation": Virtualisation("tcg", "x"), "cpu_flags": frozenset()}, "emulated", "VT-x"),
    ("virtualisation", {"virtualisation": Virtualisation("tcg", "hangs")}, "hangs", "modprobe kvm_intel"),
    ("libvirt", {"libvirt": None, "problems": {"libvirt": "no such socket"}}, "no such socket", "apt-get install"),
    ("libvirt", {"libvirt": Libvirt("u", (8, 10, 0), (7, 2, 0))}, "8.10.0", "upgrade"),
    ("network", {"network_problem": "no nf_tables"}, "no nf_tables", "nftables"),
    ("disk", {"disk": Disk("/s", 100_000, 9_999)}, "9.8 of 97.7 GiB (9 %)", "--state-dir"),
    ("disk", {"disk": Disk("/s", 10_000, 4_000)}, "the least", "--state-dir"),
    ("volumes", {"mkfs_ext4": ""}, "no mkfs.ext4", "e2fsprogs"),
    ("clock", {"clock": Clock(False, 10)}, "not synchronised", "chrony"),
    ("clock", {"clock": Clock(True, 2_500_000)}, "2.5 s", "chrony"),
    ("cgroup", {"cgroup": Cgroup(1, frozenset(), hybrid=True)}, "beside it", "unified_cgroup_hierarchy"),
    ("cgroup", {"cgroup": Cgroup(2, frozenset({"cpu"}))}, "cpuset, memory", "cgroup_disable"),
    ("hugepages", {"pools": ()}, "no huge pages", "hugepagesz=1G"),
    ("hugepages", {"pools": (), "cpu_flags": frozenset({"vmx"})}, "no huge pages", "vm.nr_hugepages"),
    ("iommu", {"iommu_groups": 0, "functions": (AN_NIC,)}, "no IOMMU groups", "intel_iommu=on iommu=pt"),
    ("iommu", {"iommu_groups": 0, "functions": (AN_NIC,), "cmdline": "iommu=off"}, "turns the IOMMU off", "take"),
    ("iommu", {"iommu_groups": 0, "functions": (AN_NIC,), "iommu_table": False}, "describes no IOMMU", "VT-d"),
    ("vfio", {"vfio_loaded": False}, "not loaded", "modprobe vfio-pci"),
    ("vfio", {"vfio_loaded": False, "vfio_available": False}, "no vfio-pci", "CONFIG_VFIO_PCI"),
    ("sriov", {"functions": (AN_NIC,)}, "0000:18:00.0", "echo 64 > /sys/bus/pci/devices/0000:18:00.0/sriov_numvfs"),
    ("nvml", {"functions": (NVIDIA_GPU,), "nvml": None}, "does not answer", "nvidia-driver"),
    ("kernel-line", {"cmdline": "isolcpus=2-5 nohz_full=2-3"}, "nohz_full leaves out 4-5; rcu_nocbs leaves out 2-5", "rcu_nocbs=2-5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "changes", "says", "remedy"), LACKS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_lack_is_named_with_its_remedy(check: str, changes: dict[str, Any], says: str, remedy: str) -> None:
    finding = next(finding for finding in diagnose(survey_of(**changes)) if finding.check == check)
    assert finding.verdict == Verdict.LACKS
    assert says in finding.message
    assert remedy in finding.remedy
    assert finding.blocks == (check in REQUIRED)


def test_every_check_can_say_that_all_is_well_and_that_something_lacks() -> None:
    rich = survey_of(functions=(replace(AN_NIC, vfs=4), NVIDIA_GPU), cmdline="isolcpus=2 nohz_full=2 rcu_nocbs=2")
    assert set(verdicts(rich).values()) == {Verdict.OK}
    assert {check for check, *_ in LACKS} == set(CHECKS)


def test_what_nothing_could_use_is_not_applicable() -> None:
    found = verdicts(survey_of(iommu_groups=0))
    assert {check for check, verdict in found.items() if verdict == Verdict.NOT_APPLICABLE} == {
        "iommu", "vfio", "sriov", "nvml", "kernel-line",
    }  # fmt: skip


def test_what_could_not_be_looked_at_is_unknown_and_no_better_than_a_lack() -> None:
    findings = diagnose(HostSurvey(problems={"disk": "permission denied"}))
    assert {finding.verdict for finding in findings} == {Verdict.UNKNOWN}
    assert {finding.check for finding in findings if finding.blocks} == REQUIRED
    disk = next(finding for finding in findings if finding.check == "disk")
    assert "permission denied" in disk.message


def test_what_is_required_can_be_changed_and_only_by_name() -> None:
    assert required_of(["iommu"], ["virtualisation"]) == {"iommu", "libvirt", "network", "disk"}
    findings = diagnose(survey_of(virtualisation=Virtualisation("tcg", "x")), required_of([], ["virtualisation"]))
    assert not any(finding.blocks for finding in findings)
    with pytest.raises(UnknownCheck, match="kwm: there is no such check; there are virtualisation, "):
        required_of([], ["kwm"])


def test_a_machine_in_a_vm_without_anything_is_read_too(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": CPU.format(vendor="AuthenticAMD", flags="hypervisor"),
        "proc/cmdline": "console=ttyS0\n",
        "sys/devices/system/cpu/online": "0\n",
        "sys/fs/cgroup/memory/x": "",
        "sys/fs/cgroup/unified/cgroup.procs": "",
    }
    found = verdicts(machine(tmp_path, files))
    assert found["iommu"] == found["vfio"] == found["sriov"] == Verdict.NOT_APPLICABLE
    assert found["hugepages"] == found["cgroup"] == Verdict.LACKS


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (f"{NIC}/vendor", "sriov"),
        (f"{NIC}/sriov_numvfs", "sriov"),
        ("sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages", "hugepages"),
        ("sys/devices/system/cpu/online", "kernel-line"),
    ],
)
def test_a_file_that_reads_otherwise_is_a_problem_of_its_check_alone(tmp_path: Path, name: str, check: str) -> None:
    survey = machine(tmp_path, GPU_SERVER | {name: "not a number\n"})
    assert set(survey.problems) == {check}
    assert "not a number" in survey.problems[check]


@given(st.dictionaries(st.sampled_from(sorted(set(GPU_SERVER) - {f"{NIC}/driver"})), st.text(max_size=30), max_size=6))
def test_no_text_of_a_machine_breaks_the_reading(
    tmp_path_factory: pytest.TempPathFactory, changed: dict[str, str]
) -> None:
    files = GPU_SERVER | {name: text for name, text in changed.items() if not text.startswith("-> ")}
    survey = machine(tmp_path_factory.mktemp("m"), {n: t.encode("utf-8", "ignore").decode() for n, t in files.items()})
    for finding in diagnose(survey):
        assert bool(finding.remedy) == (finding.verdict in (Verdict.LACKS, Verdict.UNKNOWN))


@given(st.text(max_size=60))
def test_no_command_line_breaks_the_judgement(cmdline: str) -> None:
    findings = diagnose(survey_of(cmdline=f"isolcpus={cmdline} nohz_full={cmdline}"))
    assert len(findings) == len(CHECKS)


def test_lines_and_json_say_the_same() -> None:
    findings = diagnose(survey_of(clock=Clock(False, 1), virtualisation=Virtualisation("tcg", "x")))
    text = lines(findings)
    assert (
        next(line for line in text if line.startswith("lacks") and "(required)" in line).split()[1] == "virtualisation"
    )
    assert sum("remedy: " in line for line in text) == 2
    assert json.loads(json.dumps(plain(findings)))[0]["verdict"] == "lacks"


def test_the_kernel_tells_of_its_clock_and_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert ask_clock().error_us >= 0
    disk = ask_disk(tmp_path / "not/yet")
    assert disk.total_mib >= disk.free_mib > 0
    assert not (tmp_path / "not").exists()


def test_the_verb_ends_with_1_where_something_required_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = f"qemu:///system?socket={tmp_path}/nobody"
    flags = ["doctor", "-o", "json", "--libvirt-uri", nobody, "--state-dir", str(tmp_path / "state")]
    assert main(flags) == 1
    document = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in document["findings"]] == list(CHECKS)
    assert document["fit"] is False
    assert next(f for f in document["findings"] if f["check"] == "libvirt")["verdict"] == "lacks"
    assert not (tmp_path / "state").exists()
    every = [flag for name in REQUIRED for flag in ("--optional", name)]
    assert main([*flags, *every]) == 0
    assert json.loads(capsys.readouterr().out)["fit"] is True
    assert main(["doctor", "--optional", "kwm"]) == 2
    assert "kwm: there is no such check" in capsys.readouterr().err


def test_every_fact_is_used_by_a_check_or_names_the_machine() -> None:
    source = Path(sys.modules["casemate_agent.doctor.verdicts"].__file__ or "").read_text()
    unused = [field.name for field in fields(HostSurvey) if f"host.{field.name}" not in source]
    assert unused == ["hostname", "kernel"]
