"""Log lines of the API process and of its workers: as text, or as one JSON object a line.

Lines carry the ids of what they are about, from `log_context` or from `extra`. Never text of a
document: who logs is bound to that, nothing here could tell.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]

_context: ContextVar[dict[str, Any]] = ContextVar("log_context", default={})  # noqa: B039

# What every record has; anything else was given by `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    *("message", "asctime", "taskName"),
    "color_message",  # uvicorn's, for terminals
}


@contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Every line logged inside, by this task or by tasks that it starts, has these fields too.

    Not for the body of an async generator: it would leak into whoever iterates.
    """
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def current_request_id() -> str:
    """Id of the HTTP request that is being served; empty outside of one."""
    return str(_context.get().get("request_id", ""))


def _was_given(name: str) -> bool:
    """Whether a record's field comes from `extra`; Ray marks every record of its process."""
    return name not in _STANDARD and not name.startswith("_")


class JsonFormatter(logging.Formatter):
    """One line of JSON: time, level, logger, process, message, ids, and an error's traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line end."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            **_context.get(),
            **{name: value for name, value in vars(record).items() if _was_given(name)},
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = record.exc_info[0].__name__
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure_logging(level: str, format: Format, process: str) -> None:
    """Send this process's log to standard error. `process`: "api", or a worker's identity."""
    handler = logging.StreamHandler()
    if format == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        name = "" if process == "api" else f"{process} "
        text = f"%(asctime)s %(levelname)s {name}%(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(text))
    logging.basicConfig(level=level.upper(), handlers=[handler])
