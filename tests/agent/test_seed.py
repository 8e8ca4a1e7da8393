"""The NoCloud seed, read back as an ISO 9660 image."""

import io
import json

import pycdlib
import pytest
import yaml

from casemate_agent.drivers.seed import VENDOR_DATA, build_seed, network_config, seed_files
from casemate_agent.guest import archive
from support.instances import UID, instance, nic


def read(data: bytes, extension: str) -> dict[str, bytes]:
    """Files of an image by their Rock Ridge or Joliet names."""
    disc = pycdlib.PyCdlib()
    disc.open_fp(io.BytesIO(data))
    try:
        assert disc.pvd.volume_identifier.strip() == b"CIDATA"
        found = {}
        for child in disc.list_children(**{f"{extension}_path": "/"}):
            if child.is_file():
                name = (
                    child.rock_ridge.name().decode()
                    if extension == "rr"
                    else child.file_identifier().decode("utf-16-be")
                )
                out = io.BytesIO()
                disc.get_file_from_iso_fp(out, **{f"{extension}_path": f"/{name}"})
                found[name] = out.getvalue()
        return found
    finally:
        disc.close()


@pytest.mark.parametrize("extension", ["rr", "joliet"])
def test_the_seed_holds_what_cloud_init_and_the_helper_read(extension: str) -> None:
    user_data = "#cloud-config\n# ]]> &amp; \u00fc\nruncmd: [[touch, /tmp/x]]\n"
    desired = instance(user_data=user_data, ssh_keys=("ssh-ed25519 AAAA one",), nics=(nic(2), nic(3, "backhaul")))
    files = read(build_seed(seed_files(desired, archive.helper())), extension)
    assert set(files) == {"meta-data", "user-data", "vendor-data", "network-config", "casemate_guest.py"}
    assert files["user-data"].decode() == user_data
    assert files["casemate_guest.py"] == archive.helper()
    meta = json.loads(files["meta-data"])
    assert meta == {"instance-id": UID, "local-hostname": "web", "public-keys": ["ssh-ed25519 AAAA one"]} | {
        "casemate-environment": desired.environment,
        "casemate-ordinal": desired.ordinal,
    }
    # What is JSON for the helper is the same YAML for cloud-init.
    assert yaml.safe_load(files["network-config"]) == json.loads(files["network-config"]) == network_config(desired)


def test_interfaces_are_found_by_mac_and_only_the_first_has_the_default_route() -> None:
    ethernets = network_config(instance(nics=(nic(2), nic(3, "backhaul"))))["ethernets"]
    assert list(ethernets) == ["eth0", "eth1"]
    assert ethernets["eth0"]["match"] == {"macaddress": "52:54:00:00:00:02"}
    assert ethernets["eth0"]["set-name"] == "eth0"
    assert ethernets["eth0"]["addresses"] == ["10.219.7.2/24"]
    assert ethernets["eth0"]["routes"] == [{"to": "default", "via": "10.219.7.1"}]
    assert "routes" not in ethernets["eth1"]
    assert not any(e["dhcp4"] or e["dhcp6"] or e["accept-ra"] or e["link-local"] for e in ethernets.values())


def test_without_user_data_there_is_an_empty_cloud_config() -> None:
    assert yaml.safe_load(seed_files(instance(), b"")["user-data"]) == {}


def test_vendor_data_is_a_boothook_that_does_nothing_in_our_own_image() -> None:
    lines = VENDOR_DATA.splitlines()
    assert lines[:2] == ["#cloud-boothook", "#!/bin/sh"]
    assert "guest-start" in lines[2] and lines[2].endswith("exit 0")
