"""Who holds what on one host: ``Claim`` of one instance, ``HostClaims`` of all of them, and the rules that they keep."""

from casemate_core.claims.ledger import DoubleOwner, HostClaims, StaleClaim, Usage
from casemate_core.claims.model import (
    Claim,
    GpuShare,
    OutsideRoom,
    Pages,
    PlainMemory,
    SharedCpu,
    VfClaim,
    volume_claim,
    volume_owner,
)
from casemate_core.claims.rules import ClaimRule, ClaimViolation, check, verify_claim

__all__ = [
    "Claim",
    "ClaimRule",
    "ClaimViolation",
    "DoubleOwner",
    "GpuShare",
    "HostClaims",
    "OutsideRoom",
    "Pages",
    "PlainMemory",
    "SharedCpu",
    "StaleClaim",
    "Usage",
    "VfClaim",
    "check",
    "verify_claim",
    "volume_claim",
    "volume_owner",
]
