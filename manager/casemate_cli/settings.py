"""Which manager, as whom: options, environment and the file of contexts, in that order.

The file is ``$CASEMATE_CONFIG``, else ``${XDG_CONFIG_HOME:-~/.config}/casemate/config.yaml``::

    current: lab
    contexts:
      lab:
        manager: 10.0.0.5:7443
        tenant: ran
        roots: ...        # PEM: the authorities of that fleet,
        certificate: ...  # who you are there,
        key: ...          # and the key that proves it

Without any of them: the manager on this machine's loopback, tenant ``default``. Whichever way the manager was named, the
certificate is that of the context with its address. Without one nothing is sent, but to a plain-text manager on loopback
where ``CASEMATE_INSECURE_LOOPBACK=1`` says so. The file holds keys, so it is written for its owner alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casemate_cli.failure import Detail, Failure

DEFAULT_MANAGER = "127.0.0.1:7443"
DEFAULT_TENANT = "default"
#: A file of contexts is small; something else was named by mistake.
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Context:
    """One named manager, the tenant to speak for, and as whom (PEM)."""

    manager: str = ""
    tenant: str = ""
    roots: str = ""
    certificate: str = ""
    key: str = field(default="", repr=False)


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
    #: An access key or token, where the environment gives one.
    token: str = field(default="", repr=False)
    roots: str = ""
    certificate: str = ""
    key: str = field(default="", repr=False)
    #: Plain text to a manager on loopback, where there is no certificate for it.
    insecure_loopback: bool = False


_CONTEXT = ("manager", "tenant", "roots", "certificate", "key")


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
        if not isinstance(entry, dict) or set(entry) - set(_CONTEXT):
            raise _bad_file(path, f"contexts.{name}", f"has only the keys {', '.join(_CONTEXT)}")
        contexts[str(name)] = Context(**{k: str(entry.get(k) or "") for k in _CONTEXT})
    current = str(data.get("current") or "")
    if current and current not in contexts:
        raise _bad_file(path, "current", f"names {current!r}, which is none of the contexts")
    return Contexts(current, contexts)


def save_contexts(path: Path, contexts: Contexts) -> None:
    """Write the file of contexts, whole or not at all; for its owner alone, since it holds keys."""
    import yaml

    data = {
        "current": contexts.current,
        "contexts": {
            name: {k: v for k in _CONTEXT if (v := getattr(c, k))} for name, c in sorted(contexts.contexts.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        yaml.dump(data, file, _block_dumper(), sort_keys=False)
    fresh.replace(path)


def _block_dumper() -> Any:
    """YAML with certificates as people know them: one line below the other."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper


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
    identity = chosen if chosen.certificate else _identity_for(address, path)
    return Settings(
        manager=checked_address(address),
        roots=identity.roots,
        certificate=identity.certificate,
        key=identity.key,
        insecure_loopback=env.get("CASEMATE_INSECURE_LOOPBACK", "") == "1",
        tenant=tenant or chosen.tenant or env.get("CASEMATE_TENANT") or DEFAULT_TENANT,
        request_timeout_s=request_timeout_s or defaults.request_timeout_s,
        token=_token(env),
    )


def _token(env: Mapping[str, str]) -> str:
    """What $CASEMATE_TOKEN or the file $CASEMATE_TOKEN_FILE holds. There is no option for it: arguments are seen by all."""
    text = env.get("CASEMATE_TOKEN", "")
    if not text and (path := env.get("CASEMATE_TOKEN_FILE")):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise Failure(
                f"cannot read the token in {path}", remedy="set CASEMATE_TOKEN_FILE to a file that holds one"
            ) from error
    text = text.strip()
    if text and not (text.isascii() and text.isprintable() and " " not in text):
        raise Failure("the token is not understood", remedy="set CASEMATE_TOKEN to an access key or token, in one line")
    return text


def _identity_for(address: str, path: Path) -> Context:
    """The context with a certificate for the manager at this address; the current one first."""
    if not path.exists():
        return Context()
    found = load_contexts(path)
    ordered = [found.contexts[found.current]] if found.current else []
    ordered += found.contexts.values()
    return next((c for c in ordered if c.manager == address and c.certificate), Context())


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
