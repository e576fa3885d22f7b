"""`imprint train mid` and `imprint train post`: REFINE on all weights of a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imprint.adapters.training.refine_config import Phase, RefineTrainingConfig
from imprint.models.errors import ModelError
from imprint.server.commands.common import (
    CommandError,
    UsageError,
    add_model,
    error_console,
    model_folder,
)
from imprint.server.commands.descriptions import Commands, add_command

if TYPE_CHECKING:
    from imprint.adapters.training.refine_train import Said
    from imprint.adapters.training.rounds import Numbers

_DATA = {
    "mid": "objects with `text`",
    "post": "objects with `prompt` and `response`, or `context`, `question` and `answers`",
}
_EXAMPLES = """
imprint train {phase} --data texts --out runs/{phase}
imprint train {phase} --config {phase}.toml --data texts --out runs/{phase} --max-minutes 30
imprint serve --model runs/{phase}/checkpoint

On several GPUs: torchrun --nproc-per-node 8 -m imprint.server.cli train {phase} --device cuda ...

The same command goes on where a run stopped, with the losses it would have had. metrics.jsonl in
the run's folder has a line a round. In the TOML file, fields stand at the top and those of the
step under [method]; lambda_rl = 0 there leaves the next-token loss alone{baseline}."""


def add_parser(phases: Commands, phase: Phase, about: str) -> None:
    """Describe one phase."""
    baseline = ", prompt_steps = 0 the supervised loss" if phase == "post" else ""
    examples = _EXAMPLES.format(phase=phase, baseline=baseline)
    parser = add_command(phases, phase, about, examples, run=run)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file; default: the paper")
    add_model(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        metavar="PATH",
        help=f".jsonl or .jsonl.zst files, or folders of them: {_DATA[phase]}",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder of the run"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--max-minutes", type=float, metavar="N", help="stop after so long, to go on another time"
    )
    parser.add_argument(
        "--shard-mib",
        type=float,
        default=16,
        metavar="N",
        help="largest file of a checkpoint, unless a tensor is larger; default: 16",
    )
    parser.add_argument("--json", action="store_true", help="each round as a JSON line")
    parser.set_defaults(phase=phase)


def run(arguments: argparse.Namespace) -> int:
    """Train, a line a round on standard error, or on standard output as JSON."""
    for name in ("max_minutes", "shard_mib"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be more than 0, got {value}")
    try:
        config = RefineTrainingConfig.load(arguments.phase, arguments.config)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config: {error}") from None
    from imprint.adapters.training.refine_train import NonFiniteError
    from imprint.adapters.training.start import TrainingPaths, train
    from imprint.models.host_memory import keep_freed_memory

    keep_freed_memory()
    init = model_folder(arguments.model, arguments.revision).folder
    paths = TrainingPaths(init=init, data=arguments.data, out=arguments.out)
    minutes = arguments.max_minutes
    try:
        folder = train(
            config,
            paths,
            device=arguments.device,
            seconds=None if minutes is None else minutes * 60,
            shard_bytes=int(arguments.shard_mib * 2**20),
            said=_say_json if arguments.json else _say_line(config),
        )
    except NonFiniteError as error:
        raise CommandError(f"training broke down: {error}; try a lower learning_rate") from error
    except (ValueError, ModelError) as error:
        raise UsageError(str(error)) from error
    if folder is not None:
        checkpoint = folder.checkpoints.folder
        error_console().print(f"checkpoint: {checkpoint}", markup=False, soft_wrap=True)
    return 0


def _say_json(numbers: Numbers) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def _say_line(config: RefineTrainingConfig) -> Said:
    console = error_console()

    def say(numbers: Numbers) -> None:
        done = int(numbers["step"]) + 1
        left_s = (config.steps - done) * numbers["seconds"] / done
        parts = [f"round {done}/{config.steps}", f"{numbers['num_tokens'] / 1e6:.2f}M tokens"]
        parts += [
            f"{name.replace('_', ' ')} {numbers[name]:.4f}"
            for name in ("ntp_loss", "policy_loss", "reward_mean", "response_loss")
            if name in numbers
        ]
        parts.append(f"{left_s / 60:.1f} min left")
        console.print("  ".join(parts), markup=False, soft_wrap=True)

    return say
