"""Log lines: one JSON object a line for machines, or plain text for people, on standard error."""

import json
import logging
import sys
import time

from casemate_wire.logtail import LogTail

#: Libraries that narrate each of their steps at debug, thousands of lines for one look at a host; heard from info on.
TALKATIVE = ("asyncio", "grpc", "pyroute2")

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """Time as seconds since the epoch, level, logger, message, and what the line carries beside it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Console(logging.Formatter):
    """``12:34:56.789 warning agent.link  message``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("casemate.")
        text = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {name}: {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up(form: str, level: str) -> None:
    """Log to standard error from now on. ``form`` is ``json`` or ``console``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Console())
    tail = LogTail()
    tail.setFormatter(handler.formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler, tail], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.getLogger().level, logging.INFO))
