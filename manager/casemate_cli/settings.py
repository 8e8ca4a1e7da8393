"""Which manager, as whom: options, environment and the file of contexts, in that order.

The file is ``$CASEMATE_CONFIG``, else ``${XDG_CONFIG_HOME:-~/.config}/casemate/config.yaml``::

    current: lab
    contexts:
      lab: {manager: 10.0.0.5:7443, tenant: ran}

Without any of them: the manager on this machine's loopback, tenant ``default``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from casemate_cli.failure import Detail, Failure

DEFAULT_MANAGER = "127.0.0.1:7443"
DEFAULT_TENANT = "default"
#: A file of contexts is small; something else was named by mistake.
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Context:
    """One named manager and the tenant to speak for."""

    manager: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Contexts:
    """The file of contexts, parsed."""

    current: str = ""
    contexts: Mapping[str, Context] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """What every call needs. `request_timeout_s` bounds one call, `retry_s` the time over which it is tried again."""

    manager: str = DEFAULT_MANAGER
    tenant: str = DEFAULT_TENANT
    request_timeout_s: float = 30.0
    retry_s: float = 2.0


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the file of contexts is looked for."""
    env = os.environ if environ is None else environ
    if named := env.get("CASEMATE_CONFIG"):
        return Path(named)
    return Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "casemate" / "config.yaml"


def load_contexts(path: Path) -> Contexts:
    """The contexts in `path`; none where there is no such file. Raises Failure for a file that is no such thing."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", remedy="set CASEMATE_CONFIG to another file") from error
    import yaml

    if len(text) > MAX_FILE_BYTES:
        raise _bad_file(path, "", "is larger than 1 MiB")
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise _bad_file(path, "", str(error).splitlines()[0]) from error
    if not isinstance(data, dict):
        raise _bad_file(path, "", "is not a mapping")
    for key in data:
        if key not in ("current", "contexts"):
            raise _bad_file(path, str(key), "is not known here")
    named = data.get("contexts") or {}
    if not isinstance(named, dict):
        raise _bad_file(path, "contexts", "is not a mapping")
    contexts: dict[str, Context] = {}
    for name, entry in named.items():
        if not isinstance(entry, dict) or set(entry) - {"manager", "tenant"}:
            raise _bad_file(path, f"contexts.{name}", "has only the keys manager and tenant")
        contexts[str(name)] = Context(str(entry.get("manager") or ""), str(entry.get("tenant") or ""))
    current = str(data.get("current") or "")
    if current and current not in contexts:
        raise _bad_file(path, "current", f"names {current!r}, which is none of the contexts")
    return Contexts(current, contexts)


def save_contexts(path: Path, contexts: Contexts) -> None:
    """Write the file of contexts, whole or not at all."""
    import yaml

    data = {
        "current": contexts.current,
        "contexts": {
            name: {k: v for k, v in (("manager", c.manager), ("tenant", c.tenant)) if v}
            for name, c in sorted(contexts.contexts.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump(data, sort_keys=False))
    fresh.replace(path)


def resolve(
    *,
    manager: str | None = None,
    context: str | None = None,
    tenant: str | None = None,
    request_timeout_s: float | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from options, then a named context, then the environment, then the current context."""
    env = os.environ if environ is None else environ
    path = config_path(env)
    chosen = Context()
    if context:
        contexts = load_contexts(path)
        if context not in contexts.contexts:
            known = ", ".join(sorted(contexts.contexts)) or "none"
            raise Failure(
                f"no context {context!r} in {path}",
                remedy=f"known: {known}; add one: casemate context set NAME --manager …",
            )
        chosen = contexts.contexts[context]
    elif not (manager or env.get("CASEMATE_MANAGER")) and path.exists():
        contexts = load_contexts(path)
        chosen = contexts.contexts.get(contexts.current, Context())
    address = manager or chosen.manager or env.get("CASEMATE_MANAGER") or DEFAULT_MANAGER
    defaults = Settings()
    return Settings(
        manager=checked_address(address),
        tenant=tenant or chosen.tenant or env.get("CASEMATE_TENANT") or DEFAULT_TENANT,
        request_timeout_s=request_timeout_s or defaults.request_timeout_s,
    )


def checked_address(address: str) -> str:
    """`address` if it reads as HOST:PORT (IPv6 in brackets). Raises Failure."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise Failure(
            "the manager's address is not understood",
            details=[Detail("manager", address, "is not HOST:PORT", "write it as 127.0.0.1:7443 or [::1]:7443")],
        )
    return address


def _bad_file(path: Path, where: str, problem: str) -> Failure:
    return Failure(f"the file of contexts {path} is wrong", details=[Detail(where, "", problem)])
