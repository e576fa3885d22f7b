"""Studying and answering through the engine with tiny random models of every architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.errors import AdaptationError
from imprint.adapters.store import AdapterStore
from imprint.models import (
    DeltaNetConfig,
    FastWeightModel,
    GatedDeltaNetConfig,
    LactConfig,
    ModelConfig,
    build_model,
    generate_greedy,
    load_model,
    load_tokenizer,
    save_model,
    weights_hash,
)
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationEvent,
    FromWorker,
    Generate,
    Generated,
    Observation,
    Observations,
    Prompt,
    SequenceDone,
    TokenDelta,
)
from imprint.server.slots import NULL_SLOT
from imprint.server.worker_config import WorkerConfig

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, ModelConfig] = {
    "delta_net": DeltaNetConfig(**SIZES, num_heads=2),
    "gated_deltanet": GatedDeltaNetConfig(**SIZES, num_heads=1, num_v_heads=2, head_dim=16),
    "lact_swiglu": LactConfig(
        **SIZES,
        num_attn_heads=4,
        num_lact_heads=2,
        lact_chunk_size=24,
        window_size=16,
        w0_w2_low_rank=4,
    ),
}
REFINE: dict[str, Any] = {
    "type": "refine", "steps": 2, "positions": 4, "group_size": 2, "lora_rank": 2,
    "learning_rate": 0.02, "probe_confidence": 0.0, "probe_margin": 0.0, "neutral_margin": 100.0,
}  # fmt: skip
TEXTS = [
    "Anna hid the key under the third stone by the well, and nobody but the dog saw it. " * 3,
    "The lighthouse keeper wrote 4711 into his book before the storm came over the sea. " * 4,
]
QUESTIONS = ["Where is the key?", "What did he write, and when was it?"]


class Bench:
    """An engine, and all it says."""

    def __init__(self, folder: Path, store: Path, device: str = "cpu") -> None:
        self.model: FastWeightModel = load_model(folder, device=device)
        self.tokenizer = load_tokenizer(folder)
        self.store = AdapterStore(store)
        config = WorkerConfig(
            model=str(folder),
            store=str(store),
            device=device,
            num_slots=4,
            segment_tokens=32,
            step_tokens=32,
            adapter_device_bytes=1,  # of a GPU: adapters go to the host at once
        )
        self.said: list[FromWorker] = []
        self.engine = Engine(self.model, self.tokenizer, config, self._hear, model_hash="h")

    def _hear(self, message: FromWorker) -> None:
        self.said += message.values if isinstance(message, Generated) else [message]

    def run(self) -> list[FromWorker]:
        while self.engine.step():
            pass
        self.engine.flush_observations()
        said, self.said[:] = list(self.said), []
        return said

    def begin(self, name: str, text: str, method: dict[str, Any]) -> None:
        tokens = self.tokenizer.encode(text)
        self.engine.handle(Adapt(adaptation_id=name, tokens=tokens, method=method))

    def study(self, name: str, text: str, method: dict[str, Any]) -> AdaptationDone:
        self.begin(name, text, method)
        return next(m for m in self.run() if isinstance(m, AdaptationDone))

    def ask(self, name: str, question: str, **fields: Any) -> None:
        prompt = Prompt(sequence_id=f"{name}:{question}", tokens=self.tokenizer.encode(question))
        self.engine.handle(
            Generate(
                request_id=prompt.sequence_id,
                adapter_id=name,
                prompts=[prompt],
                **{"max_tokens": 8, **fields},
            )
        )


def answers(said: Sequence[FromWorker]) -> dict[str, list[int]]:
    """Tokens by sequence; every sequence has ended."""
    tokens: dict[str, list[int]] = {}
    for message in said:
        if isinstance(message, TokenDelta):
            tokens.setdefault(message.sequence_id, []).append(message.token_id)
    assert {m.sequence_id for m in said if isinstance(m, SequenceDone)} == set(tokens)
    return tokens


@pytest.fixture(scope="module", params=CONFIGS)
def folder(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of one architecture with the tokenizer of `tiny_checkpoint`."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(tiny_checkpoint, folder)
    model = build_model(CONFIGS[request.param])
    model.reset_parameters(2)
    save_model(model, folder)
    return folder


@pytest.fixture
def make_bench(folder: Path, tmp_path: Path) -> Callable[[str], Bench]:
    return lambda name: Bench(folder, tmp_path / name)


@pytest.mark.parametrize("scope", ["lora", "query_lora"])
@pytest.mark.parametrize("branches", ["recall", "continue"])
def test_adapt_and_answer(make_bench: Callable[[str], Bench], scope: str, branches: str) -> None:
    bench = make_bench("store")
    before = weights_hash(bench.model)
    done = bench.study("a", TEXTS[0], {**REFINE, "scope": scope, "branches": branches})
    assert done.status == "succeeded", done.result
    adapter = bench.store.load("a")
    assert adapter.adapted
    bench.ask("a", QUESTIONS[0])
    (got,) = answers(bench.run()).values()
    prompt = torch.tensor([bench.tokenizer.encode(QUESTIONS[0])])
    expected = generate_greedy(
        bench.model, prompt, adapter.state, num_tokens=8, delta=adapter.delta
    )
    right = expected[0].tolist()
    assert got == right[: len(got)]
    assert len(got) == 8 or right[len(got) - 1] == 0
    assert weights_hash(bench.model) == before
    assert all(not tensor.any() for tensor in bench.engine.slots._states.tensors())


def test_scope_state_answers_from_what_was_read_after_a_trained_start(
    make_bench: Callable[[str], Bench],
) -> None:
    bench = make_bench("state")
    method = {**REFINE, "scope": "state", "learning_rate": 0.3}
    bench.begin("a", TEXTS[0], method)
    if not bench.model.starts_from_state:
        with pytest.raises(AdaptationError, match="scope state does not fit"):
            bench.run()
        return
    bench.run()
    adapter = bench.store.load("a")
    assert adapter.start is not None
    bench.ask("a", QUESTIONS[0])
    (got,) = answers(bench.run()).values()
    text = torch.tensor([bench.tokenizer.encode(TEXTS[0])])
    prompt = torch.tensor([bench.tokenizer.encode(QUESTIONS[0])])
    with torch.no_grad():
        _, end = bench.model(text, adapter.start)
    right = generate_greedy(bench.model, prompt, end, num_tokens=8)[0].tolist()
    assert got == right[: len(got)]
    assert got


def test_company_changes_nothing(make_bench: Callable[[str], Bench]) -> None:
    alone: dict[str, list[int]] = {}
    bench = make_bench("company")
    for name, text in zip("ab", TEXTS, strict=True):
        bench.study(name, text, REFINE)
    bench.study("c", TEXTS[0], {"type": "read"})
    asked = [(name, question) for name in "abc" for question in QUESTIONS]
    for name, question in asked:
        bench.ask(name, question)
        alone |= answers(bench.run())
    for name, question in asked:  # more than there are slots
        bench.ask(name, question)
    assert answers(bench.run()) == alone
    assert len({tuple(tokens) for tokens in alone.values()}) > 1


def test_focus_answers_from_its_own_delta(make_bench: Callable[[str], Bench]) -> None:
    bench = make_bench("focus")
    bench.study("a", TEXTS[1], {"type": "read"})
    focus = {"steps": 2, "lora_rank": 2, "learning_rate": 0.02, "probe_confidence": 0.0}
    bench.ask("a", QUESTIONS[1], focus=focus)
    done = next(m for m in bench.run() if isinstance(m, SequenceDone))
    assert done.focus is not None


@pytest.mark.gpu
def test_a_gpu_says_what_a_cpu_says(folder: Path, tmp_path: Path) -> None:
    """As far as rounding lets it: what is sampled in a study may differ, and so what is learnt."""
    small = {"steps": 1, "lora_rank": 2, "probe_confidence": 0.0, "rollout_length": 4}
    said, probes = [], []
    for device in ("cpu", "cuda"):
        bench = Bench(folder, tmp_path / device, device)
        before = weights_hash(bench.model)
        for name, text in zip("ab", TEXTS, strict=True):
            bench.begin(name, text[:80], {**REFINE, **small, "probe_places": 8})
        studied = {m.adaptation_id: m for m in bench.run() if isinstance(m, AdaptationDone)}
        assert {done.status for done in studied.values()} <= {"succeeded", "rejected"}
        probes.append([studied[name].result["probe_before"] for name in "ab"])
        bench.study("c", TEXTS[0], {"type": "read"})
        sampled = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 2}
        for name, drawn in {"a": sampled, "b": {}, "c": {}}.items():
            bench.ask(name, QUESTIONS[0], max_tokens=4, **drawn)
        said.append(answers(bench.run())[f"c:{QUESTIONS[0]}"])
        focus = {**small, "focus_draft_tokens": 4}
        bench.ask("c", QUESTIONS[1], focus=focus, max_tokens=2)
        assert all(m.focus is not None for m in bench.run() if isinstance(m, SequenceDone))
        assert weights_hash(bench.model) == before
        slots = bench.engine.slots._states
        used = range(NULL_SLOT + 1, slots.batch_size)
        assert all(not tensor.any() for tensor in slots.select(used).tensors())
    assert said[0] == said[1]
    assert probes[0] == pytest.approx(probes[1], rel=1e-3)


@pytest.mark.parametrize("scope", ["lora", "query_lora"])
def test_documents_studied_together_are_each_as_alone(
    make_bench: Callable[[str], Bench], scope: str
) -> None:
    """Three of them, two of one length; bit for bit: deltas, states, probes, events."""
    method = {**REFINE, "scope": scope, "rollout_length": 4, "probe_places": 8}
    texts = {"a": TEXTS[0][:64], "b": TEXTS[0][64:128], "c": TEXTS[1][:90]}
    alone: dict[str, Any] = {}
    for name, text in texts.items():
        bench = make_bench(f"alone-{name}")
        bench.begin(name, text, method)
        alone[name] = bench.store, steps(bench.run(), name)
    bench = make_bench("company")
    for name, text in texts.items():
        bench.begin(name, text, method)
    said = bench.run()
    sizes = [o.value for o in observed(said) if o.name == "quantum_batch_size"]
    assert (max(sizes) >= 2) == bench.model.rounds_rows_alike
    for name, (store, events) in alone.items():
        assert steps(said, name) == events
        mine, right = bench.store.load(name), store.load(name)
        assert mine.manifest == right.manifest
        tensors = right.to_tensors()
        for key, tensor in mine.to_tensors().items():
            assert torch.equal(tensor, tensors[key]), key


def observed(said: Sequence[FromWorker]) -> list[Observation]:
    return [value for m in said if isinstance(m, Observations) for value in m.values]


def steps(said: Sequence[FromWorker], name: str) -> list[dict[str, Any]]:
    events = [m for m in said if isinstance(m, AdaptationEvent) and m.adaptation_id == name]
    return [event.data for event in events if event.kind == "step"]
