"""What the doctor sees on a simulated host: a machine that is well, but for the faults that were asked of it."""

from typing import TYPE_CHECKING

from casemate_agent.doctor.facts import Cgroup, Clock, Disk, HostSurvey, Libvirt, Pool, Virtualisation

if TYPE_CHECKING:
    from casemate_agent.drivers.simulated_ports import Lease


class SimulatedSurvey:
    """``ports.Survey`` of a :class:`~casemate_agent.drivers.simulated.SimulatedHost`."""

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease

    async def look(self, deadline_s: float) -> HostSurvey:
        return await self._lease.call("machine", "look", self._look, deadline_s)

    def _look(self) -> HostSurvey:
        host = self._lease.host
        no_kvm, topology = host.faults.no_kvm, host.topology
        free_mib = 0 if host.faults.disk_full else max(0, topology.disk_mib - host.disk_used_mib())
        hung = "hypervisor" in host.faults.hung
        return HostSurvey(
            hostname=host.name,
            kernel="simulated",
            cmdline="",
            cpu_vendor="simulated",
            threads=topology.online,
            virtualisation=Virtualisation("tcg", no_kvm) if no_kvm else Virtualisation("simulated"),
            iommu_table=False,
            iommu_groups=0,
            vfio_loaded=False,
            vfio_available=False,
            functions=(),
            pools=tuple(
                Pool(cell.id, pool.page_kib, pool.count, pool.count) for cell in topology.cells for pool in cell.pools
            ),
            libvirt=None if hung else Libvirt("simulated", (12, 0, 0), (10, 0, 0)),
            cgroup=Cgroup(2, frozenset({"cpu", "cpuset", "memory"})),
            clock=Clock(True, 0),
            mkfs_ext4="simulated",
            disk=Disk("simulated", topology.disk_mib, free_mib),
            network_problem=host.faults.no_rules,
            problems={"libvirt": "the hypervisor hangs"} if hung else {},
        )
