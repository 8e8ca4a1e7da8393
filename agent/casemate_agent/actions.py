"""The closed set of what an agent can do.

What may live here: one frozen dataclass for each kind of action, and nothing that carries one out
(:mod:`casemate_agent.execute.executor` does). Every action but Reboot and Reset is idempotent: done twice, or done after it was
half done, it leaves the same machine. Each carries its reason, which is what the log says.
"""

from dataclasses import dataclass

from casemate_agent.hardware.functions import Stamp
from casemate_agent.realtime.certificate import Under
from casemate_core.cpuset import EMPTY, CpuSet
from casemate_core.spec.instance import DesiredInstance, HostNetwork, ImageRef, VolumeRef


@dataclass(frozen=True, slots=True)
class FetchImage:
    """Have an image in the store."""

    image: ImageRef
    reason: str


@dataclass(frozen=True, slots=True)
class EnsureNetwork:
    """Have the bridge of a network up, with its rules."""

    network: HostNetwork
    reason: str


@dataclass(frozen=True, slots=True)
class CreateOverlay:
    """Make the root disk of an instance over its image."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class WriteSeed:
    """Write the NoCloud seed of an instance."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class Guard:
    """Let through on the taps of an instance its own addresses only."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class Plug:
    """Put a tap of a running instance back on the bridge of its network."""

    uid: str
    tap: str
    network: str
    reason: str


@dataclass(frozen=True, slots=True)
class GiveFunctions:
    """Have the instance's virtual functions and devices in their state, and bound for its domain."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Clean and unbind functions that carry this stamp, or an older one of the same instance."""

    uid: str
    stamp: Stamp
    keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Bind the threads of a running domain: each vCPU to its own set, or all to the only one, and all others to ``rest``."""

    uid: str
    vcpus: tuple[CpuSet, ...]
    rest: CpuSet
    reason: str


@dataclass(frozen=True, slots=True)
class Define:
    """Define the domain of an instance, its whole record in the metadata. ``rest``: where those of its threads run that have
    none of their own (empty: anywhere)."""

    desired: DesiredInstance
    reason: str
    rest: CpuSet = EMPTY


@dataclass(frozen=True, slots=True)
class Start:
    """Start the defined domain. ``floats``: what of the pool it will run on; it is not started where somebody else has one of
    these threads by then (:mod:`casemate_agent.plan.pool`). ``frozen``: its guest does not run until it is resumed."""

    uid: str
    reason: str
    floats: CpuSet = EMPTY
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Isolate:
    """Have the cpuset of each vCPU of an active domain be a partition ``isolated`` with these threads, where its set is not
    empty."""

    uid: str
    sets: tuple[CpuSet, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Take back threads that a slice may take for itself, though no VM of it has them."""

    cpus: CpuSet
    reason: str


@dataclass(frozen=True, slots=True)
class AttachGuest:
    """Keep a connection to the guest's helper."""

    uid: str
    channel_path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ApplyPods:
    """Make these the pods of the guest."""

    desired: DesiredInstance
    revision: str
    reason: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Ask the guest to power off: its helper where it is connected (``helper``), else by the power button."""

    uid: str
    helper: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Destroy:
    """End the domain's process at once."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Suspend:
    """Freeze the domain's guest where it stands."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a frozen guest go on."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reboot:
    """Ask the guest's helper to boot the guest anew. Not idempotent: planned once for an order (`orders`)."""

    uid: str
    order: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reset:
    """Press the reset button of the domain. Not idempotent: planned once for an order (`orders`)."""

    uid: str
    order: str
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveDisks:
    """Remove the root disks of an instance that are not the one that is wanted."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class CreateVolume:
    """Have the disk of a volume that was never made."""

    volume: VolumeRef
    reason: str


@dataclass(frozen=True, slots=True)
class GrowVolume:
    """Have the disk of a volume as large as asked: while the instance ``uid`` runs on it (``live``), or while nobody does."""

    uid: str
    volume: VolumeRef
    live: bool
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveVolume:
    """Delete the data of a volume, because the volume was deleted."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Undefine:
    """Forget the domain."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class DetachGuest:
    """Let go of the guest's channel."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unguard:
    """Remove the rules of the instance's taps."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveFiles:
    """Remove the instance's overlay and seed."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class ForgetClaim:
    """Remove the instance's record from the ledger: the last step of its end, its resources are free after it."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tune:
    """Write a file of the kernel by which the host is tuned for real time."""

    path: str
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Certify:
    """Measure the latency in the guest, for an order, under what is so now. Nothing of the instance changes by it."""

    uid: str
    order: str
    duration_s: float
    under: Under
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveStrays:
    """Remove unfinished downloads and files that nobody owns."""

    reason: str


@dataclass(frozen=True, slots=True)
class RemoveImage:
    """Remove an image that no instance uses."""

    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveNetwork:
    """Remove a bridge that no network of this host has any more."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class PrepareGpus:
    """Have the instance's GPUs recorded as its own, and bound for its domain."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class OpenPassage:
    """Wait for an instance that another host sends. ``rest``: as of a domain that is defined."""

    desired: DesiredInstance
    rest: CpuSet
    reason: str

    @property
    def uid(self) -> str:
        return self.desired.uid


@dataclass(frozen=True, slots=True)
class ClosePassage:
    """Wait for it no longer."""

    uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """Send a running instance to the host that waits for it, by its order. It arrives there frozen."""

    desired: DesiredInstance
    reason: str

    @property
    def uid(self) -> str:
        return self.desired.uid


@dataclass(frozen=True, slots=True)
class GiveShares:
    """Have the instance's slices of GPUs made for its domain."""

    desired: DesiredInstance
    reason: str


@dataclass(frozen=True, slots=True)
class TakeShares:
    """Destroy slices of GPUs that an instance had, by name."""

    uid: str
    shares: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class AttachGpus:
    """Record that a domain is about to run with its GPUs: from here on they are dirty."""

    uid: str
    gpus: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class EnrolGpu:
    """Begin the record of a GPU that has none. ``owner``: whose domain runs with it; empty: nobody knows who had it."""

    gpu: str
    owner: str
    tenant: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnprepareGpu:
    """Take back a GPU that was prepared and never attached."""

    gpu: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReturnGpu:
    """Record that a GPU has come back from its instance, once no process holds it."""

    gpu: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class SanitiseGpu:
    """Climb the ladder with a GPU: to its passport, and then free or quarantined. ``order``: of the operator who asked."""

    gpu: str
    generation: int
    reason: str
    order: str = ""


@dataclass(frozen=True, slots=True)
class QuarantineGpu:
    """Keep a GPU from everybody, for ``why``: now, or when it comes back."""

    gpu: str
    why: str
    reason: str
    order: str = ""
    #: Others have slices of it: when the last of them is gone.
    later: bool = False


@dataclass(frozen=True, slots=True)
class ClearGpu:
    """Let a GPU out of quarantine, to be sanitised."""

    gpu: str
    reason: str
    order: str = ""


@dataclass(frozen=True, slots=True)
class KeepGpu:
    """Record that the host's own driver has a free GPU, or that it has not."""

    gpu: str
    by_host: bool
    reason: str


@dataclass(frozen=True, slots=True)
class LoseGpu:
    """Record that a GPU that was clean is not there: what is done with it meanwhile nobody of this host sees."""

    gpu: str
    reason: str


GpuAction = EnrolGpu | UnprepareGpu | ReturnGpu | SanitiseGpu | QuarantineGpu | ClearGpu | KeepGpu | LoseGpu

Action = (
    FetchImage
    | EnsureNetwork
    | CreateOverlay
    | WriteSeed
    | Guard
    | Plug
    | Pin
    | GiveFunctions
    | TakeBack
    | Define
    | Start
    | Isolate
    | Reclaim
    | AttachGuest
    | ApplyPods
    | Shutdown
    | Destroy
    | Suspend
    | Resume
    | Reboot
    | Reset
    | RemoveDisks
    | CreateVolume
    | GrowVolume
    | RemoveVolume
    | Undefine
    | DetachGuest
    | Unguard
    | RemoveFiles
    | ForgetClaim
    | RemoveStrays
    | RemoveImage
    | RemoveNetwork
    | Tune
    | Certify
    | OpenPassage
    | ClosePassage
    | Transfer
    | PrepareGpus
    | AttachGpus
    | GiveShares
    | TakeShares
    | GpuAction
)


#: What may be done side by side where it follows one another in a plan, by lane. The rules of taps do not say whose they are:
#: the seed goes before them, so that with the ledger lost too there is a file that names their instance.
BESIDE: dict[type, int] = {CreateOverlay: 0, WriteSeed: 1, Guard: 1}


def stages(actions: tuple[Action, ...]) -> list[list[list[Action]]]:
    """The same actions as stages, one after the other, of lanes, side by side; of a lane's actions one follows the other."""
    found: list[list[list[Action]]] = []
    lanes: dict[int, list[Action]] = {}
    for action in actions:
        lane = BESIDE.get(type(action))
        if lane is None:
            lanes = {}
            found.append([[action]])
            continue
        if not lanes:
            found.append([])
        if lane not in lanes:
            lanes[lane] = []
            found[-1].append(lanes[lane])
        lanes[lane].append(action)
    return found


def name(action: Action) -> str:
    """The name of an action's kind, as logs, intents and failures carry it."""
    return type(action).__name__
