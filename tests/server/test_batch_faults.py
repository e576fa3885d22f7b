"""One of several in a batch is cancelled, is late, runs out of memory or meets a not-a-number: it
ends alone, and the others end bit for bit as they would have without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.store import AdapterStore
from imprint.models import DeltaNet, RecurrentState, Tokenizer, load_model, load_tokenizer
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationEvent,
    AdaptationFailed,
    Cancel,
    FocusProgress,
    FromWorker,
    Generate,
    Generated,
    Observation,
    Observations,
    Prompt,
    RequestFailed,
    SequenceDone,
    TokenDelta,
)
from imprint.server.worker_config import WorkerConfig
from support.engine_rig import step_as_worker

pytestmark = pytest.mark.timeout(300)
FAULTS = ("cancel", "deadline", "oom", "nan")
REFINE: dict[str, Any] = {
    "type": "refine", "steps": 2, "positions": 4, "group_size": 2, "lora_rank": 2,
    "rollout_length": 4,
    "learning_rate": 0.05, "probe_confidence": 0.0, "neutral_margin": 100.0,
}  # fmt: skip
FOCUS = {name: value for name, value in REFINE.items() if name not in ("type", "neutral_margin")}
FOCUS |= {"lambda_rl": 0.4}  # with rollouts, which its preset has not
TEXT = "Anna hid the key under the third stone by the well, and nobody but the dog saw it. " * 5
POISON = 255
"""A token that no text here has."""
LATE_S = 5.0


class FragileModel(DeltaNet):
    """A model that breaks at one token: in all of a batch (oom), or in that token's row (nan)."""

    fatal: int | None = None
    fault = ""

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        bad_B = self._strike(tokens_BT)
        hidden_BTD, state = super().forward(tokens_BT, *args, **kwargs)
        if bad_B is None:
            return hidden_BTD, state
        hidden_BTD = hidden_BTD.masked_fill(bad_B.view(-1, 1, 1), torch.nan)
        return hidden_BTD, _spoilt(state, bad_B)

    def step_(
        self,
        tokens_B: Tensor,
        pool: RecurrentState,
        rows_B: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        bad_B = self._strike(tokens_B.unsqueeze(1))
        hidden_BD = super().step_(tokens_B, pool, rows_B, **kwargs)
        if bad_B is None:
            return hidden_BD
        for tensor in pool.tensors():
            tensor[bad_B if rows_B is None else rows_B[bad_B]] = torch.nan
        return hidden_BD.masked_fill(bad_B.unsqueeze(1), torch.nan)

    def _strike(self, tokens_BT: Tensor) -> Tensor | None:
        """Which rows are to be spoilt, if any."""
        bad_B = (tokens_BT == self.fatal).any(-1) if self.fatal is not None else None
        if bad_B is None or not bool(bad_B.any()):
            return None
        if self.fault == "oom":
            raise torch.OutOfMemoryError("no memory left")
        return bad_B


def _spoilt(state: RecurrentState, bad_B: Tensor) -> RecurrentState:
    if state.batch_size != len(bad_B):  # stops of one row
        bad_B = bad_B.expand(state.batch_size)
    layers = tuple(
        {
            name: t.masked_fill(bad_B.view(-1, *[1] * (t.ndim - 1)), torch.nan)
            for name, t in layer.items()
        }
        for layer in state.layers
    )
    return RecurrentState(layers)


class Rig:
    """An engine whose time stands still until a test says otherwise; all that it said."""

    def __init__(self, model: FragileModel, tokenizer: Tokenizer, store: Path) -> None:
        config = WorkerConfig(
            model="tiny", store=str(store), num_slots=8, segment_tokens=32, step_tokens=64,
            adaptation_share=1.0,
        )  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.store = AdapterStore(store)
        self.now = 0.0
        self.said: list[FromWorker] = []
        self.engine = Engine(
            model, tokenizer, config, self._hear, model_hash="h", clock=lambda: self.now
        )

    def _hear(self, message: FromWorker) -> None:
        self.said += message.values if isinstance(message, Generated) else [message]

    def step(self) -> bool:
        return step_as_worker(self.engine)

    def run(self, until: Callable[[FromWorker], bool] = lambda message: False) -> None:
        """Step until there is nothing to do, or something has been said."""
        for _ in range(10_000):
            if not self.step() or any(map(until, self.said)):
                self.engine.flush_observations()
                return
        raise AssertionError("no end")

    def strike(self, fault: str, victim: str, begun: Callable[[FromWorker], bool]) -> None:
        """Run; the fault comes once the victim has `begun`. A model that breaks does by itself."""
        if fault in ("cancel", "deadline"):
            self.run(begun)
            assert any(map(begun, self.said))
            if fault == "cancel":
                self.engine.handle(Cancel(id=victim))
            else:
                self.now = LATE_S
        self.run()

    def adapt(self, id: str, tokens: list[int], method: dict[str, Any], **fields: Any) -> None:
        self.engine.handle(Adapt(adaptation_id=id, tokens=tokens, method=method, **fields))

    def ask(self, id: str, adapter_id: str | None, tokens: list[int], **fields: Any) -> None:
        prompt = Prompt(sequence_id=id, tokens=tokens, seed=len(tokens))
        fields = {"max_tokens": 16, "temperature": 0.8, **fields}
        self.engine.handle(
            Generate(request_id=id, adapter_id=adapter_id, prompts=[prompt], **fields)
        )

    def largest(self, name: str) -> float:
        """The largest value that was observed of a metric."""
        return max(value.value for value in self.observed() if value.name == name)

    def observed(self) -> Iterator[Observation]:
        for message in self.said:
            if isinstance(message, Observations):
                yield from message.values

    def failure(self) -> tuple[str, str]:
        """The only request or adaptation that failed."""
        (failed,) = [m for m in self.said if isinstance(m, RequestFailed | AdaptationFailed)]
        id = failed.request_id if isinstance(failed, RequestFailed) else failed.adaptation_id
        return id, failed.code

    def assert_empty(self) -> None:
        stats = self.engine.stats()
        assert stats.slots_used == stats.adaptations_running == stats.adaptations_waiting == 0
        assert stats.requests_running == stats.requests_waiting == stats.adaptation_bytes == 0
        states = self.engine.slots.pool.tensors()
        assert all(not tensor[1:].any() for tensor in states)


def tokens_of(said: Sequence[FromWorker], id: str) -> list[int]:
    return [m.token_id for m in said if isinstance(m, TokenDelta) and m.sequence_id == id]


CODES = {
    "cancel": "cancelled",
    "deadline": "deadline_exceeded",
    "oom": "out_of_memory",
    "nan": "non_finite",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def make_rig(
    tiny_checkpoint: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Rig]:
    """`make_rig(store)`; without a folder, the store is empty."""
    plain = load_model(tiny_checkpoint)

    def make(store: Path | None = None) -> Rig:
        model = FragileModel(plain.config)
        model.load_state_dict(plain.state_dict())
        model.eval().requires_grad_(False)
        return Rig(model, tokenizer, store or tmp_path_factory.mktemp("store"))

    return make


@pytest.fixture(scope="module")
def library(make_rig: Callable[..., Rig]) -> Path:
    """A store with one document, studied and read."""
    rig = make_rig()
    tokens = rig.tokenizer.encode(TEXT)[:90]
    rig.adapt("studied", tokens, REFINE)
    rig.adapt("read", tokens, {"type": "read"})
    rig.run()
    return rig.store.root


# ---- sequences ---------------------------------------------------------------------------------

ASKED = {"x": "studied", "victim": "read", "y": "read", "z": None}
"""Four requests, by their adapters."""


def prompts(rig: Rig) -> dict[str, list[int]]:
    return {id: rig.tokenizer.encode("Where? " * (n + 1)) for n, id in enumerate(ASKED)}


@pytest.fixture(scope="module")
def spoken_alone(make_rig: Callable[..., Rig], library: Path) -> dict[str, list[int]]:
    rig, alone = make_rig(library), {}
    for id, prompt in prompts(rig).items():
        rig.ask(id, ASKED[id], prompt)
        rig.run()
        alone[id] = tokens_of(rig.said, id)
    return alone


@pytest.mark.parametrize(
    ("fault", "where"),
    [*((fault, "decoding") for fault in FAULTS), ("oom", "prompt"), ("nan", "prompt")],
)
def test_one_of_several_sequences(
    make_rig: Callable[..., Rig],
    library: Path,
    spoken_alone: dict[str, list[int]],
    fault: str,
    where: str,
) -> None:
    rig, alone = make_rig(library), spoken_alone
    asked = prompts(rig)
    others = {token for id in ASKED if id != "victim" for token in alone[id] + asked[id]}
    if where == "prompt":
        asked["victim"] = [*asked["victim"], POISON, *asked["victim"]]
    if fault in ("oom", "nan"):
        late = [token for token in alone["victim"][1:-1] if token not in others]
        rig.model.fatal, rig.model.fault = (POISON if where == "prompt" else late[0]), fault
    for id, prompt in asked.items():
        late_s = LATE_S if (id, fault) == ("victim", "deadline") else None
        rig.ask(id, ASKED[id], prompt, timeout_s=late_s)

    def begun(message: FromWorker) -> bool:
        if not isinstance(message, TokenDelta):
            return False
        return (message.sequence_id, message.index) == ("victim", 2)

    rig.strike(fault, "victim", begun)
    assert rig.failure() == ("victim", CODES[fault])
    if where == "decoding":
        assert rig.largest("engine_batch_size") >= 3  # a text may end early
    for id in ("x", "y", "z"):
        assert tokens_of(rig.said, id) == alone[id]
    assert sum(isinstance(message, SequenceDone) for message in rig.said) == 3
    rig.assert_empty()


# ---- documents ---------------------------------------------------------------------------------


def documents(rig: Rig) -> dict[str, list[int]]:
    """Four of one length, so that all share their batches."""
    tokens = rig.tokenizer.encode(TEXT)
    found = {id: tokens[7 * n : 7 * n + 96] for n, id in enumerate(("x", "victim", "y", "z"))}
    found["victim"][::8] = [POISON] * 12  # no branch is without it
    return found


@pytest.fixture(scope="module")
def studied_alone(make_rig: Callable[..., Rig]) -> dict[str, Any]:
    alone = {}
    for id, tokens in documents(make_rig()).items():
        rig = make_rig()
        rig.adapt(id, tokens, REFINE)
        rig.run()
        alone[id] = stored(rig, id)
    return alone


def stored(rig: Rig, id: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    adapter = rig.store.load(id)
    return adapter.manifest, adapter.to_tensors()


def first_step(message: FromWorker) -> bool:
    return (
        isinstance(message, AdaptationEvent)
        and message.kind == "step"
        and message.adaptation_id == "victim"
    )


@pytest.mark.parametrize(
    ("fault", "where"), [*((fault, "step") for fault in FAULTS), ("oom", "read"), ("nan", "read")]
)
def test_one_of_several_documents(
    make_rig: Callable[..., Rig], studied_alone: dict[str, Any], fault: str, where: str
) -> None:
    rig, alone = make_rig(), studied_alone
    rig.model.fault = fault
    rig.model.fatal = POISON if where == "read" and fault in ("oom", "nan") else None
    for id, tokens in documents(rig).items():
        late_s = LATE_S if (id, fault) == ("victim", "deadline") else None
        rig.adapt(id, tokens, REFINE, timeout_s=late_s)
    if where == "step" and fault in ("oom", "nan"):
        rig.run(first_step)
        rig.model.fatal = POISON
    rig.strike(fault, "victim", first_step)
    assert rig.largest("quantum_batch_size") == 4
    ends = {m.adaptation_id: m.status for m in rig.said if isinstance(m, AdaptationDone)}
    outcome = ends.pop("victim", None)
    if fault == "cancel":
        assert outcome == "cancelled"
    elif (fault, where) == ("nan", "step"):
        assert outcome == "rejected"  # what was read is whole, and answers
        assert rig.store.load("victim").manifest["result"]["reason"].endswith("not finite")
    else:
        assert outcome is None
        assert rig.failure() == ("victim", CODES[fault])
    assert set(ends) == {"x", "y", "z"}
    for id in ends:
        (manifest, tensors), (right_manifest, right) = stored(rig, id), alone[id]
        assert manifest == right_manifest
        assert all(torch.equal(tensors[name], right[name]) for name in right)
    rig.assert_empty()


# ---- questions that study ----------------------------------------------------------------------

QUESTIONS = {"x": "Where is it?", "victim": "Who has it?", "y": "Who saw it? "}


def questions(rig: Rig) -> dict[str, list[int]]:
    asked = {id: rig.tokenizer.encode(question) for id, question in QUESTIONS.items()}
    asked["victim"][4] = POISON
    return asked


@pytest.fixture(scope="module")
def focused_alone(make_rig: Callable[..., Rig], library: Path) -> dict[str, list[int]]:
    rig, alone = make_rig(library), {}
    for id, question in questions(rig).items():
        rig.ask(id, "read", question, focus=FOCUS)
        rig.run()
        alone[id] = tokens_of(rig.said, id)
    return alone


@pytest.mark.parametrize("fault", FAULTS)
def test_one_of_several_focus_runs(
    make_rig: Callable[..., Rig], library: Path, focused_alone: dict[str, list[int]], fault: str
) -> None:
    rig = make_rig(library)
    if fault in ("oom", "nan"):
        rig.model.fatal, rig.model.fault = POISON, fault
    for id, question in questions(rig).items():
        late_s = LATE_S if (id, fault) == ("victim", "deadline") else None
        rig.ask(id, "read", question, focus=FOCUS, timeout_s=late_s)

    def begun(message: FromWorker) -> bool:
        return isinstance(message, FocusProgress) and message.request_id == "victim"

    rig.strike(fault, "victim", begun)
    assert rig.failure() == ("victim", CODES[fault])
    assert rig.largest("quantum_batch_size") >= 2
    for id in ("x", "y"):
        assert tokens_of(rig.said, id) == focused_alone[id]
    rig.assert_empty()
