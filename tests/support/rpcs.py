"""Every method of every service of the schema, found from the generated modules: for tests that go through all of them."""

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from casemate_wire import v1


@dataclass(frozen=True)
class Method:
    """One method: how to call it, and what with."""

    service: str
    name: str
    stub: Any
    request: Any
    streams_in: bool
    streams_out: bool

    def of(self, channel: Any) -> Any:
        """The method on a channel."""
        return getattr(self.stub(channel), self.name)


@cache
def methods() -> dict[str, Method]:
    """By full name, as ``/casemate.v1.Fleet/Apply``."""
    found = {}
    for module in pkgutil.iter_modules(v1.__path__):
        if not module.name.endswith("_pb2"):
            continue
        messages = importlib.import_module(f"{v1.__name__}.{module.name}")
        for service in messages.DESCRIPTOR.services_by_name.values():
            stubs = importlib.import_module(f"{v1.__name__}.{module.name}_grpc")
            stub = getattr(stubs, f"{service.name}Stub")
            for method in service.methods:
                found[f"/{service.full_name}/{method.name}"] = Method(
                    service.name,
                    method.name,
                    stub,
                    GetMessageClass(method.input_type),
                    method.client_streaming,
                    method.server_streaming,
                )
    return found
