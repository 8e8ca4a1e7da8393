"""The Kubernetes v1 Pod fields that Casemate runs, and the check of a manifest against them.

``FIELDS`` is the published table (docs/pod-fields.md is made from it). A field that is not in it is refused by path and
never ignored: a pod that silently lacks its security context is worse than one that does not start. Meanings are those of
the Kubernetes API reference, "Pod v1 core"; the guest runs the manifest with ``podman kube play``.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from casemate_core.errors import Violation, shown
from casemate_core.quantity import BadQuantity, parse_bytes, parse_millicpus
from casemate_core.spec.meta import check_labels, check_name
from casemate_core.spec.podresources import check_annotations, check_resources, check_volumes, is_device

MAX_PODS = 64
MAX_CONTAINERS = 32
MAX_STRING = 64 * 1024
#: Length of a path below a volume.
MAX_PATH = 1024

_PROBE = {
    "exec.command": "[string]",
    "httpGet.path": "string",
    "httpGet.port": "port",
    "httpGet.scheme": "HTTP|HTTPS",
    "httpGet.host": "string",
    "tcpSocket.port": "port",
    "tcpSocket.host": "string",
    "initialDelaySeconds": "count",
    "periodSeconds": "count",
    "timeoutSeconds": "count",
    "successThreshold": "count",
    "failureThreshold": "count",
}
_CONTAINER = {
    "name": "name",
    "image": "string",
    "imagePullPolicy": "Always|IfNotPresent|Never",
    "command": "[string]",
    "args": "[string]",
    "workingDir": "string",
    "env[].name": "string",
    "env[].value": "string",
    "env[].valueFrom.secretKeyRef.name": "name",
    "env[].valueFrom.secretKeyRef.key": "string",
    "ports[].name": "string",
    "ports[].containerPort": "port",
    "ports[].hostPort": "port",
    "ports[].hostIP": "string",
    "ports[].protocol": "TCP|UDP|SCTP",
    "resources.limits.cpu": "cpus",
    "resources.limits.memory": "bytes",
    "resources.limits.hugepages-2Mi": "bytes",
    "resources.limits.hugepages-1Gi": "bytes",
    "resources.limits.<vendor>/<class>": "amount",
    "resources.limits.<vendor>/<class>=<name>": "amount",
    "resources.requests.cpu": "cpus",
    "resources.requests.memory": "bytes",
    "resources.requests.hugepages-2Mi": "bytes",
    "resources.requests.hugepages-1Gi": "bytes",
    "resources.requests.<vendor>/<class>": "amount",
    "resources.requests.<vendor>/<class>=<name>": "amount",
    "volumeMounts[].name": "string",
    "volumeMounts[].mountPath": "string",
    "volumeMounts[].readOnly": "bool",
    "volumeMounts[].subPath": "string",
    "securityContext.privileged": "bool",
    "securityContext.readOnlyRootFilesystem": "bool",
    "securityContext.allowPrivilegeEscalation": "bool",
    "securityContext.runAsUser": "count",
    "securityContext.runAsGroup": "count",
    "securityContext.capabilities.add": "[string]",
    "securityContext.capabilities.drop": "[string]",
    **{f"readinessProbe.{k}": v for k, v in _PROBE.items()},
    "stdin": "bool",
    "tty": "bool",
}
#: Path in the manifest → what it takes. ``[]`` after a name: a list of objects.
FIELDS: Mapping[str, str] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata.name": "name",
    "metadata.labels": "{string}",
    "metadata.annotations": "{string}",
    "spec.restartPolicy": "Always|OnFailure|Never",
    "spec.hostNetwork": "bool",
    "spec.hostname": "name",
    "spec.terminationGracePeriodSeconds": "count",
    "spec.volumes[].name": "string",
    "spec.volumes[].emptyDir.medium": "|Memory|HugePages|HugePages-2Mi|HugePages-1Gi",
    "spec.volumes[].emptyDir.sizeLimit": "bytes",
    "spec.volumes[].persistentVolumeClaim.claimName": "name",
    "spec.volumes[].hostPath.path": "string",
    "spec.volumes[].hostPath.type": "|DirectoryOrCreate|Directory|FileOrCreate|File|Socket|CharDevice|BlockDevice",
    "spec.volumes[].secret.secretName": "name",
    "spec.volumes[].secret.defaultMode": "count",
    "spec.volumes[].secret.items[].key": "string",
    "spec.volumes[].secret.items[].path": "string",
    "spec.volumes[].secret.items[].mode": "count",
    "spec.securityContext.runAsUser": "count",
    "spec.securityContext.runAsGroup": "count",
    "spec.securityContext.fsGroup": "count",
    **{f"spec.containers[].{k}": v for k, v in _CONTAINER.items()},
    **{f"spec.initContainers[].{k}": v for k, v in _CONTAINER.items() if not k.startswith("readinessProbe")},
}


def _tree() -> dict[str, Any]:
    """FIELDS as nested dictionaries: a leaf is the type word; a list of objects is under ``name[]``."""
    root: dict[str, Any] = {}
    for path, kind in FIELDS.items():
        *parents, leaf = path.split(".")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = kind
    return root


TREE = _tree()
#: Stands in the table for every name of a device (`podresources.DEVICE_KEY`).
_DEVICE = "<vendor>/<class>"
_OBJECTS_THAT_MAY_BE_EMPTY = frozenset({"emptyDir"})


def pod_name(manifest: Mapping[str, Any]) -> str:
    """Name of a checked manifest."""
    return str(manifest["metadata"]["name"])


def check_pods(path: str, pods: tuple[Mapping[str, Any], ...]) -> Iterator[Violation]:
    """Violations in the pods of one environment; names must be unique."""
    if len(pods) > MAX_PODS:
        yield Violation(path, str(len(pods)), "are too many pods", f"keep at most {MAX_PODS}")
        return
    seen: dict[str, int] = {}
    for i, manifest in enumerate(pods):
        here = f"{path}[{i}]"
        found = list(check_pod(here, manifest))
        yield from found
        if found:
            continue
        name = pod_name(manifest)
        if name in seen:
            yield Violation(
                f"{here}.metadata.name",
                name,
                f"is also the name of {path}[{seen[name]}]",
                "give each pod a name of its own",
            )
        seen[name] = i


def check_pod(path: str, manifest: Mapping[str, Any]) -> Iterator[Violation]:
    """Violations of one manifest against the table, and of the rules between fields."""
    yield from _check_object(path, manifest, TREE)
    metadata, spec = manifest.get("metadata"), manifest.get("spec")
    for field, wanted in (("apiVersion", "v1"), ("kind", "Pod")):
        if field not in manifest:
            yield Violation(f"{path}.{field}", "", "is missing", f"write {wanted}")
    if not isinstance(metadata, Mapping) or "name" not in metadata:
        yield Violation(f"{path}.metadata.name", "", "is missing", "name the pod")
    if not isinstance(spec, Mapping) or not isinstance(spec.get("containers"), list) or not spec["containers"]:
        yield Violation(f"{path}.spec.containers", "", "is missing", "give the pod at least one container")
        return
    yield from _check_secret_volumes(f"{path}.spec.volumes", _objects(spec.get("volumes")))
    yield from check_annotations(path, manifest)
    yield from check_volumes(path, manifest)
    # what is no text is told by its own path already
    volumes = {v.get("name") for v in _objects(spec.get("volumes")) if isinstance(v.get("name"), str)}
    secret = {v.get("name") for v in _objects(spec.get("volumes")) if isinstance(v.get("name"), str) and "secret" in v}
    names: set[str] = set()
    for kind in ("initContainers", "containers"):
        containers = _objects(spec.get(kind))
        if len(containers) > MAX_CONTAINERS:
            yield Violation(
                f"{path}.spec.{kind}", str(len(containers)), "are too many", f"keep at most {MAX_CONTAINERS}"
            )
            return
        for i, container in enumerate(containers):
            here = f"{path}.spec.{kind}[{i}]"
            yield from _check_container(here, container, names, volumes)
            for j, mount in enumerate(_objects(container.get("volumeMounts"))):
                if mount.get("subPath") and mount.get("name") in secret:
                    field = f"{here}.volumeMounts[{j}].subPath"
                    remedy = "mount the volume, and give its files their paths by items"
                    yield Violation(field, shown(mount["subPath"]), "is not served for a secret", remedy)


def _check_secret_volumes(path: str, volumes: list[Mapping[str, Any]]) -> Iterator[Violation]:
    """A volume of a secret names one, and puts each file at a place of its own below the volume."""
    for i, volume in enumerate(volumes):
        if "secret" not in volume:
            continue
        here, secret = f"{path}[{i}].secret", volume["secret"]
        if others := sorted(set(volume) & {"emptyDir", "hostPath"}):
            yield Violation(here, "", f"goes with no {others[0]}", "give the volume one source")
        if not isinstance(secret, Mapping):
            continue  # told as no object
        if not secret.get("secretName"):
            yield Violation(f"{here}.secretName", "", "is missing", "name the secret")
        yield from _check_mode(f"{here}.defaultMode", secret.get("defaultMode"))
        seen: set[str] = set()
        for j, item in enumerate(_objects(secret.get("items"))):
            place = item.get("path")
            if not item.get("key"):
                yield Violation(f"{here}.items[{j}].key", "", "is missing", "name a key of the secret")
            parts = place.split("/") if isinstance(place, str) else []
            if not parts or not all(parts) or {".", ".."} & set(parts) or len(str(place)) > MAX_PATH:
                remedy = "write a path below the volume, such as tls/key.pem"
                yield Violation(f"{here}.items[{j}].path", shown(place), "is no place in the volume", remedy)
            elif any(place == p or f"{place}/".startswith(f"{p}/") or f"{p}/".startswith(f"{place}/") for p in seen):
                remedy = "give each key a path of its own"
                yield Violation(f"{here}.items[{j}].path", shown(place), "is taken by another key", remedy)
            else:
                seen.add(str(place))
            yield from _check_mode(f"{here}.items[{j}].mode", item.get("mode"))


def _check_mode(path: str, value: Any) -> Iterator[Violation]:
    if value is not None and _is_count(value, 0, 2**31 - 1) and value > 0o777:
        yield Violation(path, shown(value), "is no mode of a file", "write 0 to 0777; in JSON as decimal, 0400 is 256")


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []


def _check_container(
    path: str, container: Mapping[str, Any], names: set[str], volumes: set[Any]
) -> Iterator[Violation]:
    for field, remedy in (("name", "name the container"), ("image", "name the image to run")):
        if not container.get(field):
            yield Violation(f"{path}.{field}", "", "is missing", remedy)
    name = str(container.get("name", ""))
    if name in names:
        yield Violation(
            f"{path}.name", shown(name), "is the name of another container of this pod", "give each a name of its own"
        )
    names.add(name)
    yield from check_resources(path, container)
    for i, variable in enumerate(_objects(container.get("env"))):
        if "valueFrom" not in variable:
            continue
        here, source = f"{path}.env[{i}].valueFrom", variable["valueFrom"]
        ref = source.get("secretKeyRef") if isinstance(source, Mapping) else None
        if "value" in variable:
            yield Violation(here, "", "goes with no value", "remove one of value and valueFrom")
        if not isinstance(ref, Mapping) or not ref.get("name") or not ref.get("key"):
            yield Violation(f"{here}.secretKeyRef", "", "names no secret", "give it name and key")
    for i, mount in enumerate(_objects(container.get("volumeMounts"))):
        if not isinstance(mount.get("name"), str) or mount["name"] not in volumes:
            yield Violation(
                f"{path}.volumeMounts[{i}].name",
                shown(str(mount.get("name", ""))),
                "is no volume of this pod",
                "add it to spec.volumes",
            )
        if not str(mount.get("mountPath", "")).startswith("/"):
            yield Violation(
                f"{path}.volumeMounts[{i}].mountPath",
                shown(str(mount.get("mountPath", ""))),
                "is not an absolute path",
                "begin it with /",
            )
    probe = container.get("readinessProbe")
    if isinstance(probe, Mapping) and sum(k in probe for k in ("exec", "httpGet", "tcpSocket")) != 1:
        yield Violation(
            f"{path}.readinessProbe", "", "needs exactly one way to probe", "give one of exec, httpGet, tcpSocket"
        )


def _check_object(path: str, value: Any, tree: Mapping[str, Any]) -> Iterator[Violation]:
    if not isinstance(value, Mapping):
        yield Violation(path, shown(value), "is not an object", "write fields below it")
        return
    for key, item in value.items():
        here = (
            f"{path}.{key}"
            if isinstance(key, str) and re.match(r"[A-Za-z0-9_/.=-]{1,63}\Z", key)
            else f"{path}.{shown(key)}"
        )
        kind = tree.get(_DEVICE) if _DEVICE in tree and isinstance(key, str) and is_device(key) else tree.get(key)
        listed = tree.get(f"{key}[]")
        if isinstance(listed, Mapping):
            if not isinstance(item, list):
                yield Violation(here, shown(item), "is not a list", "begin each entry with '-'")
            elif len(item) > 256:
                yield Violation(here, str(len(item)), "are too many entries", "keep at most 256")
            else:
                for i, entry in enumerate(item):
                    yield from _check_object(f"{here}[{i}]", entry, listed)
        elif isinstance(kind, Mapping):
            if item is None and key in _OBJECTS_THAT_MAY_BE_EMPTY:
                continue
            yield from _check_object(here, item, kind)
        elif isinstance(kind, str):
            yield from _check_leaf(here, item, kind)
        else:
            yield Violation(
                here, "", "is not a supported Pod field", "remove it; docs/pod-fields.md lists what is supported"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_STRING and "\0" not in value


def _check_leaf(path: str, value: Any, kind: str) -> Iterator[Violation]:
    """Violations of one plain value against its type word."""
    if kind == "name":
        if isinstance(value, str):
            yield from check_name(path, value)
        else:
            yield Violation(path, shown(value), "is not text", "put it in quotes")
    elif kind == "string":
        if not _is_text(value):
            yield Violation(path, shown(value), "is not text", "put it in quotes; at most 64 KiB")
    elif kind == "bool":
        if not isinstance(value, bool):
            yield Violation(path, shown(value), "is neither true nor false", "write true or false")
    elif kind == "count":
        if not _is_count(value, 0, 2**31 - 1):
            yield Violation(path, shown(value), "is not a whole number from 0 up", "write a number such as 10")
    elif kind == "amount":
        number = int(value) if isinstance(value, str) and re.match(r"[0-9]{1,9}\Z", value, re.ASCII) else value
        if not _is_count(number, 0, 2**31 - 1):
            yield Violation(path, shown(value), "is not a whole number from 0 up", "write a number such as 1")
    elif kind == "port":
        if not _is_count(value, 1, 65535):
            yield Violation(path, shown(value), "is not a port number", "write 1 to 65535")
    elif kind in ("bytes", "cpus"):
        try:
            (parse_bytes if kind == "bytes" else parse_millicpus)(_quantity_text(value))
        except BadQuantity as bad:
            yield Violation(path, shown(value), bad.problem, bad.remedy)
    elif kind == "[string]":
        if not isinstance(value, list) or not all(_is_text(v) for v in value):
            yield Violation(path, shown(value), "is not a list of texts", 'write ["one", "two"]')
    elif kind == "{string}":
        if not isinstance(value, Mapping) or not all(_is_text(v) for v in value.values()):
            yield Violation(path, shown(value), "is not a map of texts", "write key: value")
        elif path.endswith("labels"):
            yield from check_labels(path, value)
    elif value not in (words := kind.split("|")):
        yield Violation(
            path, shown(value), "is not one of the words for this field", f"write {' or '.join(w for w in words if w)}"
        )


def _quantity_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "?" if isinstance(value, bool) else str(value)


def _is_count(value: Any, low: int, high: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return float(value).is_integer() and low <= value <= high


def whole_numbers(value: Any) -> Any:
    """``value`` with floats that are whole made ints: JSON values that crossed a protobuf Struct carry only floats."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {k: whole_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [whole_numbers(v) for v in value]
    return value
