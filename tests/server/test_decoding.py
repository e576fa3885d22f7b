"""Batches on slots: in place as on copies, deltas of all shapes together, and nothing written
before all rows have succeeded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models import DeltaNet, DeltaNetConfig, LoraDelta
from imprint.server.decoding import MAX_PADDING_TOKENS, BrokenStepError, Decoder, Row
from imprint.server.sequence import Sequence
from imprint.server.slot_states import SlotStates
from imprint.server.step_times import StepTimes
from imprint.server.tasks import OUT_OF_MEMORY, failure


def rows_of(slots: SlotStates, deltas: list[LoraDelta | None]) -> list[Row]:
    rows = []
    for i, delta in enumerate(deltas):
        slot = slots.allocate(None)
        assert slot is not None
        sequence = Sequence(request_id="r", sequence_id=str(i), prompt=[1], max_tokens=9, seed=i)
        rows.append(Row(sequence, slot, [7 + i, 8 + i], delta, 0.8, 1.0))
    return rows


def delta_of(model: DeltaNet, rank: int, seed: int) -> LoraDelta:
    delta = LoraDelta.init(model.lora_targets(), rank, seed=seed)
    for tensor in delta.b.values():
        tensor.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
    return delta


def advance(rows: list[Row], tokens: list[int | None]) -> list[Row]:
    """The rows of the next step: each reads the token that it sampled."""
    following = []
    for row, token in zip(rows, tokens, strict=True):
        assert token is not None
        row.sequence.tokens.append(token)
        following.append(
            Row(row.sequence, row.slot, [token], row.delta, row.temperature, row.top_p)
        )
    return following


def generate(model: DeltaNet, *, in_place: bool) -> list[list[int]]:
    slots = SlotStates(model, 4)
    decoder = Decoder(model, slots, in_place=in_place)
    deltas = [None, delta_of(model, 2, 1), delta_of(model, 2, 2), delta_of(model, 3, 3)]
    rows = rows_of(slots, deltas)
    for step in range(4):
        rows = advance(rows, decoder.run(rows, reading=step == 0))
    decoder.forget()
    return [row.sequence.tokens for row in rows]


def test_decoding_in_place_samples_the_same_tokens(tiny_model: DeltaNet) -> None:
    assert generate(tiny_model, in_place=True) == generate(tiny_model, in_place=False)


class Tiring(DeltaNet):
    """A model that runs out of memory in its second call."""

    num_calls = 0

    def _count(self) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            raise torch.OutOfMemoryError("no memory left")

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().forward(tokens_BT, *args, **kwargs)

    def step_(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super().step_(*args, **kwargs)


@pytest.fixture
def tiring(tiny_model: DeltaNet) -> Tiring:
    model = Tiring(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    return model.eval().requires_grad_(False)


def test_no_slot_is_written_when_a_later_batch_fails(tiring: Tiring) -> None:
    slots = SlotStates(tiring, 2)
    short, long = rows_of(slots, [None, None])
    long = dataclasses.replace(long, tokens=[9] * (3 + MAX_PADDING_TOKENS))
    with pytest.raises(RuntimeError, match="no memory left"):
        Decoder(tiring, slots).run([long, short], reading=True)
    assert tiring.num_calls == 2
    assert not any(tensor.any() for tensor in slots.pool.tensors())


def test_a_step_in_place_that_fails_is_not_run_again(tiring: Tiring) -> None:
    slots = SlotStates(tiring, 2)
    decoder = Decoder(tiring, slots, in_place=True)
    rows = rows_of(slots, [None, None])
    rows = advance(rows, decoder.run(rows, reading=True))
    with pytest.raises(BrokenStepError) as caught:
        decoder.run(rows, reading=False)
    assert not isinstance(caught.value, RuntimeError)
    assert failure(caught.value)[0] == OUT_OF_MEMORY


class Counting(DeltaNet):
    """A model that remembers the shapes of what it reads."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.shapes.append(tuple(tokens_BT.shape))
        return super().forward(tokens_BT, *args, **kwargs)

    def step_(self, tokens_B: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.shapes.append((len(tokens_B), 1))
        return super().step_(tokens_B, *args, **kwargs)


@pytest.fixture
def counting(tiny_model: DeltaNet) -> Counting:
    model = Counting(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    return model.eval().requires_grad_(False)


def test_deltas_of_every_shape_decode_in_one_batch(counting: Counting) -> None:
    slots = SlotStates(counting, 5)
    decoder = Decoder(counting, slots)
    narrow = delta_of(counting, 2, 4)
    for name in list(narrow.a)[1:]:
        del narrow.a[name], narrow.b[name]
    deltas = [None, delta_of(counting, 2, 1), narrow, delta_of(counting, 4, 3), narrow]
    rows = rows_of(slots, deltas)
    rows = advance(rows, decoder.run(rows, reading=True))
    rows = advance(rows, decoder.run(rows, reading=False))
    decoder.run(rows[:1] + rows[2:], reading=False)  # one has left
    assert counting.shapes == [(5, 2), (5, 1), (4, 1)]


def test_prompts_of_like_lengths_are_read_together(counting: Counting) -> None:
    slots = SlotStates(counting, 6)
    lengths = [30, 2, 33, 3, 400, 1]
    rows = [
        dataclasses.replace(row, tokens=[7] * length)
        for row, length in zip(rows_of(slots, [None] * 6), lengths, strict=True)
    ]
    together = Decoder(counting, slots).run(rows, reading=True)
    assert sorted(counting.shapes) == [(1, 400), (2, 33), (3, 3)]
    alone = SlotStates(counting, 6)
    tokens = [
        Decoder(counting, alone).run([dataclasses.replace(row, slot=other.slot)], reading=True)[0]
        for row, other in zip(rows, rows_of(alone, [None] * 6), strict=True)
    ]
    assert together == tokens


def test_the_time_of_model_and_slots_is_told(tiny_model: DeltaNet) -> None:
    ticks = iter(range(1000))
    times = StepTimes(clock=lambda: float(next(ticks)))
    slots = SlotStates(tiny_model, 2)
    decoder = Decoder(tiny_model, slots, times)
    rows = rows_of(slots, [None, delta_of(tiny_model, 2, 1)])
    with times.whole():
        decoder.run(rows, reading=True)
    spent = {o.labels["part"]: o.value for o in times.take()}
    # each look at the clock is a second: parts take one each, and the rest is the engine's own
    assert spent == {"model": 1, "slots": 3, "own": 5}
    assert times.take() == []


def test_logprobs_and_penalties_are_each_rows_own(tiny_model: DeltaNet) -> None:
    def run(*changes: dict[str, Any]) -> list[tuple[list[int], Any]]:
        slots = SlotStates(tiny_model, len(changes))
        decoder = Decoder(tiny_model, slots)
        rows = [
            dataclasses.replace(row, tokens=[7, 8], temperature=0.0, **change)
            for row, change in zip(rows_of(slots, [None] * len(changes)), changes, strict=True)
        ]
        for _ in range(5):
            tokens = decoder.run(rows, reading=len(rows[0].tokens) > 1)
            for row, token in zip(rows, tokens, strict=True):
                assert token is not None
                row.sequence.tokens.append(token)
            rows = [dataclasses.replace(row, tokens=row.sequence.tokens[-1:]) for row in rows]
        return [(row.sequence.tokens, row.sequence.sampled) for row in rows]

    asked: list[dict[str, Any]] = [
        {},
        {"num_logprobs": 3},
        {"presence_penalty": 100.0, "num_logprobs": 0},
    ]
    plain, told, varied = run(*asked)
    assert plain[1] is None
    assert told[0] == plain[0]
    assert told[1].logprob == told[1].top[0][1], "greedy takes the likeliest"
    assert [told[1].top[0][0], len(told[1].top)] == [told[0][-1], 3]
    assert len(set(varied[0])) == 5, "no token comes twice"
    assert varied[1].top == []
    (alone,) = run(asked[2])
    assert alone[0] == varied[0]
    assert alone[1].logprob == pytest.approx(varied[1].logprob, abs=1e-5)
