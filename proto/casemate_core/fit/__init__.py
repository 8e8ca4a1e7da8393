"""How what one instance asks fits the free resources of one host: exactly, best first, or why not.

The same function runs in the manager, which decides, and in the agent, which checks before it acts. ``request`` has the
vocabulary, ``solve`` the entry points and the documented order.
"""

from casemate_core.fit.request import (
    BadRequest,
    CellPolicy,
    CoreChoice,
    CpuPolicy,
    CpuRequest,
    DeviceRequest,
    EmulatorPolicy,
    GpuLink,
    GpuRequest,
    MemoryRequest,
    Near,
    NicRequest,
    Overcommit,
    Request,
    ThreadPolicy,
    VolumeRequest,
)
from casemate_core.fit.solve import NO_OVERCOMMIT, Fit, Key, Refusal, fit, fits

__all__ = [
    "NO_OVERCOMMIT",
    "BadRequest",
    "CellPolicy",
    "CoreChoice",
    "CpuPolicy",
    "CpuRequest",
    "DeviceRequest",
    "EmulatorPolicy",
    "Fit",
    "GpuLink",
    "GpuRequest",
    "Key",
    "MemoryRequest",
    "Near",
    "NicRequest",
    "Overcommit",
    "Refusal",
    "Request",
    "ThreadPolicy",
    "VolumeRequest",
    "fit",
    "fits",
]
