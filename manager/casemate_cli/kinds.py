"""PURE. The kinds as a person names them: `env`, `environments`, `inst`, `po` …

A table of words alone: it is read by completion and by `--help`, so it must not import the schema. A test compares it with
the schema.
"""

import difflib
from dataclasses import dataclass
from typing import Final

from casemate_cli.failure import Detail, Failure


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind. `name` as in the schema, `word` its one-word form for `kind/name`, `aliases` all other words taken."""

    name: str
    word: str
    plural: str
    aliases: tuple[str, ...]
    #: Whether objects belong to a tenant; the others belong to the fleet.
    of_tenant: bool
    #: Whether this release serves it.
    served: bool = True
    #: Whether people may write it.
    writable: bool = True


KINDS: Final[tuple[Kind, ...]] = (
    Kind("Environment", "environment", "environments", ("env", "envs"), True),
    Kind("Instance", "instance", "instances", ("inst", "insts", "vm", "vms"), True, writable=False),
    Kind("Pod", "pod", "pods", ("po",), True, writable=False),
    Kind("Host", "host", "hosts", ("node", "nodes"), False),
    Kind("Image", "image", "images", ("img", "imgs"), False),
    Kind("Network", "network", "networks", ("net", "nets"), False),
    Kind("Policy", "policy", "policies", ("pol",), False),
    Kind("Placement", "placement", "placements", ("plc",), True, writable=False),
    Kind("Event", "event", "events", ("ev",), True, writable=False),
    Kind("Operation", "operation", "operations", ("op", "ops"), True, writable=False),
    Kind("GPU", "gpu", "gpus", (), False, writable=False),
    Kind("Class", "class", "classes", (), False, served=False),
    Kind("SecurityGroup", "securitygroup", "securitygroups", ("sg",), True, served=False),
    Kind("Volume", "volume", "volumes", ("vol", "vols", "pvc", "pvcs"), True),
    Kind("Secret", "secret", "secrets", (), True),
    Kind("Tenant", "tenant", "tenants", (), False),
    Kind("User", "user", "users", (), False),
    Kind("RoleBinding", "rolebinding", "rolebindings", ("rb",), False),
    Kind("Reservation", "reservation", "reservations", (), False, served=False),
)
#: What `get all` shows, in this order.
ALL: Final = ("Environment", "Instance", "Pod", "Volume", "Host", "Image", "Network", "Policy")
#: Kinds that `--prune` may end, in the order in which they can end: users before what they use.
PRUNABLE: Final = ("Environment", "Volume", "Policy", "Image", "Network")

_BY_WORD: Final[dict[str, Kind]] = {
    word: kind for kind in KINDS for word in (kind.name.lower(), kind.word, kind.plural, *kind.aliases)
}
BY_NAME: Final[dict[str, Kind]] = {kind.name: kind for kind in KINDS}


def words() -> list[str]:
    """Every word that names a served kind."""
    return sorted(word for word, kind in _BY_WORD.items() if kind.served)


def find(word: str) -> Kind:
    """The kind that `word` names, in any case. Raises Failure with the nearest words."""
    kind = _BY_WORD.get(word.lower())
    if kind is not None:
        return kind
    near = difflib.get_close_matches(word.lower(), words(), 1, 0.5)
    known = ", ".join(k.plural for k in KINDS if k.served)
    raise Failure(
        "there is no such kind",
        details=[Detail("kind", word, "is not known", f"did you mean {near[0]}?" if near else f"known: {known}")],
    )


@dataclass(frozen=True, slots=True)
class Target:
    """One object, or all of a kind where `name` is empty."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind.word}/{self.name}" if self.name else self.kind.plural


def targets(arguments: tuple[str, ...], default_kind: str = "") -> list[Target]:
    """`env a b`, `env/a inst/b`, `env,inst`, or (with a default kind) `a b`. Raises Failure.

    The default kind is taken for names without a slash where the first word names no kind or stands alone. A slash after a word
    that is no kind is the name's own, once a kind was said: so ``gpu GPU-1002:744c@0000:20/04.0/00.0``.
    """
    if not arguments:
        raise Failure(
            "nothing is named", remedy="name objects as KIND NAME or KIND/NAME, for example environment/hello"
        )
    first, *names = arguments
    if "/" in first or any(_says_kind(name) for name in names):
        return [_slashed(argument, default_kind) for argument in arguments]
    if default_kind and (first.lower() not in _BY_WORD or not names):
        kind = find(default_kind)
        return [Target(kind, name) for name in arguments]
    if "," in first:
        if names:
            raise Failure("several kinds take no names", remedy="write them as KIND/NAME")
        return [Target(find(word)) for word in first.split(",") if word]
    kind = find(first)
    return [Target(kind, name) for name in names] or [Target(kind)]


def _says_kind(argument: str) -> bool:
    """Whether it is written as KIND/NAME."""
    word, slash, _ = argument.partition("/")
    return bool(slash) and word.lower() in _BY_WORD


def _slashed(argument: str, default_kind: str) -> Target:
    word, slash, name = argument.partition("/")
    if not slash:
        if not default_kind:
            raise Failure(
                "names are written in two ways at once",
                details=[Detail("name", argument, "has no kind", "write every one as KIND/NAME")],
            )
        return Target(find(default_kind), argument)
    if not name:
        raise Failure("a name is missing", details=[Detail("name", argument, "ends after the kind")])
    return Target(find(word), name)
