"""The folder of a training run on a checkpoint: what it is, how far it is, and what to serve.

`run.json` says what the run is, `metrics.jsonl` has a line a round (`rounds.py`), and `checkpoint/`
is a folder that `imprint serve` loads (`checkpoints.py`). Limit: one run, one writer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imprint.adapters.training.checkpoints import (
    SHARD_BYTES,
    Checkpoints,
    RunFolderError,
    replace_text,
)
from imprint.adapters.training.rounds import Rounds


class RunFolder:
    """One run's files."""

    def __init__(self, path: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """`shard_bytes`: the largest file of a checkpoint."""
        self.path = path
        self.checkpoints = Checkpoints(path, shard_bytes=shard_bytes)
        self.rounds = Rounds(path)

    def begin(self, description: dict[str, Any]) -> None:
        """Make the folder, or check that it is this run's and whole. Raises RunFolderError."""
        run_file, text = self.path / "run.json", json.dumps(description, indent=2) + "\n"
        if run_file.exists():
            if run_file.read_text(encoding="utf-8") != text:
                raise RunFolderError(
                    f"{self.path} holds a run with other settings, data or start; give the same "
                    "ones, or another folder"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty and holds no run; give another folder")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(run_file, text)
        self.checkpoints.recover()
