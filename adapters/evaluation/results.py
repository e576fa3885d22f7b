"""The folder of an evaluation: what was asked for, and a line of JSON for every finished case.

An interrupted evaluation goes on from it; only one process at a time has it. Knows records; runs
nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from imprint.adapters.evaluation.runner import ArmRecord, Record

CONFIG_FILE: Final = "config.json"
RECORDS_FILE: Final = "records.jsonl"


class OtherEvaluationError(Exception):
    """The folder holds another evaluation, files that are none, or one that is running; the message
    says what."""


class ResultFolder:
    """Records of one evaluation on disk. `records` holds what was there when it was opened."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Make the folder, or open it if it holds the same evaluation.

        `config` is everything that decides the records: plain JSON values. Raises
        OtherEvaluationError, or `OSError` where the folder cannot be written.
        """
        self.folder = folder
        self._file = folder / RECORDS_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps(config)))
        self._lock()
        self.records = self._load()

    def append(self, record: Record) -> None:
        """Write one finished case; it is in the file when this returns."""
        line = json.dumps(asdict(record)) + "\n"
        with self._file.open("a", encoding="ascii") as file:
            file.write(line)

    def _lock(self) -> None:
        """Make the file of records, or open it, and keep others off while this object lives."""
        lock = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OtherEvaluationError(
                f"another process is evaluating into {self.folder}; wait for it, or give another "
                "folder"
            ) from None

    def _check(self, config: dict[str, Any]) -> None:
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            if any(found.suffix != ".partial" for found in self.folder.iterdir()):
                raise OtherEvaluationError(
                    f"{self.folder} is not empty and holds no {CONFIG_FILE}; give another folder"
                )
            text = json.dumps({"sha256": config_hash(config), "config": config}, indent=2)
            partial = path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            other, digest = saved["config"], saved["sha256"]
        except (ValueError, KeyError, TypeError):
            raise OtherEvaluationError(f"{path} is not the config of an evaluation") from None
        if digest != config_hash(config):
            differ = sorted(
                name for name in {*config, *other} if config.get(name) != other.get(name)
            )
            what = ", ".join(differ) or "its text was changed"
            raise OtherEvaluationError(
                f"{self.folder} holds another evaluation ({what}); give another folder"
            )

    def _load(self) -> list[Record]:
        """The finished cases; a line that an interruption tore is dropped from the file."""
        raw = self._file.read_bytes()
        end = raw.rfind(b"\n") + 1
        if end < len(raw):
            os.truncate(self._file, end)
        try:
            return [_record(json.loads(line)) for line in raw[:end].splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise OtherEvaluationError(f"{self._file} holds a line that is none of ours") from error


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of plain JSON values, the order of their names left out of account."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(raw: dict[str, Any]) -> Record:
    arms = {
        name: ArmRecord(
            **{
                **arm,
                "predictions": tuple(arm["predictions"]),
                "scores": {metric: tuple(scores) for metric, scores in arm["scores"].items()},
            }
        )
        for name, arm in raw["arms"].items()
    }
    return Record(
        **{**raw, "answers": tuple(tuple(answers) for answers in raw["answers"]), "arms": arms}
    )
