"""One line per event on stderr, as `key=value` or JSON, with the caller it happened for.

Modules log through `logging` as usual; what is in `extra=` becomes keys of the line. A line is one line whatever it
holds, and what looks like a token is masked: a token appears in no log (I8).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TextIO

FORMATS = ("text", "json")
CHATTY = ("httpx", "httpx2", "huggingface_hub", "botocore", "aiobotocore")  # a line per request; what they ask stands in our own
LEVELS = ("debug", "info", "warning", "error")

# uid and pid of the caller this task works for
caller_keys: ContextVar[Mapping[str, Any]] = ContextVar("caller_keys", default=MappingProxyType({}))

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TOKEN = re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{4,}|(?i:bearer\s+)[^\s\"']+")
_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class LineFormatter(logging.Formatter):
    def __init__(self, style: str = "text", is_for_journal: bool = False) -> None:
        super().__init__()
        self._is_json = style == "json"
        self._is_for_journal = is_for_journal

    def format(self, record: logging.LogRecord) -> str:
        keys: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "module": record.name.removeprefix("modelcached."),
            "event": record.getMessage(),
            **caller_keys.get(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            keys["traceback"] = self.formatException(record.exc_info)
        line = json.dumps(keys, default=str) if self._is_json else " ".join(f"{key}={_quoted(value)}" for key, value in keys.items())
        priority = f"<{_priority(record.levelno)}>" if self._is_for_journal else ""
        return priority + _TOKEN.sub("***", line)


def start(style: str, level: str, stream: TextIO | None = None) -> None:
    """Sends the whole process's log to `stream` (stderr)."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(style, _is_journal(stream)))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _is_journal(stream: TextIO) -> bool:
    """As systemd tells it: which device and inode lead to the journal."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _priority(level: int) -> int:
    """syslog's, which `journalctl -p` selects by."""
    return 7 if level < logging.INFO else 6 if level < logging.WARNING else 4 if level < logging.ERROR else 3


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
