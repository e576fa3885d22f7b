"""`imprint train`: training runs of this repository's own models."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from imprint.models.errors import ModelError
from imprint.server.commands import train_plot, train_refine
from imprint.server.commands.common import UsageError
from imprint.server.commands.descriptions import Commands, add_command, add_group


def add_parser(commands: Commands) -> None:
    """Describe the command and its phases."""
    phases = add_group(
        commands,
        "train",
        "train a model: pre-, mid- and post-training",
        "imprint train pretrain --config tiny.toml --corpus texts --out runs/tiny\n"
        "imprint train mid --data texts --out runs/mid",
        parts="phases",
    )
    pretrain = add_command(
        phases,
        "pretrain",
        "train a small model from nothing; run it again to go on where it stopped",
        "imprint train pretrain --config tiny.toml --corpus texts --out runs/tiny\n"
        "imprint serve --model runs/tiny/final",
        description="Train a small model from nothing. The same command goes on where it stopped.",
        run=run_pretrain,
    )
    pretrain.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file")
    pretrain.add_argument(
        "--corpus",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of train-*.jsonl.zst files with a field `text` per line",
    )
    pretrain.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of checkpoints"
    )
    pretrain.add_argument(
        "--init",
        type=Path,
        metavar="FOLDER",
        help="start a new run from this checkpoint's weights and tokenizer; layers that it "
        "lacks start as no change",
    )
    pretrain.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="questions with their contexts to practise on (.jsonl or .jsonl.zst)",
    )
    pretrain.add_argument(
        "--threads", type=int, default=2, metavar="N", help="parts of a batch computed at once"
    )
    pretrain.add_argument("--json", action="store_true", help="progress as JSON lines")
    train_refine.add_parser(phases, "mid", "train a checkpoint on long text with REFINE")
    train_refine.add_parser(
        phases, "post", "train a checkpoint to answer: REFINE on prompts, then their responses"
    )
    train_plot.add_parser(phases)


def run_pretrain(arguments: argparse.Namespace) -> int:
    """Train to the end of the last stage: every few seconds a log line on standard error, or, as
    JSON, one on standard output."""
    if not arguments.config.is_file():
        raise UsageError(f"--config: {arguments.config} is not a file")
    if not arguments.corpus.is_dir():
        raise UsageError(f"--corpus: {arguments.corpus} is not a folder")
    if arguments.init is not None and not arguments.init.is_dir():
        raise UsageError(f"--init: {arguments.init} is not a folder")
    if arguments.questions is not None and not arguments.questions.is_file():
        raise UsageError(f"--questions: {arguments.questions} is not a file")
    if arguments.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {arguments.threads}")
    from imprint.adapters.training.pretrain import log_line, pretrain
    from imprint.models.host_memory import keep_freed_memory

    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        pretrain(
            arguments.config,
            arguments.corpus,
            arguments.out,
            init=arguments.init,
            questions=arguments.questions,
            threads=arguments.threads,
            said=_say_json if arguments.json else log_line,
        )
    except (ValueError, ModelError) as error:
        raise UsageError(str(error)) from error
    return 0


def _say_json(numbers: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()
