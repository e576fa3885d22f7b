"""The engine with several requests at once: company changes nothing and blocks nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore
from imprint.models import DeltaNet
from imprint.models.checkpoint import weights_hash
from imprint.server.messages import (
    Adapt,
    Cancel,
    RequestFailed,
)
from support.engine_rig import REFINE, TEXTS, Rig, done_of, one, tokens_of


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
