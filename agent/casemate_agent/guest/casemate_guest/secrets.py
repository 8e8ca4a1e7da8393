"""Files of secrets: taken out of manifests, kept in memory, mounted by podman."""

from __future__ import annotations

import os

from .files import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .containers import Pod
    from .frames import Message


def secret_volumes(manifest: Message) -> list[str]:
    """Names of the volumes that are made of a secret."""
    return [str(v["name"]) for v in manifest["spec"].get("volumes") or () if "secret" in v]


def take_files(manifest: Message) -> dict[str, list[Message]]:
    """Files of secrets, by volume, out of a manifest: what is left of it may be kept on disk. Raises ValueError."""
    found: dict[str, list[Message]] = {}
    for volume in manifest["spec"].get("volumes") or ():
        if "secret" in volume:
            name, secret = volume["name"], volume["secret"]
            files = secret.pop("files") if isinstance(secret, dict) else None
            if not isinstance(name, str) or not all(c.isalnum() or c in "-._" for c in name) or name.startswith("."):
                raise ValueError("bad name of a volume")
            if not isinstance(files, list) or not all(
                isinstance(f, dict) and isinstance(f["text"], str) and isinstance(f["path"], str) for f in files
            ):
                raise ValueError(f"bad files of volume {name}")
            found[name] = files
    return found


class SecretFiles:
    """Volumes of secrets: folders of files in memory, one for each volume of each pod."""

    def __init__(self, folder: str) -> None:
        self.path = folder

    def _folder(self, pod: Pod, volume: str) -> str:
        return f"{self.path}/{pod.name}/{volume}"

    def lacks(self, pod: Pod) -> bool:
        """Whether a volume of a secret is not there, as after a boot of the guest."""
        if pod.wanted is None:
            return False
        return not all(os.path.isdir(self._folder(pod, name)) for name in secret_volumes(pod.wanted))

    def write(self, pod: Pod) -> None:
        """Volumes of secrets, each made beside and renamed, so that it is whole where it is there. Raises OSError."""
        context = (pod.wanted or {}).get("spec", {}).get("securityContext") or {}
        group = context.get("fsGroup")
        for volume, files in pod.files.items():
            folder = self._folder(pod, volume)
            fresh = f"{folder}.new"
            remove_tree(fresh)
            os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
            os.mkdir(fresh, 0o755)
            os.chmod(fresh, 0o755)
            for file in files:
                path = f"{fresh}/{file['path']}"
                parts = file["path"].split("/")
                if not all(parts) or {".", ".."} & set(parts):
                    raise ValueError(f"bad path of a file in volume {volume}")
                at = fresh
                for part in parts[:-1]:
                    at = f"{at}/{part}"
                    if not os.path.isdir(at):
                        os.mkdir(at, 0o755)
                        os.chmod(at, 0o755)
                mode = int(file["mode"]) & 0o777 | (0o440 if group is not None else 0)
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
                    out.write(file["text"])
                    if group is not None:
                        os.fchown(out.fileno(), 0, int(group))
                    os.fchmod(out.fileno(), mode)
            remove_tree(folder)
            os.rename(fresh, folder)
        for left in set(os.listdir(f"{self.path}/{pod.name}")) - set(pod.files):
            remove_tree(f"{self.path}/{pod.name}/{left}")

    def mount(self, pod: Pod, spec: Message) -> None:
        """Volumes of secrets as podman takes them: folders of ours, read-only."""
        names = set()
        for volume in spec.get("volumes") or ():
            if "secret" in volume:
                names.add(volume["name"])
                del volume["secret"]
                volume["hostPath"] = {"path": self._folder(pod, volume["name"]), "type": "Directory"}
        for container in (*spec["containers"], *(spec.get("initContainers") or ())):
            for mount in container.get("volumeMounts") or ():
                if mount.get("name") in names:
                    mount["readOnly"] = True

    def remove(self, pod: Pod) -> None:
        """Have none of a pod."""
        remove_tree(f"{self.path}/{pod.name}")
