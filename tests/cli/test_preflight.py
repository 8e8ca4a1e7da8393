"""What stands in the way of a private fleet is found before anything is started."""

import socket

import pytest

from casemate_cli.dev import preflight
from casemate_cli.failure import Failure


def test_a_taken_port_is_named_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(Failure) as raised:
            preflight.check_port(port)
    assert raised.value.details[0].value == str(port)
    assert "--port" in raised.value.remedy
    preflight.check_port(port)


@pytest.mark.parametrize("subnet", ["10.99.0.0/33", "10.99.0.1/16", "fd00::/64", "x"])
def test_a_subnet_that_is_none(subnet: str) -> None:
    with pytest.raises(Failure):
        preflight.check_subnet(subnet)


def test_a_subnet_that_the_machine_reaches_otherwise_is_refused() -> None:
    taken = [route for interface, route in preflight.routes() if route.prefixlen and not interface.startswith("cmbr-")]
    assert taken, "this machine has no route to test with"
    with pytest.raises(Failure) as raised:
        preflight.check_subnet(str(taken[0]))
    assert "--subnet" in raised.value.remedy
