"""What a checkpoint folder holds, what it would cost to run, and what is wrong with it.

Reads config, headers and tokenizer; no weights, so a tensor that must be all zero is not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from imprint.models.architecture import FastWeightModel
from imprint.models.checkpoint import plan_checkpoint, skeleton
from imprint.models.errors import CheckpointError
from imprint.models.hub import NEUTRAL_FILE
from imprint.models.registry import load_config
from imprint.models.shards import stored_tensors
from imprint.models.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A checkpoint as it lies on disk. It can be served where `problems` is empty."""

    model_type: str
    architecture: str
    """Class of the model."""
    config: dict[str, Any]
    """What config.json says, with the defaults of what it does not."""
    num_parameters: int
    stored_bytes: dict[str, int]
    """By file."""
    stored_dtypes: dict[str, int]
    """Tensors of each type on disk."""
    dtype: str
    """Type in which it would be loaded."""
    weight_bytes: int
    """Of all parameters, loaded."""
    state_bytes: int
    """Of one document's memory, whatever the document's length."""
    question_template: str | None
    """How a question would be put; None where there is no usable tokenizer."""
    problems: tuple[str, ...]
    """What keeps it from being served."""
    notes: tuple[str, ...]
    """What is missing or odd, but does not."""


def inspect_checkpoint(
    folder: Path, *, dtype: torch.dtype, question_template: Path | None = None
) -> tuple[Inspection, FastWeightModel]:
    """The checkpoint in `folder`, and its model without numbers.

    Raises CheckpointError only for a config.json that cannot be used; the rest is in `problems`.
    """
    model = skeleton(load_config(folder))
    problems: list[str] = []
    stored = _checked(problems, lambda: stored_tensors(folder)) or {}
    if stored:
        problems += plan_checkpoint(model, folder).problems
    tokenizer = _checked(
        problems, lambda: load_tokenizer(folder, question_template=question_template)
    )
    sizes = {
        name: parameter.numel() * model.parameter_dtype(name, dtype).itemsize
        for name, parameter in model.named_parameters()
    }
    stored_bytes: Counter[str] = Counter()
    for tensor in stored.values():
        stored_bytes[tensor.file.name] += tensor.nbytes
    found = Inspection(
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        config=asdict(model.config),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        stored_bytes=dict(stored_bytes),
        stored_dtypes=dict(Counter(tensor.dtype for tensor in stored.values())),
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=sum(sizes.values()),
        state_bytes=model.to(dtype).init_state(1).nbytes,
        question_template=tokenizer.question_template if tokenizer else None,
        problems=tuple(problems),
        notes=tuple(_notes(folder, model, tokenizer)),
    )
    return found, model


def _notes(folder: Path, model: FastWeightModel, tokenizer: Tokenizer | None) -> list[str]:
    notes = []
    if not (folder / NEUTRAL_FILE).is_file():
        notes.append(f"no {NEUTRAL_FILE}: the gate judges by recall alone")
    vocab_size = model.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        notes.append(
            f"tokenizer.json has {tokenizer.vocab_size} tokens, the model {vocab_size}: a text "
            "with one of the others is refused"
        )
    return notes


def _checked(problems: list[str], work: Callable[[], T]) -> T | None:
    try:
        return work()
    except CheckpointError as error:
        problems.append(str(error))
        return None
