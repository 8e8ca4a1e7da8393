"""What may leave a fleet for a stranger's eyes: secrets are left out, the rest stays readable. Standard library only.

For support bundles and the like. Theory of operation: a value is left out by the name it goes by, never by what it looks
like; and by its place, where a tenant writes what he likes (environment variables, commands, user data, annotations). What
is left keeps its shape, so that one can see that something was there. Text is searched for what carries secrets in it:
credentials and queries of URLs, and the words after ``password=``, ``Bearer`` and the like. When in doubt it is left out.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

LEFT_OUT: Final = "(left out)"
#: Words of a field's name, whatever its spelling (userData, user_data, USER-DATA), that keep its value in.
_SECRET_NAMES: Final = re.compile(
    r"(pass(word|wd|phrase)?|secret|token|credential|private|api_?-?key|access_?-?key|user_?-?data|ssh_?-?keys?"
    r"|authori[sz]ation|cookie|signature|string_?-?data|certificate|annotations|_key$|^key$|^data$|request_?key)",
    re.IGNORECASE,
)
#: Lists that tenants fill with words of their own programs.
_COMMANDS: Final = frozenset({"command", "args", "argv", "environment_variables"})
_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s@'\"]*@)?(?P<rest>[^\s?#'\"<>]*)(?P<query>[?#][^\s'\"<>]*)?"
)
_AFTER: Final = re.compile(
    r"(?P<word>\b[\w-]*(?:pass(?:word|wd|phrase)?|secret|token|api_?-?key|authorization)[\w-]*\b[\"']?\s*(?:=|:|\s)\s*[\"']?)"
    r"(?P<value>[^\s\"',;&]+)",
    re.IGNORECASE,
)
_BEARER: Final = re.compile(r"(?P<word>\b(?:bearer|basic)\s+)(?P<value>[A-Za-z0-9._~+/=-]{6,})", re.IGNORECASE)
_PEM: Final = re.compile(r"-----BEGIN [A-Z ]+-----.*?(-----END [A-Z ]+-----|\Z)", re.DOTALL)


def text(value: str) -> str:
    """A text without what carries secrets in it."""
    value = _PEM.sub(LEFT_OUT, value)
    value = _URL.sub(_url, value)
    value = _BEARER.sub(rf"\g<word>{LEFT_OUT}", value)
    return _AFTER.sub(rf"\g<word>{LEFT_OUT}", value)


def _url(match: "re.Match[str]") -> str:
    user = f"{LEFT_OUT}@" if match["user"] else ""
    query = f"{match['query'][0]}{LEFT_OUT}" if match["query"] else ""
    return f"{match['scheme']}{user}{match['rest']}{query}"


def plain(value: Any) -> Any:
    """Plain values (of JSON) without secrets; a new value, and the given one unchanged."""
    if isinstance(value, Mapping):
        return {str(name): _field(str(name), below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return text(value) if isinstance(value, str) else value


def _field(name: str, value: Any) -> Any:
    if name == "env" and isinstance(value, list | tuple):
        # The names of variables tell which are set; what they are set to is the tenant's.
        return [
            {"name": each.get("name", ""), "value": LEFT_OUT} if isinstance(each, Mapping) else LEFT_OUT
            for each in value
        ]
    if name in _COMMANDS and value:
        return f"{LEFT_OUT}: {len(value)} words" if isinstance(value, list | tuple) else LEFT_OUT
    if _SECRET_NAMES.search(name):
        if isinstance(value, Mapping):
            return {str(key): LEFT_OUT for key in value}
        return LEFT_OUT if value or value == 0 else value
    return plain(value)
