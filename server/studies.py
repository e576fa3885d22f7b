"""From messages to generators of quanta: what a study will cost, and how it is begun.

Knows the adapters package and the messages; knows nothing of scheduling or sockets.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imprint.adapters import quantum
from imprint.adapters.adapter import Adapter
from imprint.adapters.config import NOT_SERVED, RefineConfig, config_of_focus, config_of_study
from imprint.adapters.document import DocumentReader
from imprint.adapters.drafts import Ends
from imprint.adapters.errors import ConfigError
from imprint.adapters.focus import Focus
from imprint.adapters.imported import read_import
from imprint.adapters.progress import Progress
from imprint.adapters.refine import Refiner
from imprint.adapters.similarity import Similarity
from imprint.models import FastWeightModel
from imprint.server.budgets import TYPICAL_TOKENS
from imprint.server.messages import Adapt, Generate
from imprint.server.records import IMPORT

OPTIMIZER_COPIES = 6
"""What is trained, its gradient, the two moments of AdamW, the best so far and a blend of it."""

Study = quantum.Study[Adapter]


class MethodError(ValueError):
    """A method or focus that cannot be run; the message names the field."""


def study_config(adapt: Adapt, segment_tokens: int) -> RefineConfig | None:
    """The checked settings of an adaptation; None where it only reads, or is imported.

    Segments are cut down to `segment_tokens`, the bound on a quantum: that changes nothing but
    memory and time.
    """
    method = dict(adapt.method)
    kind = method.pop("type", "refine")
    if kind in ("read", IMPORT):
        if method:
            raise MethodError(f"method {kind!r} takes no fields, got {sorted(method)}")
        return None
    if kind != "refine":
        raise MethodError(f"method type must be refine or read, got {kind!r}")
    return _config(method, segment_tokens)


def focus_config(generate: Generate, segment_tokens: int) -> RefineConfig | None:
    """The checked settings of a request's focus run; None where it asks for none."""
    if generate.focus is None:
        return None
    if generate.adapter_id is None:
        raise MethodError("focus needs an adapter: the base model has no document to study")
    return _config(generate.focus, segment_tokens, make=config_of_focus)


def _config(
    fields: Mapping[str, Any],
    segment_tokens: int,
    *,
    make: Callable[[Mapping[str, Any]], RefineConfig] = config_of_study,
) -> RefineConfig:
    try:
        config = make(fields)
    except ConfigError as error:
        raise MethodError(str(error)) from error
    if config.scope == "full":
        raise MethodError(NOT_SERVED)
    return config.replace(segment_tokens=min(config.segment_tokens, segment_tokens))


def begin_study(
    model: FastWeightModel,
    adapt: Adapt,
    config: RefineConfig | None,
    segment_tokens: int,
    *,
    neutral: list[int] | None,
    neutral_base: float | None,
    progress: Progress,
    base: Callable[[], Adapter | None] = lambda: None,
    similarity: Similarity | None = None,
) -> Study:
    """The generator of an adaptation's calls; its value is the adapter. Nothing runs yet.

    A study goes on from its checkpoint, where `progress` has one. `base` gives an adapter of the
    document's beginning, if there is one to read on from.
    """
    study: DocumentReader | Refiner
    if config is None:
        study = DocumentReader(model, adapt.tokens, segment_tokens=segment_tokens, base=base())
    else:
        study = Refiner(
            model,
            adapt.tokens,
            config,
            seed=adapt.seed,
            neutral=neutral,
            neutral_base=neutral_base,
            progress=progress,
            base=base(),
            similarity=similarity,
        )
    yield from study.study()
    assert study.adapter is not None
    return study.adapter


def begin_import(model: FastWeightModel, path: Path) -> Study:
    """One quantum that takes in the file of an adapter."""
    adapter = read_import(path, model)
    yield quantum.Quantum(phase="import", num_tokens=0)
    return adapter


def begin_focus(
    model: FastWeightModel,
    adapter: Adapter,
    generate: Generate,
    config: RefineConfig,
    *,
    line_break: Sequence[int],
    ends: Ends,
    similarity: Similarity | None = None,
) -> Focus:
    """The focus run of all prompts of a request."""
    return Focus(
        model,
        adapter,
        [prompt.tokens for prompt in generate.prompts],
        config,
        seed=generate.prompts[0].seed,
        similarity=similarity,
        line_break=line_break,
        ends=ends,
    )


def step_tokens(num_tokens: int, config: RefineConfig) -> int:
    """Tokens that the quanta of one step process: rollouts, then all, forward and backward."""
    group = config.group_size if config.lambda_rl > 0 else 0
    rollouts = config.positions * group * config.rollout_length
    # the document is read twice a step, the second time with gradients
    document = 3 * num_tokens if config.reads_again else 0
    return rollouts + 2 * config.positions * config.branch_tokens + document


def estimate_work_tokens(num_tokens: int, config: RefineConfig | None) -> int:
    """Tokens that an adaptation's quanta will process, if it is not stopped early."""
    if config is None:
        return num_tokens
    readings = 2 if config.reads_again else 1
    num_steps = config.steps + len(config.learning_rates) * config.trial_steps
    readings += (readings - 1) * len(config.learning_rates)
    return readings * num_tokens + num_steps * step_tokens(num_tokens, config)


def typical_bytes(model: FastWeightModel, segment_tokens: int) -> int:
    """What `estimate_bytes` says of a document of `TYPICAL_TOKENS` in the default preset."""
    config = _config({}, segment_tokens)
    return estimate_bytes(model, TYPICAL_TOKENS, config, segment_tokens)


def estimate_bytes(
    model: FastWeightModel, num_tokens: int, config: RefineConfig | None, segment_tokens: int
) -> int:
    """Memory that an adaptation needs beside the model, at most: states, deltas, activations."""
    state_bytes = model.init_state(1).nbytes
    if config is None:
        return 2 * state_bytes + 4 * model.activation_floats(segment_tokens)
    segments = -(-num_tokens // config.segment_tokens) if config.reads_again else 1
    # a segment and a batch of branches, which holds one position at least
    live_tokens = config.segment_tokens + max(config.segment_tokens, config.branch_tokens)
    branches = config.branches_at_once * max(config.group_size, 1)
    return (
        (segments + 2 + branches) * state_bytes
        + OPTIMIZER_COPIES * _trained_bytes(model, config)
        + 4 * model.activation_floats(live_tokens)
    )


def _trained_bytes(model: FastWeightModel, config: RefineConfig) -> int:
    if config.scope == "state":
        return 4 * sum(tensor.numel() for tensor in model.init_state(1).tensors())
    return 4 * config.lora_rank * sum(sum(widths) for widths in model.lora_targets().values())
