"""Log lines as JSON: what they hold, whose they are, and that each is one line."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

from imprint.server.logs import JsonFormatter, current_request_id, log_context


def line(message: str, *args: object, **fields: Any) -> dict[str, Any]:
    exc_info = fields.pop("exc_info", None)
    logger = logging.getLogger("imprint.test")
    record = logger.makeRecord(
        "imprint.test", logging.WARNING, "f.py", 1, message, args, exc_info, extra=fields
    )
    text = JsonFormatter("worker-0.1").format(record)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_line_says_when_who_and_what() -> None:
    found = line("%s of %d\nlines", "one", 2, status=200, _a_librarys_own=1)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning", "logger": "imprint.test", "process": "worker-0.1",
        "message": "one of 2\nlines", "status": 200,
    }  # fmt: skip


def test_ids_come_from_the_context_and_end_with_it() -> None:
    assert current_request_id() == ""
    with log_context(request_id="req_1"):
        assert current_request_id() == "req_1"
        with log_context(job_ids=["adp_1"]):
            found = line("x")
        assert "job_ids" not in line("x")
    assert found["request_id"] == "req_1"
    assert found["job_ids"] == ["adp_1"]
    assert "request_id" not in line("x")


def test_tasks_keep_the_ids_of_who_began_them() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return current_request_id()

    async def request(id: str) -> asyncio.Task[str]:
        with log_context(request_id=id):
            return asyncio.create_task(work())

    async def both() -> list[str]:
        return [await await_me for await_me in [await request("a"), await request("b")]]

    assert asyncio.run(both()) == ["a", "b"]


def test_an_error_has_its_traceback_in_the_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        found = line("it failed", exc_info=sys.exc_info())
    assert found["error"] == "ValueError"
    assert found["traceback"].endswith("ValueError: no")
