"""The engine on a tiny random model: answers, studies, isolation, and every way a job can end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.models import DeltaNet, Tokenizer, load_model, load_tokenizer, prefill
from imprint.models.generate import generate_greedy
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    FromWorker,
    Generate,
    Prompt,
    SequenceDone,
    TokenDelta,
)
from imprint.server.worker_config import WorkerConfig

REFINE: dict[str, Any] = {
    "type": "refine", "steps": 2, "positions": 4, "group_size": 2, "lora_rank": 2,
    "probe_margin": 0.0, "neutral_margin": 100.0, "margin_tokens": 0,
}  # fmt: skip


class Rig:
    """An engine whose messages are kept and whose clock the test may set."""

    def __init__(self, model: DeltaNet, tokenizer: Tokenizer, config: WorkerConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.now: float | None = None
        self.sent: list[FromWorker] = []
        self.engine = Engine(
            model, tokenizer, config, self.sent.append, model_hash="h", clock=self._clock
        )

    def _clock(self) -> float:
        import time

        return time.monotonic() if self.now is None else self.now

    def step(self) -> bool:
        try:
            return self.engine.step()
        except Exception as error:
            self.engine.fail_unit(error)
            return True

    def run(self) -> list[FromWorker]:
        """Step until there is nothing to do; everything that was said since the last call."""
        for _ in range(10_000):
            if not self.step():
                break
        said, self.sent[:] = list(self.sent), []
        return said

    def study(self, adaptation_id: str, text: str, **method: Any) -> AdaptationDone:
        tokens = self.tokenizer.encode(text)
        self.engine.handle(
            Adapt(adaptation_id=adaptation_id, tokens=tokens, method=method or {"type": "read"})
        )
        return one(self.run(), AdaptationDone)

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


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DeltaNet:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def make_rig(
    model: DeltaNet, tokenizer: Tokenizer, tiny_checkpoint: Path, tmp_path: Path
) -> Callable[..., Rig]:
    def make(**changes: Any) -> Rig:
        settings: dict[str, Any] = {
            "model": str(tiny_checkpoint), "store": str(tmp_path / "store"), "num_slots": 8,
            "segment_tokens": 32, "step_tokens": 32,
        }  # fmt: skip
        return Rig(model, tokenizer, WorkerConfig(**{**settings, **changes}))

    return make


def test_a_completion_equals_plain_generation(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    prompt = rig.prompt("The ship sailed at dawn, " * 4)  # several prefill pieces
    rig.engine.handle(Generate(request_id="r", prompts=[prompt], max_tokens=12))
    said = rig.run()
    expected = generate_greedy(rig.model, torch.tensor([prompt.tokens]), None, num_tokens=12)
    done = one(said, SequenceDone)
    assert tokens_of(said) == expected[0].tolist()[: len(tokens_of(said))]
    assert done.finish_reason == "length"
    assert done.usage == {"prompt_tokens": 100, "completion_tokens": 12, "document_tokens": 0}
    assert not done.adapted
    assert rig.engine.slots.table.num_used == 0


def test_an_answer_continues_from_the_document_end(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    text, question = "Anna hid the key under the third stone by the well.", "Where is it?"
    done = rig.study("adp_1", text)
    assert done.status == "succeeded"
    rig.engine.handle(
        Generate(request_id="r", adapter_id="adp_1", prompts=[rig.prompt(question)], max_tokens=8)
    )
    said = rig.run()
    _, state = prefill(rig.model, torch.tensor([rig.tokenizer.encode(text)]))
    expected = generate_greedy(
        rig.model, torch.tensor([rig.tokenizer.encode(question)]), state, num_tokens=8
    )
    assert tokens_of(said) == expected[0].tolist()
    assert one(said, SequenceDone).usage["document_tokens"] == len(text)
