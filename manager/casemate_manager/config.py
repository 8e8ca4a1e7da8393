"""What a manager is told when it starts: a TOML file, and flags that go before it. Nothing reads settings elsewhere."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from casemate_core.errors import CallerError, shown
from casemate_core.web import is_fit


class BadConfig(CallerError):
    """A setting has no meaning."""

    reason = "BadConfig"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of a manager's process. ``default_subnet`` is the network ``default``'s, made at the first start; empty: none.

    ``key_file`` is the manager's own key, ``manager.key`` beside the store where it is empty. The ``oidc_`` settings name a
    provider whose tokens are taken; none where ``oidc_issuer`` is empty.
    """

    state_dir: str = "/var/lib/casemate-manager"
    listen: str = "127.0.0.1:7443"
    #: Where machines enrol; ``""``: the port after that of ``listen``.
    listen_enrolment: str = ""
    #: Names and addresses of this manager besides the one that agents check, with commas between them.
    names: str = "localhost,127.0.0.1,::1"
    #: Plain text instead of TLS, on loopback: for development.
    insecure_loopback: bool = False
    default_subnet: str = "10.99.0.0/16"
    #: Where Prometheus finds metrics, HOST:PORT on loopback; empty: nowhere. Port 0 takes a free one.
    metrics_listen: str = ""
    key_file: str = ""
    oidc_issuer: str = ""
    oidc_audience: str = ""
    oidc_username_claim: str = "sub"
    oidc_groups_claim: str = "groups"
    oidc_prefix: str = "oidc:"
    log_format: str = "console"
    log_level: str = "info"


def load(path: str, flags: Mapping[str, Any]) -> Config:
    """Settings from a file (none where ``path`` is empty) and from flags that are set, which win. Raises BadConfig."""
    given: dict[str, Any] = {}
    if path:
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadConfig(f"{path}: {error}") from error
    given |= {name: value for name, value in flags.items() if value is not None}
    names = sorted(field.name for field in fields(Config))
    for name, value in given.items():
        if name not in names:
            raise BadConfig(f"{shown(name)}: there is no such setting; there are {', '.join(names)}")
        if name == "insecure_loopback":
            if not isinstance(value, bool):
                raise BadConfig(f"{name}: expected true or false, got {shown(value)}")
        elif not isinstance(value, str):
            raise BadConfig(f"{name}: expected text, got {shown(value)}")
    for name, words in (("log_format", ("console", "json")), ("log_level", ("debug", "info", "warning", "error"))):
        if given.get(name, words[0]) not in words:
            raise BadConfig(f"{name}: {shown(given[name])} is none of {', '.join(words)}")
    config = replace(Config(), **given)
    if config.oidc_issuer and not is_fit(config.oidc_issuer):
        raise BadConfig(f"oidc_issuer: {shown(config.oidc_issuer)} is not an https URL")
    if config.oidc_issuer and not (config.oidc_audience and config.oidc_prefix):
        raise BadConfig(
            "oidc_issuer: needs oidc_audience and a prefix that keeps its names apart from ours (oidc_prefix)"
        )
    if not config.listen_enrolment:
        host, _, port = config.listen.rpartition(":")
        if port.isdecimal():
            config = replace(config, listen_enrolment=f"{host}:{int(port) + 1 if int(port) else 0}")
    return config
