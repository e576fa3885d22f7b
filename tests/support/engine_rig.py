"""An engine on a tiny random model, stepped by hand, whose messages are kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imprint.models import DeltaNet, Tokenizer
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    FromWorker,
    Generate,
    Generated,
    Prompt,
    SequenceDone,
    TokenDelta,
)
from imprint.server.worker_config import WorkerConfig

REFINE: dict[str, Any] = {
    "type": "refine", "steps": 2, "positions": 4, "group_size": 2, "lora_rank": 2,
    "learning_rate": 0.05, "probe_confidence": 0.0, "neutral_margin": 100.0,
}  # fmt: skip
"""Two large steps, which a random model gains from."""
TEXTS = [
    "Anna hid the key under the third stone by the well, and nobody but the dog saw it. " * 3,
    "The lighthouse keeper wrote 4711 into his book before the storm came over the sea. " * 4,
    "Zürich, Bern, Genève: três cidades, and a train that is never late, not even here. " * 2,
]
POISON = 255
"""A token at which `FaultyModel` breaks."""


def step_as_worker(engine: Engine) -> bool:
    """One step, whose errors end what they must, as in the worker's loop."""
    try:
        return engine.step()
    except Exception as error:
        engine.fail_unit(error)
        return True


class FaultyModel(DeltaNet):
    """A model with a switch for each way in which a batch can go wrong."""

    longest = 10_000
    breaks = False
    poisons = False

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tokens_BT.shape[1] > self.longest:
            raise torch.OutOfMemoryError("out of memory")
        if self.breaks and bool((tokens_BT == POISON).any()):
            raise RuntimeError("a kernel broke")
        hidden_BTD, state = super().forward(tokens_BT, *args, **kwargs)
        if self.poisons:
            bad_B = (tokens_BT == POISON).any(-1)
            hidden_BTD = hidden_BTD.masked_fill(bad_B.view(-1, 1, 1), torch.nan)
        return hidden_BTD, state


class Rig:
    """An engine whose messages are kept and whose clock the test may set."""

    def __init__(self, model: DeltaNet, tokenizer: Tokenizer, config: WorkerConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.now: float | None = None
        self.sent: list[FromWorker] = []
        self.num_batches = 0
        """Messages that told what a batch has generated."""
        self.engine = Engine(
            model, tokenizer, config, self._hear, model_hash="h", clock=self._clock
        )

    def _hear(self, message: FromWorker) -> None:
        if isinstance(message, Generated):
            self.num_batches += 1
            self.sent += message.values
        else:
            self.sent.append(message)

    def _clock(self) -> float:
        return time.monotonic() if self.now is None else self.now

    def step(self) -> bool:
        return step_as_worker(self.engine)

    def run(self) -> list[FromWorker]:
        """Step until there is nothing to do; everything that was said since the last call."""
        for _ in range(10_000):
            if not self.step():
                break
        said, self.sent[:] = list(self.sent), []
        return said

    def study(self, adaptation_id: str, text: str, **method: Any) -> AdaptationDone:
        tokens = self.tokenizer.encode(text)
        method = method or {"type": "read"}
        self.engine.handle(Adapt(adaptation_id=adaptation_id, tokens=tokens, method=method))
        done: AdaptationDone = one(self.run(), AdaptationDone)
        return done

    def ask(self, request_id: str, adapter_id: str | None = None, **fields: Any) -> None:
        prompts = fields.pop("prompts", None) or [self.prompt("Where is it?", request_id)]
        fields = {"max_tokens": 8, **fields}
        self.engine.handle(
            Generate(request_id=request_id, adapter_id=adapter_id, prompts=prompts, **fields)
        )

    def prompt(self, text: str, sequence_id: str = "s", seed: int = 0) -> Prompt:
        return Prompt(sequence_id=sequence_id, tokens=self.tokenizer.encode(text), seed=seed)


def one(messages: Sequence[FromWorker], kind: type) -> Any:
    found = [message for message in messages if isinstance(message, kind)]
    assert len(found) == 1, (kind.__name__, messages)
    return found[0]


def tokens_of(messages: Sequence[FromWorker], sequence_id: str = "s") -> list[int]:
    deltas = [m for m in messages if isinstance(m, TokenDelta) and m.sequence_id == sequence_id]
    assert [delta.index for delta in deltas] == list(range(len(deltas)))
    return [delta.token_id for delta in deltas]


def done_of(messages: Sequence[FromWorker], sequence_id: str) -> SequenceDone:
    return next(m for m in messages if isinstance(m, SequenceDone) and m.sequence_id == sequence_id)
