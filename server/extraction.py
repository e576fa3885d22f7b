"""Files that clients send, made into text by a process that can be killed. Knows no formats.

A process for each file: what a file can cost is bounded in time, memory, output and number, and
none of it is the event loop's.
"""

import asyncio
import json
import logging
import math
import os
import sys
from pathlib import PurePosixPath
from typing import Any, Final

from imprint.server.config import Settings
from imprint.server.document_records import SourceText
from imprint.server.errors import (
    ImprintError,
    InvalidRequestError,
    OverloadedError,
    TooLargeError,
    clip,
)
from imprint.server.extractors import EXTRACTORS

logger = logging.getLogger(__name__)

MAX_AT_ONCE: Final = 2
MAX_WAITING: Final = 16
PLAIN: Final = "text/plain"
OF_SUFFIX: Final = {
    ".txt": PLAIN,
    ".text": PLAIN,
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}


class Extraction:
    """Takes files one by one, a few at a time."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.extraction_timeout_s
        self._max_chars = settings.max_body_bytes
        self._room = asyncio.Semaphore(MAX_AT_ONCE)
        self._num_waiting = 0

    async def read(self, data: bytes, *, name: str, media_type: str) -> SourceText:
        """The text of a file. Raises an ImprintError that says why there is none."""
        kind = kind_of(name, media_type)
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError("many files are being read; try again later", retry_after_s=5)
        self._num_waiting += 1
        try:
            async with self._room:
                reply = await self._run(kind, data)
        finally:
            self._num_waiting -= 1
        if "code" in reply:
            raise _refusal(str(reply["code"]), str(reply["message"]))
        title = reply["title"] or PurePosixPath(name.replace("\\", "/")).name
        return SourceText(
            text=reply["text"],
            media_type=kind,
            title=clip(title) or None,
            references=reply["references"],
        )

    async def _run(self, kind: str, data: bytes) -> dict[str, Any]:
        limits = (str(self._max_chars), str(math.ceil(self._timeout_s)))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "imprint.server.extractors", kind, *limits),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # parsers warn of what documents hold
            cwd="/",
            # no keys, no settings: a parser that is taken over finds nothing here
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                output, _ = await process.communicate(data)
        except TimeoutError:
            raise _too_slow(self._timeout_s) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == -24:  # SIGXCPU, and SIGKILL a moment later
            raise _too_slow(self._timeout_s)
        if process.returncode:
            logger.warning("a process that read a file died with %d", process.returncode)
            raise _refusal("document_damaged", "the file broke the program that reads it")
        reply: dict[str, Any] = json.loads(output)
        return reply


def kind_of(name: str, media_type: str) -> str:
    """The media type by which a file is read: of its name's ending, else as it was declared."""
    declared = media_type.partition(";")[0].strip().lower()
    kind = OF_SUFFIX.get(PurePosixPath(name.lower()).suffix, declared)
    if kind not in EXTRACTORS:
        raise ImprintError(
            f"files of the type {clip(kind)!r} cannot be read; send one of "
            f"{', '.join(sorted(OF_SUFFIX))}",
            status=415,
            code="unsupported_media_type",
            param="file",
        )
    return kind


def _refusal(code: str, message: str) -> ImprintError:
    error = TooLargeError if code == "document_too_large" else InvalidRequestError
    return error(message, code=code, param="file")


def _too_slow(timeout_s: float) -> ImprintError:
    return _refusal("document_too_complex", f"reading the file took more than {timeout_s:g} s")
