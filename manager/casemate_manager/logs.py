"""Log lines on standard error: one JSON object a line for machines, or plain text for people."""

import json
import logging
import sys
import time

from casemate_wire.logtail import LogTail


class JsonLines(logging.Formatter):
    """Time in seconds since the epoch, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Console(logging.Formatter):
    """``12:34:56.789 info    writer: message``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("casemate.")
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {name}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(form: str, level: str) -> None:
    """Log in this form (``json`` or ``console``) from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Console())
    tail = LogTail()
    tail.setFormatter(handler.formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler, tail], force=True)
