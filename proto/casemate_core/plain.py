"""Frozen dataclasses to and from plain JSON values, strictly, by their type hints.

For what is written to disk by one release and read by the next: ledgers of agents, records of the manager. Decoding
refuses what does not fit, with the path; a key that the type does not know is refused unless ``ignore_unknown`` is set,
as it is for files that a newer release may have written. Fields with a default may be missing, and a field that has
its default is not written: that is how a field is added.

Supported: dataclasses, str, int, float, bool, None, enums (by value), tuple[X, ...], fixed tuples, frozenset[X], Mapping and
dict with keys str or int, unions with None, unions of dataclasses (told apart by ``"type"``, the class name), Any
(JSON values as they are), and classes with ``to_dict()`` and ``from_dict()``, which speak for themselves.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from operator import attrgetter, methodcaller
from typing import Any, Final, TypeVar, cast

from casemate_core.errors import CallerError

T = TypeVar("T")


class BadPlain(CallerError):
    """The value does not have the type's shape."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path or 'value'}: {problem}")


def to_plain(value: object) -> Any:
    """JSON-able form of ``value``. Raises TypeError for what is not supported."""
    kind: Any = type(value)
    # Most values are these; asked first, since every record of the store goes through here.
    return value if kind in _AS_IS else _form(kind)(value)


_AS_IS: Final = frozenset({str, int, float, bool, type(None)})


@cache
def _form(kind: type) -> Callable[[Any], Any]:
    """How values of exactly this type are written; the question is asked once a type."""
    if issubclass(kind, Enum):
        return attrgetter("value")
    if issubclass(kind, bool | int | float | str):
        return _as_it_is
    if hasattr(kind, "to_dict"):
        return methodcaller("to_dict")
    if dataclasses.is_dataclass(kind):
        fields = _fields(kind)
        return lambda value: {
            name: to_plain(item)
            for name, default in fields
            if (item := getattr(value, name)) != default or default is _REQUIRED
        }
    if issubclass(kind, Mapping):
        return lambda value: {str(k): to_plain(v) for k, v in value.items()}
    if issubclass(kind, frozenset | set):
        return lambda value: [to_plain(v) for v in sorted(value)]
    if issubclass(kind, tuple | list):
        return lambda value: [to_plain(v) for v in value]
    raise TypeError(f"{kind.__name__} has no plain form")


def _as_it_is(value: Any) -> Any:
    return value


def from_plain(kind: type[T], data: Any, *, ignore_unknown: bool = False, path: str = "") -> T:
    """The value of type ``kind`` that ``data`` describes. Raises BadPlain with the path of what is wrong."""
    return cast("T", _decode(kind, data, ignore_unknown, path))


class _Required:
    pass


_REQUIRED = _Required()


@cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    """Names of a dataclass's fields with their defaults (``_REQUIRED`` where there is none)."""
    found = []
    for f in dataclasses.fields(kind):
        default: Any = _REQUIRED
        if f.default is not dataclasses.MISSING:
            default = f.default
        elif f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        found.append((f.name, default))
    return tuple(found)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, data: Any, lax: bool, path: str) -> Any:
    if kind is Any or kind is object:
        return data
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), data, lax, path)
    if origin is not None:
        return _decode_generic(origin, typing.get_args(kind), data, lax, path)
    if kind is type(None):
        return _check(data, data is None, "null", path)
    if issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError:
            raise BadPlain(path, f"{data!r} is none of {', '.join(str(e.value) for e in kind)}") from None
    if hasattr(kind, "from_dict"):
        return kind.from_dict(data)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, lax, path)
    if kind is float:
        return float(_check(data, isinstance(data, int | float) and not isinstance(data, bool), "a number", path))
    if kind is int:
        return _check(data, isinstance(data, int) and not isinstance(data, bool), "a whole number", path)
    if kind in (str, bool):
        return _check(data, isinstance(data, kind), f"a {kind.__name__}", path)
    raise TypeError(f"{path}: type {kind!r} has no plain form")


def _check(data: Any, ok: bool, wanted: str, path: str) -> Any:
    if not ok:
        raise BadPlain(path, f"expected {wanted}, got {type(data).__name__}")
    return data


def _decode_union(kinds: tuple[Any, ...], data: Any, lax: bool, path: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [k for k in kinds if k is not type(None)]
    if len(rest) == 1:
        return _decode(rest[0], data, lax, path)
    named = {k.__name__: k for k in rest if isinstance(k, type) and dataclasses.is_dataclass(k)}
    if isinstance(data, dict) and data.get("type") in named:
        return _decode(named[data["type"]], {k: v for k, v in data.items() if k != "type"}, lax, path)
    for k in rest:
        origin = typing.get_origin(k)
        if (
            isinstance(origin, type)
            and isinstance(data, Mapping)
            and issubclass(origin, Mapping | types.MappingProxyType)
        ):
            return _decode_generic(origin, typing.get_args(k), data, lax, path)
    for k in rest:
        if not dataclasses.is_dataclass(k) and isinstance(k, type) and type(data) is k:
            return _decode(k, data, lax, path)
    raise BadPlain(path, "fits none of its types")


def _decode_generic(origin: Any, args: tuple[Any, ...], data: Any, lax: bool, path: str) -> Any:
    if origin is tuple:
        items = _check(data, isinstance(data, list | tuple), "a list", path)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], v, lax, f"{path}[{i}]") for i, v in enumerate(items))
        _check(data, len(items) == len(args), f"{len(args)} items", path)
        return tuple(_decode(k, v, lax, f"{path}[{i}]") for i, (k, v) in enumerate(zip(args, items, strict=True)))
    if origin is frozenset:
        items = _check(data, isinstance(data, list | tuple), "a list", path)
        return frozenset(_decode(args[0], v, lax, f"{path}[{i}]") for i, v in enumerate(items))
    if origin is list:
        items = _check(data, isinstance(data, list | tuple), "a list", path)
        return [_decode(args[0], v, lax, f"{path}[{i}]") for i, v in enumerate(items)]
    if (isinstance(origin, type) and issubclass(origin, Mapping)) or origin is types.MappingProxyType:
        items = _check(data, isinstance(data, Mapping), "a mapping", path)
        key = int if args[0] is int else str
        return {key(k): _decode(args[1], v, lax, f"{path}.{k}") for k, v in items.items()}
    raise TypeError(f"{path}: type {origin!r} has no plain form")


def _decode_dataclass(kind: type, data: Any, lax: bool, path: str) -> Any:
    items = _check(data, isinstance(data, Mapping), "a mapping", path)
    hints = _hints(kind)
    fields = _fields(kind)
    if not lax and (unknown := set(items) - {name for name, _ in fields}):
        raise BadPlain(f"{path}.{min(unknown)}".lstrip("."), f"{kind.__name__} has no such field")
    values = {}
    for name, default in fields:
        here = f"{path}.{name}".lstrip(".")
        if name in items:
            values[name] = _decode(hints[name], items[name], lax, here)
        elif default is _REQUIRED:
            raise BadPlain(here, "is missing")
    return kind(**values)
