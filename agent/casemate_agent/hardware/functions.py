"""Virtual functions and devices that an instance is given, and the contract of each. PURE.

What may live here: the frozen types that the port ``drivers.ports.Functions`` speaks, what an instance is to be given
(`grant_of`), and the comparison of what is wanted with what was read back.

Theory of operation. A virtual function has a state that outlives its user: MAC address, VLAN, spoof check, trust, rates, link.
Whoever gets it next gets that too, unless somebody takes it away. So its state is a contract: all of it is written, read
back and compared when it is given, and written to `CLEAN`, read back and compared when it comes back. Before anything is
written, a `Stamp` says on the host for whom it is, by the epoch and generation of the placement; a release touches what
carries its own stamp or an older one of the same owner, and nothing else. Stamps lie where a reboot takes them away, for it
takes away the state that they speak of.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance

NO_MAC = "00:00:00:00:00:00"


@dataclass(frozen=True, slots=True)
class VfState:
    """Everything that a port keeps for one of its VFs. Rates in Mbit/s, 0: no limit. ``link``: auto, enable, disable.

    None: the port's driver does not say, and cannot be told.
    """

    mac: str = NO_MAC
    vlan: int = 0
    spoofchk: bool | None = True
    trust: bool | None = False
    min_rate_mbps: int = 0
    max_rate_mbps: int = 0
    link: str = "auto"

    def differences(self, found: "VfState") -> tuple[str, ...]:
        """Field by field, where ``found`` is not as this one asks: ``vlan is 0, should be 100``."""
        told = []
        for name in ("mac", "vlan", "spoofchk", "trust", "min_rate_mbps", "max_rate_mbps", "link"):
            wanted, is_now = getattr(self, name), getattr(found, name)
            if wanted != is_now and is_now is not None:
                told.append(f"{name} is {_word(is_now)}, should be {_word(wanted)}")
            elif is_now is None and wanted is True and name == "trust":
                told.append("trust cannot be given by this port's driver")
        return tuple(told)


#: As a VF is left for the next one.
CLEAN = VfState()


def _word(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True, order=True)
class Stamp:
    """For whom a function is: the instance, and the placement that gave it."""

    owner: str
    epoch: int
    generation: int

    def covers(self, other: "Stamp") -> bool:
        """Whether a release under this stamp may touch what carries the other."""
        return self.owner == other.owner and (self.epoch, self.generation) >= (other.epoch, other.generation)


@dataclass(frozen=True, slots=True)
class GrantedVf:
    """A VF to be given: which, and in which state."""

    pf: str
    index: int
    state: VfState

    @property
    def key(self) -> str:
        return vf_key(self.pf, self.index)


@dataclass(frozen=True, slots=True)
class Grant:
    """All functions of one instance, in the order in which its domain has them."""

    stamp: Stamp
    vfs: tuple[GrantedVf, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its functions on this host."""
        return (*(vf.key for vf in self.vfs), *self.devices)

    def __bool__(self) -> bool:
        return bool(self.vfs or self.devices)


@dataclass(frozen=True, slots=True)
class VfFacts:
    """A VF as the host has it. ``address`` and ``driver`` (empty: none is bound) are true at the time of the reading."""

    pf: str
    index: int
    address: str
    driver: str
    state: VfState
    stamp: Stamp | None = None

    @property
    def key(self) -> str:
        return vf_key(self.pf, self.index)

    @property
    def is_clean(self) -> bool:
        """As it should be while nobody has it."""
        return not self.driver and not CLEAN.differences(self.state)


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device as the host has it."""

    id: str
    address: str
    driver: str
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """All functions that may be given away. ``problems``: pools that are not as configured, with the reason."""

    vfs: Mapping[str, VfFacts] = field(default_factory=dict)
    devices: Mapping[str, DeviceState] = field(default_factory=dict)
    #: Stamps on what is not there any more.
    lost: Mapping[str, Stamp] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    #: Ports (by MAC) that are to be cut and have no VF yet.
    uncut: tuple[str, ...] = ()

    def stamped(self) -> dict[str, Stamp]:
        """Key of each function that is somebody's."""
        found = {key: vf.stamp for key, vf in self.vfs.items() if vf.stamp is not None}
        found |= {key: device.stamp for key, device in self.devices.items() if device.stamp is not None}
        return found | dict(self.lost)

    def leak(self, key: str) -> str:
        """What is not clean about a VF."""
        vf = self.vfs[key]
        return "; ".join((*CLEAN.differences(vf.state), *([f"bound to {vf.driver}"] if vf.driver else [])))

    def leaking(self) -> tuple[tuple[str, str], ...]:
        """VFs that nobody has and that are not clean, each with what is left of somebody."""
        dirty = sorted(key for key, vf in self.vfs.items() if vf.stamp is None and not vf.is_clean)
        return tuple((key, self.leak(key)) for key in dirty)

    def leaks(self) -> tuple[str, ...]:
        """`leaking`, a line each."""
        return tuple(f"{key}: {detail}" for key, detail in self.leaking())


def vf_key(pf: str, index: int) -> str:
    """Name of a VF on its host."""
    return f"{pf}/{index}"


def grant_of(desired: DesiredInstance) -> Grant:
    """What the placement gives to the instance. Raises InternalError where the claim and the interfaces contradict each
    other: the manager made both."""
    placement = desired.placement
    nics = [nic for nic in desired.nics if nic.type == "sriov"]
    vfs = []
    for claim in sorted(placement.claim.vfs, key=lambda vf: vf.nic):
        if not 0 <= claim.nic < len(nics):
            raise InternalError(
                f"{desired.uid}: VF {claim.index} of {claim.pf} serves interface {claim.nic} of {len(nics)}"
            )
        nic = nics[claim.nic]
        state = VfState(
            mac=nic.mac,
            vlan=nic.vlan,
            # A guest that may change its address cannot be held to the one that it was given.
            spoofchk=not nic.trust,
            trust=nic.trust,
            min_rate_mbps=nic.min_rate_mbps,
            max_rate_mbps=nic.max_rate_mbps,
        )
        vfs.append(GrantedVf(claim.pf, claim.index, state))
    stamp = Stamp(desired.uid, placement.epoch, placement.generation)
    return Grant(stamp, tuple(vfs), tuple(placement.claim.devices))
