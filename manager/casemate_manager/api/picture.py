"""One host's capacity as a message: cells, caches, cores and threads, and who holds what. No decisions here."""

from collections.abc import Mapping

from casemate_core.claims import Claim, HostClaims
from casemate_core.cpuset import bits
from casemate_core.topology import Core, CoreKind, Topology
from casemate_manager.scheduler.capacity import Amount, FunctionUse, HostCapacity, capacity
from casemate_manager.scheduler.headroom import Amounts, amounts_of, kind_of
from casemate_wire.v1 import top_pb2 as top


def amount(found: Amount) -> top.Amount:
    """An amount as a message."""
    return top.Amount(total=found.total, used=found.used, free=found.free, stranded=found.stranded)


def named_amounts(amounts: Amounts) -> list[top.NamedAmount]:
    """Amounts under their names, in their order."""
    return [top.NamedAmount(name=name, amount=amount(found)) for name, found in amounts.items()]


def of_host(topology: Topology, claims: HostClaims, names: Mapping[str, tuple[str, str]]) -> top.HostCapacity:
    """The picture of a host. ``names``: owner of a claim to (tenant, instance); an owner without is shown by itself.

    Holders are in the order of their lowest thread, then of their names, so that the picture stays as it is while nothing
    changes.
    """
    found = capacity(topology, claims)
    ordered = sorted(
        claims, key=lambda c: (not c.owned, c.owned.first if c.owned else 0, names.get(c.owner, ("~", c.owner)))
    )
    holder = {claim.owner: i for i, claim in enumerate(ordered, 1)}
    owner_of_thread = {thread: holder[claim.owner] for claim in ordered for thread in claim.owned}
    cores: dict[int, dict[int, list[Core]]] = {}
    for core in topology.cores:
        cores.setdefault(core.cell, {}).setdefault(core.l3, []).append(core)
    return top.HostCapacity(
        amounts=named_amounts(found.totals()),
        stranded=[
            top.StrandedAmount(
                name=s.dimension, cause=s.cause.value, amount=s.amount, cell=s.cell, where=s.where, hosts=1
            )
            for s in found.stranded
        ],
        cells=[
            top.CellCapacity(
                id=cell.id,
                kind=kind_of(cell),
                amounts=named_amounts(amounts_of(cell)),
                caches=[
                    top.CacheCapacity(id=l3, cores=[_core(topology, found, core, owner_of_thread) for core in members])
                    for l3, members in sorted(cores.get(cell.id, {}).items())
                ],
            )
            for cell in found.cells
        ],
        gpus=[
            _function(use, gpu.model, _with(ordered, use.id))
            for use, gpu in zip(found.gpus, topology.gpus, strict=True)
        ],
        ports=[
            top.PortCapacity(
                mac=port.mac,
                networks=port.networks,
                cell=port.home,
                vfs=amount(port.vfs),
                holders=[i for i, claim in enumerate(ordered, 1) if any(v.pf == port.mac for v in claim.vfs)],
            )
            for port in found.ports
        ],
        devices=[
            _function(use, ",".join(f"{k}={v}" for k, v in device.labels), _with(ordered, use.id))
            for use, device in zip(found.devices, topology.devices, strict=True)
        ],
        partitions=[
            top.PartitionCapacity(
                id=partition.id,
                gpus=partition.gpus,
                free=partition.free,
                holder=next((i for i, c in enumerate(ordered, 1) if c.partition == partition.id), 0),
            )
            for partition in found.partitions
        ],
        holders=[_holder(claim, names) for claim in ordered],
        offline=str(topology.offline),
    )


def _with(ordered: list[Claim], identity: str) -> list[int]:
    """Positions from 1 on of the claims that hold a GPU, whole or in part, or a device."""
    return [
        i
        for i, claim in enumerate(ordered, 1)
        if identity in claim.gpus or identity in claim.devices or any(s.gpu == identity for s in claim.shares)
    ]


def _core(topology: Topology, found: HostCapacity, core: Core, owners: Mapping[int, int]) -> top.CoreCapacity:
    index = topology.index
    threads = []
    for thread in bits(core.threads.mask):
        if thread in owners:
            state = "held"
        elif index.reserved >> thread & 1:
            state = "housekeeping"
        elif found.set_aside >> thread & 1:
            state = "shared"
        elif found.free >> thread & 1:
            state = "free"
        else:
            state = "unusable"
        threads.append(
            top.ThreadCapacity(
                number=thread,
                state=state,
                holder=owners.get(thread, 0),
                stranded=bool(found.stranded_threads >> thread & 1),
                isolated=bool(index.isolated >> thread & 1),
            )
        )
    kind = "" if core.kind is CoreKind.UNIFORM else core.kind.value
    return top.CoreCapacity(id=core.id, kind=kind, threads=threads)


def _function(use: FunctionUse, what: str, holders: list[int]) -> top.FunctionCapacity:
    return top.FunctionCapacity(
        id=use.id,
        what=what,
        cell=use.home,
        used_milli=use.used_milli,
        holders=holders,
        stranded=use.stranded.value if use.stranded else "",
    )


def _holder(claim: Claim, names: Mapping[str, tuple[str, str]]) -> top.Holder:
    tenant, instance = names.get(claim.owner, ("", ""))
    huge = sum((p.count + p.growth) * p.page_kib for p in claim.pages) // 1024
    return top.Holder(
        tenant=tenant,
        instance=instance,
        foreign="" if instance else claim.owner,
        threads=str(claim.owned),
        shared_milli=sum(s.milli for s in claim.shared),
        memory_mib=sum(m.charged_mib for m in claim.memory) + huge,
        gpus=len(set(claim.gpus) | {s.gpu for s in claim.shares}),
        vfs=len(claim.vfs),
    )
