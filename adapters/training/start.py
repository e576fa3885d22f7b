"""From paths to a running REFINE training: checkpoint, data, folder, processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imprint.adapters.training.checkpoints import SHARD_BYTES
from imprint.adapters.training.examples import Examples, LongTexts, Pairs, find_files
from imprint.adapters.training.parallel import World
from imprint.adapters.training.refine_config import RefineTrainingConfig
from imprint.adapters.training.refine_train import RefineTraining, Said
from imprint.adapters.training.run_folder import RunFolder
from imprint.models.checkpoint import load_model
from imprint.models.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPaths:
    """Where a run starts from, what it reads, and where it goes."""

    init: Path
    """Folder of a checkpoint."""
    data: Sequence[Path]
    """Files, or folders of them: .jsonl or .jsonl.zst."""
    out: Path
    """Folder of the run."""


def train(
    config: RefineTrainingConfig,
    paths: TrainingPaths,
    *,
    device: str = "cpu",
    seconds: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    said: Said | None = None,
) -> RunFolder | None:
    """Begin the run, or go on with it; until it is finished or `seconds` have passed.

    Returns its folder, in the process that leads; None in the others of a torchrun.

    Raises ValueError (RunFolderError, ModelError among them) for what cannot be used, and
    NonFiniteError where training broke down.
    """
    world = World(device)
    try:
        files = find_files(paths.data)
        folder = RunFolder(paths.out, shard_bytes=shard_bytes)
        if world.leads:
            folder.begin(_description(config, paths.init, files))
        world.wait()
        begun = folder.checkpoints.progress() is not None
        start = folder.checkpoints.folder if begun else paths.init
        model = load_model(start, device=world.device)
        examples = _examples(config, files, load_tokenizer(start))
        training = RefineTraining(config, model, examples, folder, world, init=start)
        training.run(seconds=seconds, said=said)
        return folder if world.leads else None
    finally:
        world.close()


def _examples(
    config: RefineTrainingConfig, files: Sequence[Path], tokenizer: Tokenizer
) -> Examples:
    if config.phase == "post":
        return Pairs(files, tokenizer, most_tokens=config.document_tokens)
    return LongTexts(
        files,
        tokenizer,
        num_tokens=config.document_tokens,
        max_chars=config.max_corpus_chars,
    )


def _description(config: RefineTrainingConfig, init: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What must be the same where a run is taken up."""
    weights = sorted(init.glob("*.safetensors"))
    return {
        "config": config.to_dict(),
        "init": {"config_sha256": _sha256(init / "config.json"), "weights": _sizes(weights)},
        "data": _sizes(files),
    }


def _sizes(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"name": file.name, "bytes": file.stat().st_size} for file in files]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
