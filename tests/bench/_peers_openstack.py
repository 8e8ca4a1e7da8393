"""OpenStack's placement of instances with dedicated CPUs, in one process: Placement, and nova's fit on each candidate.

Run by ``peers.py`` with the interpreter of the peers' own environment: ``_peers_openstack.py FLEET.json BUDGET_S``. It
imports nothing of ours. The last line of its output is JSON.

Theory of operation. One placement is what nova's scheduler and compute do for it: ask Placement for allocation candidates; try
``numa_fit_instance_to_host`` on each (nova's filters all run before the weighers); take the fitting host with the most free
memory (nova's default); claim the allocation in Placement; fit once more on the host, as the compute service does under its
lock, and count the result as used. Placement is called through its WSGI application, on SQLite in memory. Left out, all in
the peer's favour: HTTP, keystone, RabbitMQ, MySQL, the cell databases, reading hosts' state for each request, the other
filters and weighers.
"""

import json
import logging
import sys
import time
import uuid

from nova import conf as nova_conf
from nova.objects import instance_numa, numa
from nova.virt import hardware
from oslo_config import cfg
from placement import conf as placement_conf
from placement import db_api, deploy
from placement.db.sqlalchemy import migration, models
from webob import Request

VERSION = "placement 1.39"
#: Inventory classes that the requests use.
CLASSES = ("PCPU", "MEMORY_MB", "DISK_GB")
WARM_UP = 2


def uuid_of(name):
    """The same for the same name."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))


class Placement:
    """The service, filled with a fleet."""

    def __init__(self, fleet):
        config = cfg.ConfigOpts()
        placement_conf.register_opts(config)
        config.set_override("connection", "sqlite://", group="placement_database")
        config.set_override("auth_strategy", "noauth2", group="api")
        config([], project="placement", default_config_files=[])
        db_api.configure(config)
        engine = db_api.get_placement_engine()
        migration.create_schema(engine)
        self.app = deploy.loadapp(config)
        self.shapes = fleet["shapes"]
        self.disk_gb = fleet["disk_mib"] // 1024
        self._fill(engine, fleet)

    def _fill(self, engine, fleet):
        """Written as rows, which takes seconds and not minutes; they are what the API would write."""
        threads = sum(len(core) for cell in fleet["cells"] for core in cell["siblings"])
        memory = sum(cell["memory_mib"] for cell in fleet["cells"])
        totals = {"PCPU": threads, "MEMORY_MB": memory, "DISK_GB": fleet["total_disk_mib"] // 1024}
        providers, inventories, traits, consumers, allocations = [], [], [], [], []
        with engine.begin() as db:
            classes = {
                n: i
                for i, n in db.execute(
                    models.ResourceClass.__table__.select().with_only_columns(
                        models.ResourceClass.id, models.ResourceClass.name
                    )
                )
            }
            trait = next(
                i
                for i, n in db.execute(
                    models.Trait.__table__.select().with_only_columns(models.Trait.id, models.Trait.name)
                )
                if n == "HW_CPU_HYPERTHREADING"
            )
            db.execute(models.Project.__table__.insert(), [{"id": 1, "external_id": "bench"}])
            db.execute(models.User.__table__.insert(), [{"id": 1, "external_id": "bench"}])
            for number, host in enumerate(fleet["hosts"], 1):
                providers.append(
                    {
                        "id": number,
                        "uuid": uuid_of(host["name"]),
                        "name": host["name"],
                        "generation": 1,
                        "root_provider_id": number,
                        "parent_provider_id": None,
                    }
                )
                traits.append({"trait_id": trait, "resource_provider_id": number})
                inventories += [
                    {
                        "resource_provider_id": number,
                        "resource_class_id": classes[name],
                        "total": total,
                        "reserved": 0,
                        "min_unit": 1,
                        "max_unit": total,
                        "step_size": 1,
                        "allocation_ratio": 1.0,
                    }
                    for name, total in totals.items()
                ]
                for held in host["held"]:
                    consumer = uuid_of(held["uid"])
                    consumers.append({"uuid": consumer, "project_id": 1, "user_id": 1, "generation": 1})
                    allocations += [
                        {
                            "resource_provider_id": number,
                            "consumer_id": consumer,
                            "resource_class_id": classes[n],
                            "used": u,
                        }
                        for n, u in self.resources(held["shape"]).items()
                    ]
            for model, rows in (
                (models.ResourceProvider, providers),
                (models.Inventory, inventories),
                (models.ResourceProviderTrait, traits),
                (models.Consumer, consumers),
                (models.Allocation, allocations),
            ):
                db.execute(model.__table__.insert(), rows)

    def resources(self, shape):
        """Amounts by class of a shape."""
        given = self.shapes[shape]
        return {"PCPU": given["vcpus"], "MEMORY_MB": given["memory_mib"], "DISK_GB": self.disk_gb}

    def call(self, method, path, body=None):
        """The answer's body; raises RuntimeError with what the service said."""
        request = Request.blank(path, method=method)
        request.headers["x-auth-token"] = "admin"
        request.headers["openstack-api-version"] = VERSION
        request.accept = "application/json"
        if body is not None:
            request.body = json.dumps(body).encode()
            request.content_type = "application/json"
        response = request.get_response(self.app)
        if response.status_int >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {response.text}")
        return json.loads(response.body) if response.body else None

    def candidates(self, shape):
        """Up to 1000 (nova's default) allocation requests."""
        amounts = ",".join(f"{name}:{amount}" for name, amount in self.resources(shape).items())
        required = "&required=HW_CPU_HYPERTHREADING" if self.shapes[shape]["require"] else ""
        answer = self.call("GET", f"/allocation_candidates?limit=1000&resources={amounts}{required}")
        return answer["allocation_requests"]

    def claim(self, consumer, allocation):
        """Take one of the candidates."""
        body = {
            "allocations": allocation["allocations"],
            "mappings": allocation["mappings"],
            "project_id": "bench",
            "user_id": "bench",
            "consumer_generation": None,
            "consumer_type": "INSTANCE",
        }
        self.call("PUT", f"/allocations/{consumer}", body)


def host_topology(fleet, host):
    """nova's view of a host and of what it holds."""
    cells = []
    for cell in fleet["cells"]:
        held = [h for h in host["held"] if h["cell"] == cell["id"]]
        memory = {True: 0, False: 0}
        for h in held:
            memory[bool(fleet["shapes"][h["shape"]]["page_kib"])] += fleet["shapes"][h["shape"]]["memory_mib"]
        small_mib = cell["memory_mib"] - cell["pages_1g"] * 1024
        cells.append(
            numa.NUMACell(
                id=cell["id"],
                cpuset=set(),
                pcpuset={t for core in cell["siblings"] for t in core},
                memory=cell["memory_mib"],
                cpu_usage=sum(len(h["threads"]) for h in held),
                memory_usage=sum(memory.values()),
                pinned_cpus={t for h in held for t in h["threads"]},
                siblings=[set(core) for core in cell["siblings"]],
                mempages=[
                    numa.NUMAPagesTopology(size_kb=4, total=small_mib * 256, used=memory[False] * 256, reserved=0),
                    numa.NUMAPagesTopology(
                        size_kb=1 << 20, total=cell["pages_1g"], used=memory[True] // 1024, reserved=0
                    ),
                ],
                socket=cell["id"],
            )
        )
    return numa.NUMATopology(cells=cells)


def instance_topology(shape):
    """nova's view of a request: one guest cell with dedicated CPUs."""
    cell = instance_numa.InstanceNUMACell(
        id=0,
        cpuset=set(),
        pcpuset=set(range(shape["vcpus"])),
        memory=shape["memory_mib"],
        pagesize=shape["page_kib"] or hardware.MEMPAGES_SMALL,
        cpu_policy="dedicated",
        cpu_thread_policy="require" if shape["require"] else "prefer",
    )
    return instance_numa.InstanceNUMATopology(cells=[cell], emulator_threads_policy=None)


def fit(topology, asked):
    """nova's fit; it writes into what it is asked for, so that each host gets a copy, as in nova."""
    return hardware.numa_fit_instance_to_host(topology, asked.obj_clone(), {}, limits=None)


def main():
    with open(sys.argv[1]) as file:
        fleet = json.load(file)
    budget_s = float(sys.argv[2])
    logging.disable(logging.WARNING)
    nova_conf.CONF([], project="nova", default_config_files=[])
    service = Placement(fleet)
    hosts = {uuid_of(host["name"]): host_topology(fleet, host) for host in fleet["hosts"]}
    asked = [instance_topology(shape) for shape in fleet["shapes"]]
    parts = {"candidates": 0.0, "fit": 0.0, "claim": 0.0}
    tried = refused = 0
    first_fit_s, times = [], []
    started = time.monotonic()
    # The first placements find caches empty; they are made, and not counted.
    for at, shape in enumerate(fleet["arrivals"][:WARM_UP] + fleet["arrivals"]):
        if at >= WARM_UP + 3 and time.monotonic() - started > budget_s:
            break
        counted = at >= WARM_UP
        wall, begin = time.perf_counter(), time.process_time()
        allocations = service.candidates(shape)
        found = time.process_time()
        fitting, first = [], None
        for allocation in allocations:
            (provider,) = allocation["allocations"]
            if fit(hosts[provider], asked[shape]) is not None:
                fitting.append((allocation, provider))
                first = first or time.process_time()
        if not fitting:
            refused += counted
            continue
        allocation, provider = max(fitting, key=lambda f: sum(cell.avail_memory for cell in hosts[f[1]].cells))
        fitted = time.process_time()
        service.claim(str(uuid.uuid4()), allocation)
        exact = fit(hosts[provider], asked[shape])
        pinned = set(exact.cells[0].cpu_pinning.values())
        if len(pinned) != fleet["shapes"][shape]["vcpus"]:
            raise RuntimeError(f"nova named {len(pinned)} threads for {fleet['shapes'][shape]['vcpus']} CPUs")
        hosts[provider] = hardware.numa_usage_from_instance_numa(hosts[provider], exact)
        end = time.process_time()
        if counted:
            times.append((time.perf_counter() - wall, end - begin))
            parts["candidates"] += found - begin
            parts["fit"] += fitted - found
            parts["claim"] += end - fitted
            first_fit_s.append(end - begin - (fitted - first))
            tried += len(allocations)
    count = len(times)
    print(
        json.dumps(
            {
                "times": times,
                "refused": refused,
                "candidates": tried / count if count else None,
                "candidates_cpu_ms": parts["candidates"] / count * 1000 if count else None,
                "fit_cpu_ms_per_host": parts["fit"] / tried * 1000 if tried else None,
                "claim_cpu_ms": parts["claim"] / count * 1000 if count else None,
                "first_fit_cpu_ms": sum(first_fit_s) / count * 1000 if count else None,
            }
        )
    )


if __name__ == "__main__":
    main()
