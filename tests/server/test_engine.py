"""The engine on a tiny random model: answers, studies, isolation, and every way a job can end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore
from imprint.models import DeltaNet, Tokenizer, load_model, load_tokenizer, prefill
from imprint.models.checkpoint import weights_hash
from imprint.models.generate import generate_greedy
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationEvent,
    AdaptationFailed,
    AdaptationStarted,
    Cancel,
    Drain,
    Evict,
    Evicted,
    FocusProgress,
    FromWorker,
    Generate,
    Generated,
    Prompt,
    RequestFailed,
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
        try:
            return self.engine.step()
        except Exception as error:  # what the worker's loop does
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


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DeltaNet:
    return load_model(tiny_checkpoint)


@pytest.fixture
def faulty(model: DeltaNet) -> FaultyModel:
    copy = FaultyModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def make_rig(
    model: DeltaNet, tokenizer: Tokenizer, tiny_checkpoint: Path, tmp_path: Path
) -> Callable[..., Rig]:
    def make(other: DeltaNet | None = None, **changes: Any) -> Rig:
        settings: dict[str, Any] = {
            "model": str(tiny_checkpoint), "store": str(tmp_path / "store"), "num_slots": 8,
            "segment_tokens": 32, "step_tokens": 32,
        }  # fmt: skip
        return Rig(other or model, tokenizer, WorkerConfig(**{**settings, **changes}))

    return make


def test_a_completion_equals_plain_generation(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    prompt = rig.prompt("The ship sailed at dawn, " * 4)  # several pieces of prefill
    rig.ask("r", prompts=[prompt], max_tokens=12)
    said = rig.run()
    expected = generate_greedy(rig.model, torch.tensor([prompt.tokens]), None, num_tokens=12)
    done = one(said, SequenceDone)
    assert tokens_of(said) == expected[0].tolist()
    assert done.finish_reason == "length"
    assert done.usage == {"prompt_tokens": 100, "completion_tokens": 12, "document_tokens": 0}
    assert not done.adapted
    assert rig.engine.slots.table.num_used == 0


def test_an_answer_continues_from_the_document_end(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    question = rig.prompt("Where is it?")
    assert rig.study("adp_1", TEXTS[0]).status == "succeeded"
    rig.ask("r", "adp_1", prompts=[question])
    said = rig.run()
    _, state = prefill(rig.model, torch.tensor([rig.tokenizer.encode(TEXTS[0])]))
    expected = generate_greedy(rig.model, torch.tensor([question.tokens]), state, num_tokens=8)
    assert tokens_of(said) == expected[0].tolist()
    assert one(said, SequenceDone).usage["document_tokens"] == len(TEXTS[0])


def test_an_adaptation_tells_its_story(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.engine.handle(
        Adapt(adaptation_id="a", tokens=rig.tokenizer.encode(TEXTS[0]), method=REFINE, attempt=2)
    )
    said = rig.run()
    assert said[0] == AdaptationStarted(adaptation_id="a", attempt=2)
    events = [message for message in said if isinstance(message, AdaptationEvent)]
    steps = [event.data for event in events if event.kind == "step"]
    assert [data["step"] for data in steps] == [1, 2]
    assert all(math.isfinite(data["ntp_loss"]) for data in steps)
    assert events[0].kind == "progress"
    assert events[0].data["phase"] == "read"
    done = one(said, AdaptationDone)
    assert done.status == "succeeded"
    assert done.result["accepted"]
    assert done.result["num_tokens"] == len(TEXTS[0])
    assert done.usage["tokens_forward"] > len(TEXTS[0])
    rig.ask("r", "a")
    assert one(rig.run(), SequenceDone).adapted


def test_a_refused_study_is_rejected_and_its_reading_still_answers(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    done = rig.study("a", TEXTS[0], **{**REFINE, "probe_margin": 100.0})
    assert done.status == "rejected"
    rig.study("b", TEXTS[0])
    rig.ask("ra", "a")
    answers = rig.run()
    rig.ask("rb", "b")
    assert tokens_of(answers, "ra") == tokens_of(rig.run(), "rb")
    assert not one(answers, SequenceDone).adapted


class SlowStore(AdapterStore):
    """A store whose disk waits until it is told to go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go_on = threading.Event()

    def load(self, adapter_id: str) -> Adapter:
        assert self.go_on.wait(20)
        return super().load(adapter_id)


def test_answers_decode_while_an_adapter_is_loaded(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(adapter_host_bytes=0)
    rig.study("a", TEXTS[0])
    rig.ask("x", "a")
    expected = tokens_of(rig.run(), "x")
    store = rig.engine.cache._store = SlowStore(rig.engine.cache._store.root)
    rig.ask("x", "a")
    rig.ask("late", "a", timeout_s=0.0)
    rig.ask("gone", "a")
    rig.ask("y")
    for _ in range(30):
        assert rig.step()  # while an adapter is awaited there is work
    assert done_of(rig.sent, "y").finish_reason == "length"
    assert one(rig.sent, RequestFailed).request_id == "late"
    rig.engine.handle(Cancel(id="gone"))
    store.go_on.set()
    said = rig.run()
    assert tokens_of(said, "x") == expected
    assert [m.request_id for m in said if isinstance(m, RequestFailed)] == ["late", "gone"]
    assert not rig.step()


# ---- isolation -------------------------------------------------------------------------------


def test_company_changes_nothing(make_rig: Callable[..., Rig]) -> None:
    """Canary: deltas of two ranks, none, no document at all, greedy and sampled, in all mixes."""

    def prepare() -> Rig:
        rig = make_rig(num_slots=4)
        rig.study("a", TEXTS[0], **REFINE)
        rig.study("b", TEXTS[1], **{**REFINE, "lora_rank": 4})
        rig.study("c", TEXTS[2], **REFINE)
        rig.study("d", TEXTS[2])
        return rig

    rig = prepare()
    asked = [("a", 0.0), ("b", 0.9), ("c", 0.9), ("d", 1.3), (None, 1.0)]

    def ask(number: int, name: str) -> None:
        adapter_id, temperature = asked[number]
        prompt = rig.prompt("Where? " * (number + 1), name, seed=number)
        rig.ask(name, adapter_id, prompts=[prompt], temperature=temperature, max_tokens=6 + number)

    alone = []
    for number in range(len(asked)):
        ask(number, f"alone{number}")
        alone.append(tokens_of(rig.run(), f"alone{number}"))
    assert len({tuple(tokens[:6]) for tokens in alone}) == len(asked)
    for start in range(6):  # more requests than slots, entering and leaving at different times
        for number in range(len(asked)):
            ask((number + start) % len(asked), f"{start}.{(number + start) % len(asked)}")
            rig.step()
    rig.engine.handle(
        Adapt(adaptation_id="e", tokens=rig.tokenizer.encode(TEXTS[1]), method=REFINE)
    )
    said = rig.run()
    for start in range(6):
        for number, tokens in enumerate(alone):
            assert tokens_of(said, f"{start}.{number}") == tokens
    assert all(not tensor.any() for tensor in rig.engine.slots._states.tensors())


def test_an_adapter_is_bit_for_bit_the_same_in_company(
    make_rig: Callable[..., Rig], tmp_path: Path, model: DeltaNet
) -> None:
    before = weights_hash(model)
    alone = make_rig(store=str(tmp_path / "alone"))
    alone.study("a", TEXTS[0], **REFINE)
    rig = make_rig(store=str(tmp_path / "company"))
    rig.study("d", TEXTS[2])
    for id, text in (("a", TEXTS[0]), ("b", TEXTS[1])):
        rig.engine.handle(Adapt(adaptation_id=id, tokens=rig.tokenizer.encode(text), method=REFINE))
    rig.ask("r", "d", max_tokens=60, temperature=1.0, focus={"steps": 1, "lora_rank": 2})
    rig.run()
    adapters = [AdapterStore(tmp_path / name).load("a") for name in ("alone", "company")]
    assert adapters[0].adapted
    assert adapters[0].manifest == adapters[1].manifest
    pairs = [adapter.to_tensors() for adapter in adapters]
    assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
    assert weights_hash(model) == before


# ---- focus -----------------------------------------------------------------------------------


def test_each_question_decodes_with_its_own_focus(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    focus = {"steps": 2, "lora_rank": 2, "learning_rate": 0.05, "probe_confidence": 0.0}
    focus |= {"positions": 4, "rollout_length": 8}
    questions = ["Where is the key?", "Who saw it? The dog?"]
    prompts = [rig.prompt(question, f"q{i}") for i, question in enumerate(questions)]
    rig.ask("both", "a", prompts=prompts, focus=focus)
    both = rig.run()
    progress = [message for message in both if isinstance(message, FocusProgress)]
    assert [(message.step, message.steps) for message in progress] == [(1, 2), (2, 2)]
    done = [message for message in both if isinstance(message, SequenceDone)]
    assert all(message.adapted and message.focus is not None for message in done)
    for i, prompt in enumerate(prompts):
        rig.ask(f"one{i}", "a", prompts=[prompt], focus=focus)
        assert tokens_of(rig.run(), f"q{i}") == tokens_of(both, f"q{i}")
    assert rig.engine.stats().requests_waiting == rig.engine.stats().slots_used == 0


@pytest.mark.parametrize(
    ("focus", "adapter_id", "names"),
    [
        ({"stepz": 2}, "a", "stepz"),
        ({"scope": "lora"}, "a", "scope"),
        ({}, None, "focus needs an adapter"),
    ],
)
def test_an_impossible_focus_is_refused_by_name(
    make_rig: Callable[..., Rig], focus: dict[str, Any], adapter_id: str | None, names: str
) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    rig.ask("r", adapter_id, focus=focus)
    failed = one(rig.run(), RequestFailed)
    assert failed.code == "invalid_method"
    assert names in failed.message


# ---- text ------------------------------------------------------------------------------------


def test_text_has_whole_characters_and_stops_at_stop_strings(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.ask("r", max_tokens=200, temperature=1.5)
    said = rig.run()
    text = "".join(m.text for m in said if isinstance(m, TokenDelta | SequenceDone))
    tokens = tokens_of(said, "r")
    assert len(text) > 40
    assert rig.tokenizer.decode(tokens).startswith(text)
    stop = text[20:23]
    rig.ask(
        "s", prompts=[rig.prompt("Where is it?", "s")], max_tokens=200, temperature=1.5, stop=[stop]
    )
    said = rig.run()
    shown = "".join(m.text for m in said if isinstance(m, TokenDelta | SequenceDone))
    done = one(said, SequenceDone)
    assert shown == text[: text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.usage["completion_tokens"] < len(tokens)


def test_what_a_batch_has_generated_is_one_message(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(step_tokens=128)  # all prompts in one step
    names = ("a", "b", "c")
    rig.ask("r", prompts=[rig.prompt("Where is it?", name) for name in names], max_tokens=5)
    rig.ask("q", max_tokens=5)
    said = rig.run()
    assert [len(tokens_of(said, name)) for name in (*names, "q")] == [5, 5, 5, 5]
    assert sum(isinstance(message, SequenceDone) for message in said) == 4
    assert rig.num_batches == 5  # of at least four tokens each


# ---- ends ------------------------------------------------------------------------------------


def test_cancelled_work_leaves_nothing_behind(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    long = {**REFINE, "steps": 1000, "patience": 1000}
    rig.engine.handle(Adapt(adaptation_id="b", tokens=[5] * 300, method=long))
    rig.ask("decoding", "a", max_tokens=10_000)
    rig.ask("studying", "a", focus={"steps": 1000, "patience": 1000, "lora_rank": 2})
    for _ in range(20):
        rig.step()
    stats = rig.engine.stats()
    assert (stats.adaptations_running, stats.requests_running, stats.requests_waiting) == (1, 1, 1)
    assert stats.slots_used == 1
    for id in ("b", "decoding", "studying", "unknown"):
        rig.engine.handle(Cancel(id=id))
    said = rig.run()
    assert one(said, AdaptationDone).status == "cancelled"
    failed = [message for message in said if isinstance(message, RequestFailed)]
    assert {(message.request_id, message.code) for message in failed} == {
        ("decoding", "cancelled"), ("studying", "cancelled"),
    }  # fmt: skip
    stats = rig.engine.stats()
    assert (stats.adaptations_running, stats.requests_running, stats.requests_waiting) == (0, 0, 0)
    assert stats.slots_used == 0
    assert stats.adapters == {"host": 1, "disk": 1}


def test_a_deleted_adapter_is_gone_everywhere(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make_rig()
    empty = rig.engine.stats()
    rig.study("a", TEXTS[0], **REFINE)
    rig.ask("r", "a", max_tokens=10_000)
    for _ in range(5):
        rig.step()
    rig.engine.handle(Evict(adapter_id="a"))
    said = rig.run()
    assert one(said, RequestFailed).code == "adapter_not_found"
    assert said[-1] == Evicted(adapter_id="a")
    stats = rig.engine.stats()
    assert (stats.adapters, stats.adapter_bytes) == (empty.adapters, empty.adapter_bytes)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert all(not tensor.any() for tensor in rig.engine.slots._states.tensors())
    rig.ask("again", "a")
    assert one(rig.run(), RequestFailed).code == "adapter_not_found"
    for unknown in ("never", "../never"):
        rig.engine.handle(Evict(adapter_id=unknown))
        assert rig.run() == [Evicted(adapter_id=unknown)]


def test_deadlines_end_work_wherever_it_is(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.now = 0.0
    long = {**REFINE, "steps": 1000, "patience": 1000}
    rig.engine.handle(Adapt(adaptation_id="a", tokens=[5] * 300, method=long, timeout_s=5))
    rig.ask("r", max_tokens=10_000, timeout_s=5)
    for _ in range(5):
        rig.step()
    rig.now = 5.0
    said = rig.run()
    ends = [one(said, AdaptationFailed), one(said, RequestFailed)]
    assert {end.code for end in ends} == {"deadline_exceeded"}
    assert [end.phase for end in ends] == ["quantum", "decode"]
    assert rig.engine.slots.table.num_used == 0


def test_a_drain_finishes_answers_and_takes_no_more(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    rig.engine.handle(Adapt(adaptation_id="b", tokens=[5] * 300, method=REFINE))
    rig.ask("r", "a", focus={"steps": 2, "lora_rank": 2})
    rig.step()
    rig.engine.handle(Drain())
    assert not rig.engine.drained
    rig.ask("late", "a")
    said = rig.run()
    assert one(said, SequenceDone).request_id == "r"
    assert one(said, RequestFailed).code == "draining"
    assert not any(isinstance(message, AdaptationDone) for message in said)
    assert rig.engine.drained


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "method", "code"),
    [
        ([], {"type": "read"}, "document_empty"),
        ([], REFINE, "document_empty"),
        ([5, 9999], REFINE, "invalid_token"),
        ([5] * 501, REFINE, "document_too_large"),
        ([5] * 50, {"type": "dream"}, "invalid_method"),
        ([5] * 50, {"type": "refine", "stepz": 3}, "invalid_method"),
        ([5] * 50, {"type": "read", "steps": 3}, "invalid_method"),
        ([5] * 50, {"type": "refine", "lora_rank": 256, "scope": "lora"}, "document_too_large"),
    ],
)
def test_adaptations_that_cannot_run_say_why(
    make_rig: Callable[..., Rig], tokens: list[int], method: dict[str, Any], code: str
) -> None:
    rig = make_rig(max_tokens=500, adaptation_bytes=4_000_000)
    rig.engine.handle(Adapt(adaptation_id="a", tokens=tokens, method=method))
    assert one(rig.run(), AdaptationFailed).code == code


@pytest.mark.parametrize("length", [1, 2, 7, 20, 40])
def test_tiny_documents_end_clearly(make_rig: Callable[..., Rig], length: int) -> None:
    rig = make_rig()
    for method in (REFINE, {"type": "read"}, {"type": "refine", "scope": "lora", "steps": 1}):
        assert rig.study("a", TEXTS[0][:length], **method).status in ("succeeded", "rejected")
        rig.ask("r", "a", focus={"steps": 1})
        assert one(rig.run(), SequenceDone).finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompts": [Prompt(sequence_id="s", tokens=[])]}, "invalid_request"),
        ({"prompts": [Prompt(sequence_id="s", tokens=[-1])]}, "invalid_request"),
        ({"prompts": [Prompt(sequence_id="s", tokens=[1])] * 2}, "invalid_request"),
        ({"max_tokens": 0}, "invalid_request"),
        ({"prompts": [Prompt(sequence_id="s", tokens=[1] * 501)]}, "context_length_exceeded"),
        ({"adapter_id": "nowhere"}, "adapter_not_found"),
        ({"adapter_id": "../../etc"}, "adapter_not_found"),
    ],
)
def test_requests_that_cannot_run_say_why(
    make_rig: Callable[..., Rig], fields: dict[str, Any], code: str
) -> None:
    rig = make_rig(max_tokens=500)
    rig.ask("r", **fields)
    assert one(rig.run(), RequestFailed).code == code


def test_a_full_queue_refuses(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(max_waiting_requests=2)
    for number in range(3):
        rig.ask(f"r{number}")
    assert one(rig.run(), RequestFailed).code == "queue_full"


def test_a_broken_row_ends_its_own_request_only(
    make_rig: Callable[..., Rig], faulty: FaultyModel
) -> None:
    rig = make_rig(faulty)
    rig.ask("good")
    expected = tokens_of(rig.run(), "good")
    for switch, code in (("breaks", "internal_error"), ("poisons", "non_finite")):
        setattr(faulty, switch, True)
        rig.ask("good")
        rig.ask("bad", prompts=[Prompt(sequence_id="bad", tokens=[3, POISON, 3])])
        said = rig.run()
        assert tokens_of(said, "good") == expected
        failed = one(said, RequestFailed)
        assert (failed.request_id, failed.code) == ("bad", code)
        setattr(faulty, switch, False)
    assert rig.engine.slots.table.num_used == 0


class ShakyModel(DeltaNet):
    """A model whose steps in place break off, once they have spoilt the slots."""

    num_breaks = 0
    """How many of the coming steps break."""
    fatal: int | None = None
    """A token that nothing may read."""

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fatal is not None and bool((tokens_BT == self.fatal).any()):
            raise RuntimeError("a kernel broke")
        return super().forward(tokens_BT, *args, **kwargs)

    def step_(self, tokens_B: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_BD = super().step_(tokens_B, *args, **kwargs)
        if self.num_breaks or (self.fatal is not None and bool((tokens_B == self.fatal).any())):
            self.num_breaks = max(self.num_breaks - 1, 0)
            raise torch.OutOfMemoryError("no memory left")
        return hidden_BD


@pytest.fixture
def shaky(model: DeltaNet) -> ShakyModel:
    copy = ShakyModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def test_slots_that_a_broken_step_spoilt_are_read_again(
    make_rig: Callable[..., Rig], shaky: ShakyModel
) -> None:
    rig = make_rig(shaky, step_tokens=8)
    rig.study("a", TEXTS[0], **REFINE)
    asked = {"x": ("a", 0.9), "y": (None, 0.0)}

    def ask_both() -> None:
        for name, (adapter_id, temperature) in asked.items():
            rig.ask(name, adapter_id, temperature=temperature, max_tokens=20)

    ask_both()
    said = rig.run()
    expected = {name: tokens_of(said, name) for name in asked}
    used = {name: done_of(said, name).usage for name in asked}
    ask_both()
    for num_steps in (6, 2, 9):
        for _ in range(num_steps):
            rig.step()
        shaky.num_breaks = 1
    said = rig.run()
    assert {name: tokens_of(said, name) for name in asked} == expected
    assert {name: done_of(said, name).usage for name in asked} == used
    # one that breaks each time ends by itself; another's end is as it was
    shaky.fatal = next(token for token in expected["x"][:-1] if token not in expected["y"])
    ask_both()
    said = rig.run()
    assert one(said, RequestFailed).request_id == "x"
    assert tokens_of(said, "y") == expected["y"]
    shaky.fatal, shaky.num_breaks = None, 10**6
    ask_both()
    ends = [message for message in rig.run() if isinstance(message, RequestFailed)]
    assert {(end.request_id, end.code) for end in ends} == {
        ("x", "out_of_memory"),
        ("y", "out_of_memory"),
    }
    assert all(not tensor.any() for tensor in rig.engine.slots._states.tensors())


def test_running_out_of_memory_halves_the_segment_once(
    make_rig: Callable[..., Rig], faulty: FaultyModel
) -> None:
    rig = make_rig(faulty)
    rig.study("whole", TEXTS[0])
    faulty.longest = 20  # below the segment of 32, above half of it
    assert rig.study("halved", TEXTS[0]).status == "succeeded"
    ends = [rig.engine.cache.acquire(id).state.tensors() for id in ("whole", "halved")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends, strict=True))
    faulty.longest = 10
    tokens = rig.tokenizer.encode(TEXTS[0])
    rig.engine.handle(Adapt(adaptation_id="failed", tokens=tokens, method={"type": "read"}))
    assert one(rig.run(), AdaptationFailed).code == "out_of_memory"


def test_a_broken_quantum_ends_its_own_job_only(
    make_rig: Callable[..., Rig], faulty: FaultyModel
) -> None:
    rig = make_rig(faulty)
    faulty.breaks = True
    good, bad = rig.tokenizer.encode(TEXTS[0]), [7] * 50 + [POISON] + [7] * 50
    for id, tokens in (("bad", bad), ("good", good)):
        rig.engine.handle(Adapt(adaptation_id=id, tokens=tokens, method=REFINE))
    said = rig.run()
    failed = one(said, AdaptationFailed)
    assert (failed.adaptation_id, failed.code) == ("bad", "internal_error")
    assert "kernel" not in failed.message
    assert one(said, AdaptationDone).adaptation_id == "good"


def test_files_that_cannot_be_written_or_read_fail_their_own_job(
    make_rig: Callable[..., Rig], tmp_path: Path
) -> None:
    rig = make_rig(adapter_host_bytes=0)  # every answer loads from disk
    (tmp_path / "store" / "blocked.safetensors").mkdir()
    tokens = rig.tokenizer.encode(TEXTS[0])
    rig.engine.handle(Adapt(adaptation_id="blocked", tokens=tokens, method={"type": "read"}))
    assert one(rig.run(), AdaptationFailed).code == "store_failed"
    rig.study("a", TEXTS[0])
    rig.ask("r", "a")
    assert one(rig.run(), SequenceDone)
    file = tmp_path / "store" / "a.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 1
    file.write_bytes(blob)
    rig.ask("r", "a")
    assert one(rig.run(), RequestFailed).code == "adapter_corrupt"


def test_an_adapter_of_another_model_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    adapter = rig.engine.cache.acquire("a")
    adapter.manifest["model_hash"] = "another"
    rig.ask("r", "a")
    assert one(rig.run(), RequestFailed).code == "adapter_corrupt"


def test_work_that_cannot_even_be_taken_in_gets_an_answer(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    method: Any = {"type": ["unhashable"]}
    rig.engine.handle(Adapt(adaptation_id="a", tokens=[5] * 50, method=method))
    assert one(rig.run(), AdaptationFailed).code == "invalid_method"
    with pytest.raises(TypeError):
        rig.engine.handle(Adapt(adaptation_id="b", tokens=[5] * 50, method=None))  # type: ignore[arg-type]
    rig.engine.fail_unit(TypeError())
    assert one(rig.run(), AdaptationFailed) == AdaptationFailed(
        adaptation_id="b", code="internal_error",
        message="the worker failed on this job; its log says why",
    )  # fmt: skip


def test_an_error_from_outside_a_unit_is_not_swallowed(make_rig: Callable[..., Rig]) -> None:
    with pytest.raises(KeyError):
        make_rig().engine.fail_unit(KeyError("a bug"))
