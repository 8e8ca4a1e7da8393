"""The NoCloud seed of an instance: a small read-only disk that tells the guest who it is.

For: the image store, which keeps the seeds. What may live here: an instance to the bytes of an ISO 9660 image.

Theory of operation. cloud-init looks for a file system labelled CIDATA (its documentation, "NoCloud") and reads
meta-data, user-data, vendor-data and network-config from it; our helper, which starts long before cloud-init, reads the
same disk. meta-data and network-config are written as JSON, which every YAML parser reads and which the helper reads with
the standard library alone. The tenant's user-data goes through untouched. What a stock cloud image lacks to start the
helper comes as vendor-data, a channel of its own, so that nothing has to be merged into what a tenant wrote; in the guest
image that we build it does nothing.

Pods and the addresses of peers are not on the seed: they change while the guest runs, and go over the helper's channel.
"""

import io
import json
from typing import Any

import pycdlib

from casemate_core.errors import InternalError
from casemate_core.spec.instance import DesiredInstance

LABEL = "CIDATA"
#: Images start what lies under this name; that it is an archive, Python sees by itself.
HELPER_NAME = "casemate_guest.py"
EMPTY_USER_DATA = "#cloud-config\n{}\n"

#: Runs early at each boot of a stock cloud image (cloud-init, "Cloud boothook"). /usr/lib/casemate is in our own image,
#: whose unit has started the helper already. The unit lives in /run: nothing of it stays on the disk.
VENDOR_DATA = """\
#cloud-boothook
#!/bin/sh
[ -e /usr/lib/casemate/guest-start ] && exit 0
mkdir -p -m 0700 /run/casemate/seed /run/casemate/mnt
disk=$(blkid -L CIDATA) || exit 0
mount -t iso9660 -o ro,nosuid,nodev,noexec "$disk" /run/casemate/mnt || exit 1
cp /run/casemate/mnt/* /run/casemate/seed/
umount /run/casemate/mnt
cat > /run/systemd/system/casemate-guest.service <<'UNIT'
[Unit]
Description=Casemate guest helper
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
[Service]
ExecStart=/usr/bin/python3 -I -S -E /run/casemate/seed/casemate_guest.py
Restart=on-failure
RestartSec=1
KillMode=process
OOMScoreAdjust=-900
Environment=HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
StandardInput=null
UNIT
systemctl daemon-reload
systemctl start --no-block casemate-guest.service
"""


def host_name(desired: DesiredInstance) -> str:
    """The guest's own name: the instance's, which ends with its ordinal; a label of DNS has at most 63 characters."""
    return desired.name[:63]


def meta_data(desired: DesiredInstance) -> dict[str, Any]:
    """Who the guest is. ``instance-id`` never changes, so cloud-init runs once in an instance's life."""
    interfaces = pod_interfaces(desired)
    data: dict[str, Any] = {
        "instance-id": desired.uid,
        "local-hostname": host_name(desired),
        "public-keys": list(desired.ssh_keys),
        # for our helper; cloud-init leaves what it does not know
        "casemate-environment": desired.environment,
        "casemate-ordinal": desired.ordinal,
        **({"casemate-pod-interfaces": interfaces} if interfaces else {}),
    }
    if desired.volumes:
        data["casemate-volumes"] = [
            {"name": v.name, "serial": v.serial, "readOnly": v.read_only} for v in desired.volumes
        ]
    return data


def pod_interfaces(desired: DesiredInstance) -> list[dict[str, Any]]:
    """Interfaces that go into a pod's network: whose, which, and how it is called and addressed there.

    On the seed and not with the pods, for it is the interfaces of the domain that runs which it speaks of.
    """
    found: list[dict[str, Any]] = []
    for index, nic in enumerate(desired.nics):
        if not nic.pod:
            continue
        before = sum(other["pod"] == nic.pod for other in found)
        found.append(
            {
                "pod": nic.pod,
                "mac": nic.mac,
                "name": f"net{before + 1}",
                "guest-name": f"eth{index}",
                "address": f"{nic.address}/{nic.prefix_length}",
                "mtu": nic.mtu,
            }
        )
    return found


def network_config(desired: DesiredInstance) -> dict[str, Any]:
    """Version 2 of cloud-init's network configuration: interfaces found by MAC, named eth0, eth1 …; no DHCP, no IPv6.

    The default route goes through the first interface. What goes into a pod's network is left out: our helper has it.
    """
    ethernets: dict[str, Any] = {}
    for index, nic in enumerate(desired.nics):
        if nic.pod:
            continue
        entry: dict[str, Any] = {
            "match": {"macaddress": nic.mac},
            "set-name": f"eth{index}",
            "addresses": [f"{nic.address}/{nic.prefix_length}"],
            "mtu": nic.mtu,
            "dhcp4": False,
            "dhcp6": False,
            "accept-ra": False,
            "link-local": [],
        }
        if index == 0 and nic.gateway:
            entry["routes"] = [{"to": "default", "via": nic.gateway}]
        if nic.dns:
            entry["nameservers"] = {"addresses": list(nic.dns)}
        ethernets[f"eth{index}"] = entry
    return {"version": 2, "ethernets": ethernets}


def seed_files(desired: DesiredInstance, helper: bytes) -> dict[str, bytes]:
    """What lies on the seed, by name."""
    return {
        "meta-data": _json(meta_data(desired)),
        "user-data": (desired.user_data or EMPTY_USER_DATA).encode(),
        "vendor-data": VENDOR_DATA.encode(),
        "network-config": _json(network_config(desired)),
        HELPER_NAME: helper,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def build_seed(files: dict[str, bytes], label: str = LABEL) -> bytes:
    """An ISO 9660 image with Rock Ridge and Joliet names. Raises InternalError for a name that it cannot hold."""
    disc = pycdlib.PyCdlib()
    disc.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=label)
    try:
        for number, (name, data) in enumerate(files.items()):
            # The plain ISO name is a number: no reader that knows neither extension is of interest.
            disc.add_fp(io.BytesIO(data), len(data), f"/F{number:06d}.;1", rr_name=name, joliet_path=f"/{name}")
        out = io.BytesIO()
        disc.write_fp(out)
    except pycdlib.pycdlibexception.PyCdlibException as error:
        raise InternalError(f"the seed cannot be written: {error}") from error
    finally:
        disc.close()
    return out.getvalue()
