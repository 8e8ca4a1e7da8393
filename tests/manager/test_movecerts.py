"""Who gets a certificate for a migration: its two hosts, while it is under way, each for its own end."""

import pytest
from cryptography import x509

from casemate_agent.enrolment.enrol import new_key, request_for
from casemate_core.errors import Conflict, InvalidSpec, NotFound
from casemate_core.spec.instance import InstanceState, Phase
from casemate_core.spec.operation import OrderPhase, OrderState
from casemate_manager import pki
from casemate_manager.fleet.commands import OperateInstances
from casemate_manager.fleet.records import EnrolmentRecord
from casemate_manager.movecerts import MOVE_S, MoveAuthority
from casemate_wire.stream import HostReport
from support.small_fleet import SmallFleet, environment, image, network


def moving() -> tuple[SmallFleet, str, str, str]:
    """A fleet, the uid of the migration that is under way in it, its source and its target."""
    made = SmallFleet()
    made.apply(image(), network())
    for name in ("h1", "h2", "h3"):
        made.join(name)
        made.tell(name, 1, report=HostReport(passage=name))
    made.apply(environment())
    (uid,) = made.state.instances
    placement = made.state.placement_of(uid)
    assert placement is not None
    made.tell(placement.host, 1, InstanceState(uid, 1, Phase.READY), report=HostReport(passage=placement.host))
    made.do(OperateInstances(made.next(), "default", "hello-0", "migrate", "seed"))
    (record,) = made.state.operations.values()
    return made, record.meta.uid, record.host, record.target


def authority(made: SmallFleet) -> MoveAuthority:
    return MoveAuthority(lambda: made.state, lambda: made.now_s)


def request() -> bytes:
    return request_for(new_key())


def test_each_end_gets_its_own_and_nothing_lets_it_in_elsewhere() -> None:
    made, uid, source, target = moving()
    signs = authority(made)
    for host, end in ((source, "source"), (target, "target")):
        issued = signs.issue(host, None, uid, request())
        assert issued.end == end
        certificate = x509.load_pem_x509_certificate(issued.certificate)
        issuer = x509.load_pem_x509_certificate(issued.issuer)
        certificate.verify_directly_issued_by(issuer)
        (uri,) = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert uri.value == f"spiffe://casemate/migration/{uid}/{end}/{host}"
        (use,) = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert use == (
            x509.ExtendedKeyUsageOID.CLIENT_AUTH if end == "source" else x509.ExtendedKeyUsageOID.SERVER_AUTH
        )
        life_s = certificate.not_valid_after_utc.timestamp() - made.now_s
        assert 0 < life_s <= MOVE_S
        # its issuer answers to nobody: no port of the manager trusts it
        assert issuer.issuer == issuer.subject


def test_another_host_and_another_migration_get_none() -> None:
    made, uid, _, _ = moving()
    signs = authority(made)
    (other,) = (
        {"h1", "h2", "h3"}
        - {r.host for r in made.state.operations.values()}
        - {r.target for r in made.state.operations.values()}
    )
    with pytest.raises(NotFound):
        signs.issue(other, None, uid, request())
    with pytest.raises(NotFound):
        signs.issue("h1", None, "00000000-0000-4000-8000-00000000000f", request())


def test_none_when_it_is_over() -> None:
    made, uid, source, target = moving()
    (instance,) = made.state.instances
    failed = OrderState(uid, OrderPhase.FAILED, "NoRoom", "no room")
    made.tell(target, 1, InstanceState(instance, 1, Phase.FAILED, order=failed), report=HostReport(passage=target))
    with pytest.raises(NotFound):
        authority(made).issue(source, None, uid, request())


def test_a_host_is_its_enrolled_key_and_uses_another_for_the_migration() -> None:
    made, uid, source, _ = moving()
    key = new_key()
    own = pki.key_id(pki.read_request(request_for(key)))
    made.state.enrolments[source] = EnrolmentRecord(source, own, 0.0, 0.0, made.now_s + 3600)
    signs = authority(made)
    assert signs.issue(source, own, uid, request()).end == "source"
    with pytest.raises(InvalidSpec, match="make a key for this migration"):
        signs.issue(source, own, uid, request_for(key))
    with pytest.raises(Conflict, match="no host of this name is enrolled with this key"):
        signs.issue(source, "0" * 64, uid, request())
    with pytest.raises(InvalidSpec, match="certificateRequest"):
        signs.issue(source, own, uid, b"nonsense")
