"""The folder of a REFINE training run: what it is, how far it is, and a checkpoint to serve.

`run.json` says what the run is, `metrics.jsonl` has a line a round, and `checkpoint/` is a folder
that `imprint serve` loads, with what it takes to go on beside the weights. A new checkpoint is
whole before the old one goes, whatever kills the run. Limit: one run, one writer.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprint.models.checkpoint import save_tensors
from imprint.models.config import ModelConfig
from imprint.models.hub import NEUTRAL_FILE
from imprint.models.names import LM_HEAD
from imprint.models.prompts import TEMPLATE_FILE

_COPIED = ("tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE, NEUTRAL_FILE)
_OPTIMIZER, _PROGRESS = "optimizer.pt", "progress.json"


class RunFolderError(ValueError):
    """The folder cannot be used for this run; the message says why."""


class RunFolder:
    """Reads and writes one run."""

    def __init__(self, path: Path, *, shard_bytes: int | None = None) -> None:
        """`shard_bytes`: the largest file of weights; None writes one."""
        self.path, self._shard_bytes = path, shard_bytes

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def begin(self, description: dict[str, Any]) -> None:
        """Make the folder, or check that it is this run's. Raises RunFolderError."""
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
            _replace(run_file, text)
        self._recover()

    def _recover(self) -> None:
        """After a kill between two renames: the newest checkpoint that is whole."""
        new, old = self._beside("new"), self._beside("old")
        if not self.checkpoint.exists():
            for folder in (new, old):
                if (folder / _PROGRESS).exists():
                    os.replace(folder, self.checkpoint)
                    break
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)

    def _beside(self, kind: str) -> Path:
        return self.path / f"checkpoint.{kind}"

    def progress(self) -> dict[str, Any] | None:
        """What `save` was told last; None before the first."""
        file = self.checkpoint / _PROGRESS
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def optimizer_state(self) -> dict[str, Any]:
        """As it was saved."""
        state: dict[str, Any] = torch.load(self.checkpoint / _OPTIMIZER, weights_only=True)
        return state

    def save(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        optimizer: dict[str, Any],
        progress: dict[str, Any],
        *,
        init: Path,
    ) -> None:
        """Replace the checkpoint. Tokenizer, template and neutral text are those of `init`."""
        new, old = self._beside("new"), self._beside("old")
        new.mkdir()
        for name in _COPIED:
            if (init / name).is_file():
                shutil.copyfile(init / name, new / name)
        config.save(new)
        tensors = {
            name: tensor.contiguous()
            for name, tensor in weights.items()
            if not (config.tie_word_embeddings and name == LM_HEAD)
        }
        save_tensors(tensors, new, shard_bytes=self._shard_bytes)
        torch.save(optimizer, new / _OPTIMIZER)
        _replace(new / _PROGRESS, json.dumps(progress) + "\n")
        if self.checkpoint.exists():
            os.replace(self.checkpoint, old)
        os.replace(new, self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def forget_metrics_from(self, step: int) -> None:
        """Drop the lines of rounds that will be taken again."""
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) < step]
            _replace(self.metrics_file, "".join(f"{line}\n" for line in kept))

    def add_metrics(self, numbers: dict[str, float]) -> None:
        """Append a round's line."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The lines so far."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # torn by a kill


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
