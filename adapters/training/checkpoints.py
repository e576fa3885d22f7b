"""Checkpoints of training runs: a folder that `imprint serve` loads, and what it takes to go on.

`checkpoint/` has the model, its tokenizer and templates; `checkpoint/optimizer/` the optimizer's
tensors; `checkpoint/progress.json` how far the run was, and every file with its size and checksum.
Weights and optimizer are split into files of a bounded size. A new checkpoint is whole before the
old one goes, whatever kills the run. Limit: one writer; the newest checkpoint only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

from imprint.models.checkpoint import save_shards, save_tensors
from imprint.models.config import ModelConfig
from imprint.models.hub import NEUTRAL_FILE
from imprint.models.names import LM_HEAD
from imprint.models.prompts import TEMPLATE_FILE

SHARD_BYTES: Final = 16 * 2**20
"""Largest file, unless one tensor is larger."""

_COPIED = ("tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE, NEUTRAL_FILE)
_OPTIMIZER, _PROGRESS = "optimizer", "progress.json"

_ADVICE = "bring it back, or begin a run in another folder"

OptimizerState = dict[str, Any]
"""As torch gives it: `state`, tensors by parameter and name, and `param_groups`, plain values."""


class RunFolderError(ValueError):
    """The folder cannot be used for this run; the message says why."""


class Checkpoints:
    """Reads and writes the newest checkpoint of one run."""

    def __init__(self, run: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """`run` is the run's folder; no file is larger than `shard_bytes`, or one tensor."""
        self.folder = run / "checkpoint"
        self._new, self._old = run / "checkpoint.new", run / "checkpoint.old"
        self._shard_bytes = shard_bytes

    def recover(self) -> None:
        """After a kill between two renames: the newest checkpoint that is whole.

        Raises RunFolderError naming a file of it that is missing or is not what was written.
        """
        if not self.folder.exists():
            for folder in (self._new, self._old):
                if (folder / _PROGRESS).exists():
                    os.replace(folder, self.folder)
                    break
        for folder in (self._new, self._old):
            shutil.rmtree(folder, ignore_errors=True)
        self._check()

    def _check(self) -> None:
        saved = self._saved()
        files = {} if saved is None else saved["files"]
        if saved is None and self.folder.exists():
            raise RunFolderError(f"{self.folder / _PROGRESS} is missing; {_ADVICE}")
        for name, written in files.items():
            file = self.folder / name
            if not file.is_file():
                found = "is missing"
            elif (num_bytes := file.stat().st_size) != written["bytes"]:
                found = f"has {num_bytes} bytes of {written['bytes']}"
            elif _sha256(file) != written["sha256"]:
                found = "is not what was written: its checksum differs"
            else:
                continue
            raise RunFolderError(f"{file} {found}; {_ADVICE}")

    def progress(self) -> dict[str, Any] | None:
        """What `save` was told last; None before the first."""
        saved = self._saved()
        return None if saved is None else dict(saved["progress"])

    def optimizer_state(self) -> OptimizerState:
        """As it was saved."""
        saved = self._saved()
        assert saved is not None, "there is a checkpoint to go on from"
        state: dict[str, dict[str, Tensor]] = {}
        for name in saved["files"]:
            if name.startswith(f"{_OPTIMIZER}/"):
                for key, tensor in load_file(self.folder / name).items():
                    parameter, _, field = key.rpartition("/")
                    # a copy: what is loaded is the file itself, which the next save replaces
                    state.setdefault(parameter, {})[field] = tensor.clone()
        return {"state": state, "param_groups": saved["param_groups"]}

    def save(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        optimizer: OptimizerState,
        progress: dict[str, Any],
        *,
        init: Path,
    ) -> None:
        """Replace the checkpoint. Tokenizer, template and neutral text are those of `init`."""
        new = self._new
        shutil.rmtree(new, ignore_errors=True)
        (new / _OPTIMIZER).mkdir(parents=True)
        for name in _COPIED:
            if (init / name).is_file():
                shutil.copyfile(init / name, new / name)
        config.save(new)
        tensors = {
            name: tensor.detach().contiguous()
            for name, tensor in weights.items()
            if not (config.tie_word_embeddings and name == LM_HEAD)
        }
        save_tensors(tensors, new, shard_bytes=self._shard_bytes)
        moments = {
            f"{parameter}/{field}": tensor.contiguous()
            for parameter, fields in optimizer["state"].items()
            for field, tensor in fields.items()
        }
        save_shards(moments, new / _OPTIMIZER, stem=_OPTIMIZER, shard_bytes=self._shard_bytes)
        saved = {
            "progress": progress,
            "param_groups": optimizer["param_groups"],
            "files": {
                str(file.relative_to(new)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
                for file in sorted(new.rglob("*"))
                if file.is_file()
            },
        }
        replace_text(new / _PROGRESS, json.dumps(saved, indent=1) + "\n")
        if self.folder.exists():
            os.replace(self.folder, self._old)
        os.replace(new, self.folder)
        shutil.rmtree(self._old, ignore_errors=True)

    def _saved(self) -> dict[str, Any] | None:
        file = self.folder / _PROGRESS
        if not file.exists():
            return None
        try:
            saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            missing = {"progress", "param_groups", "files"} - set(saved)
        except (ValueError, TypeError):
            missing = {"a JSON object"}
        if missing:
            raise RunFolderError(
                f"{file} is torn or of another version of Imprint: it lacks {min(missing)}; begin "
                f"a run in another folder, which may start from {self.folder}"
            )
        return saved


def replace_text(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
