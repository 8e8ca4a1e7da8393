"""The connection to a manager: one channel, deadlines, a short retry, and errors turned into failures.

A call that the manager did not answer (UNAVAILABLE) is tried again with full jitter for `Settings.retry_s`. That is safe for
every call: reads change nothing, and requests that change something carry a request key, with which they have one effect
however often they arrive. gRPC is imported when a `Client` is made, not before.
"""

import random
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from casemate_cli import failure
from casemate_cli.settings import Settings

if TYPE_CHECKING:
    from casemate_wire.v1 import channels_pb2_grpc
    from casemate_wire.v1 import operators_pb2 as pb

#: A page of a long list holds many objects with their manifests; gRPC's default of 4 MiB is too small for 1,000 of them.
MAX_MESSAGE_BYTES = 64 << 20
#: The manager's page size for lists; the first page is shown while the next ones are fetched.
PAGE_SIZE = 500
FIRST_PAGE_SIZE = 100
#: How long a manager that went away is waited for by who watches: it may be upgraded, or start on another machine.
PATIENCE_S = 120.0
#: When its being away is told.
TELL_S = 1.0

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A refused connection is tried again at once, not after a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # By its name the least time between two attempts; in truth the most time for one: TCP and TLS over a slow line, or with a
    # machine that is busy, take their time.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A follow that lasts for hours notices a peer that vanished.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A proxy in the environment is meant for the web, not for a manager on loopback.
    ("grpc.enable_http_proxy", 0),
)


class Client:
    """Calls of one invocation. A context manager that closes its channel."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.channel = dial(settings)
        from casemate_wire.v1 import operators_pb2_grpc

        if settings.token:
            import grpc

            from casemate_cli.bearer import Bearer

            self.channel = grpc.intercept_channel(self.channel, Bearer(settings.token))
        self.stub = operators_pb2_grpc.FleetStub(self.channel)

    @property
    def channels(self) -> "channels_pb2_grpc.ChannelsStub":
        """The service of side streams."""
        from casemate_wire.v1 import channels_pb2_grpc

        stub: channels_pb2_grpc.ChannelsStub = channels_pb2_grpc.ChannelsStub(self.channel)
        return stub

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()

    def call(self, method: Callable[..., Any], request: Any, doing: str = "") -> Any:
        """The answer to one unary call. Raises Failure."""
        import grpc

        give_up_s = time.monotonic() + self.settings.retry_s
        wait_s = 0.05
        while True:
            try:
                return method(request, timeout=self.settings.request_timeout_s)
            except grpc.RpcError as error:
                if not _transient(error) or time.monotonic() + wait_s > give_up_s:
                    raise failure.from_rpc(error, self.settings.manager, doing) from None
                time.sleep(random.uniform(0, wait_s))
                wait_s = min(wait_s * 2, 0.5)

    def stream(self, method: Callable[..., Any], request: Any, doing: str = "", timeout_s: float | None = None) -> Any:
        """Messages of a server stream, until it ends. Raises Failure; the call ends with the iteration."""
        import grpc

        call = method(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise failure.from_rpc(error, self.settings.manager, doing) from None
        finally:
            call.cancel()

    # --- what several verbs ask ---------------------------------------------------------------------------------------

    def get(self, kind: str, name: str, tenant: str) -> "pb.Resource":
        """One object. Raises Failure with code NOT_FOUND."""
        from casemate_wire.v1 import operators_pb2 as pb

        answer: pb.Resource = self.call(self.stub.Get, pb.GetRequest(kind=kind, name=name, tenant=tenant))
        return answer

    def pages(
        self, kind: str, *, tenant: str, selector: str = "", owner: str = "", page_size: int = PAGE_SIZE
    ) -> "Iterator[pb.ListResponse]":
        """Pages of a list, in the manager's order. An empty tenant means all of them."""
        from casemate_wire.v1 import operators_pb2 as pb

        # The first page is short: it is on the screen while the manager makes the next one.
        first = min(page_size, FIRST_PAGE_SIZE)
        request = pb.ListRequest(kind=kind, tenant=tenant, selector=selector, owner=owner, page_size=first)
        while True:
            page: pb.ListResponse = self.call(self.stub.List, request)
            yield page
            if not page.next_page_token:
                return
            request.page_size = page_size
            request.page_token = page.next_page_token

    def listed(self, kind: str, *, tenant: str, selector: str = "", owner: str = "") -> "list[pb.Resource]":
        """All objects of a list."""
        return [r for page in self.pages(kind, tenant=tenant, selector=selector, owner=owner) for r in page.resources]

    def watch(
        self,
        kind: str,
        *,
        tenant: str,
        selector: str = "",
        name: str = "",
        token: str = "",
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
        away: "Callable[[str], None] | None" = None,
    ) -> "Iterator[pb.WatchEvent]":
        """Changes from `token` on (from a snapshot where it is empty), resumed when the stream breaks.

        `deadline_s` is on the monotonic clock; after it a Failure with code TIMEOUT is raised. A manager that never answered
        counts as unreachable after `retry_s`; one that did and went away is waited for, for `patience_s` since its last
        word, as it is while it is upgraded. `away` is told why, once, where that takes a while.
        """
        from casemate_wire.v1 import operators_pb2 as pb

        request = pb.WatchRequest(kind=kind, tenant=tenant, selector=selector, name=name, resume_token=token)
        broken_since_s: float | None = None
        heard = told = False
        while True:
            left_s = None if deadline_s is None else max(0.001, deadline_s - time.monotonic())
            try:
                for event in self.stream(self.stub.Watch, request, timeout_s=left_s):
                    broken_since_s, heard, told = None, True, False
                    if event.resume_token:
                        request.resume_token = event.resume_token
                    yield event
                # the manager ended the stream, as it does when it goes down
                broken = failure.unreachable(self.settings.manager, "the stream ended")
            except failure.Failure as failed:
                if failed.code is not failure.Exit.UNREACHABLE:
                    raise
                broken = failed
            now_s = time.monotonic()
            broken_since_s = broken_since_s if broken_since_s is not None else now_s
            if now_s - broken_since_s > (patience_s if heard else self.settings.retry_s):
                raise broken
            if deadline_s is not None and now_s > deadline_s:
                raise failure.Failure(
                    broken.what, code=failure.Exit.TIMEOUT, details=broken.details, remedy=broken.remedy
                )
            if away is not None and not told and now_s - broken_since_s > TELL_S:
                away(broken.what)
                told = True
            time.sleep(random.uniform(0.05, 0.3))

    def ticket(self, action: str, tenant: str, instance: str) -> str:
        """A ticket for one side stream; used at once, for it lives half a minute."""
        from casemate_wire.v1 import tickets_pb2

        request = tickets_pb2.TicketRequest(tenant=tenant, instance=instance, action=action)
        return str(self.call(self.channels.Admit, request, f"{action} at {instance}").ticket)

    def apply(
        self, resources: "list[pb.Resource]", *, key: str, dry_run: bool = False, doing: str = ""
    ) -> "pb.ApplyResponse":
        """Make or change objects: all of them or none. `key` names the request for its whole life, retries included."""
        from casemate_wire.v1 import operators_pb2 as pb

        answer: pb.ApplyResponse = self.call(
            self.stub.Apply, pb.ApplyRequest(request_key=key, resources=resources, dry_run=dry_run), doing
        )
        return answer


def dial(settings: Settings, *, aio: bool = False) -> Any:
    """A channel by TLS, as whom the settings say; by plain text on loopback, where they say so in words. Raises Failure.

    ``aio``: one for an event loop.
    """
    from casemate_wire.tls import TARGET_NAME, only_tls13

    only_tls13()  # before gRPC is loaded

    import grpc

    make: Any = grpc
    if aio:
        import grpc.aio  # takes 200 ms

        make = grpc.aio

    if settings.certificate:
        credentials = grpc.ssl_channel_credentials(
            settings.roots.encode(), settings.key.encode(), settings.certificate.encode()
        )
        return make.secure_channel(settings.manager, credentials, options=(*OPTIONS, TARGET_NAME))
    host = settings.manager.rpartition(":")[0].strip("[]")
    if settings.insecure_loopback and (host in ("localhost", "::1") or host.startswith("127.")):
        return make.insecure_channel(settings.manager, options=OPTIONS)
    raise failure.Failure(
        f"there is no certificate for the manager at {settings.manager}",
        code=failure.Exit.DENIED,
        remedy="have one made (casemate-manager operator, or casemate dev up), and name its file by CASEMATE_CONFIG",
        reason="NoCertificate",
    )


def _transient(error: Any) -> bool:
    return bool(error.code().name == "UNAVAILABLE")


def request_key() -> str:
    """A fresh name for one request."""
    import uuid

    return f"cli-{uuid.uuid4()}"
