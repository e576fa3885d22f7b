"""Batches on slots: in place as on copies; nothing is written before all rows have succeeded."""

from __future__ import annotations

import pytest
import torch

from imprint.models import DeltaNet, LoraDelta
from imprint.server import decoding
from imprint.server.decoding import BrokenStepError, Decoder, Row
from imprint.server.sequence import Sequence
from imprint.server.slot_states import SlotStates
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
    for _ in range(4):
        rows = advance(rows, decoder.run(rows))
    decoder.forget()
    return [row.sequence.tokens for row in rows]


def test_decoding_in_place_samples_the_same_tokens(tiny_model: DeltaNet) -> None:
    assert generate(tiny_model, in_place=True) == generate(tiny_model, in_place=False)


def fail_at_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling runs out of memory in the second batch."""
    sample, calls = decoding._sample, []

    def sample_or_fail(logits_BV: torch.Tensor, rows: list[Row]) -> list[int | None]:
        calls.append(rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return sample(logits_BV, rows)

    monkeypatch.setattr(decoding, "_sample", sample_or_fail)


def test_no_slot_is_written_when_a_later_batch_fails(
    tiny_model: DeltaNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = SlotStates(tiny_model, 2)
    rows = rows_of(slots, [delta_of(tiny_model, 2, 1), delta_of(tiny_model, 3, 2)])
    fail_at_second(monkeypatch)
    with pytest.raises(RuntimeError, match="no memory left"):
        Decoder(tiny_model, slots).run(rows)
    assert not any(tensor.any() for tensor in slots.pool.tensors())


def test_a_step_in_place_that_fails_is_not_run_again(
    tiny_model: DeltaNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = SlotStates(tiny_model, 2)
    decoder = Decoder(tiny_model, slots, in_place=True)
    rows = rows_of(slots, [None, None])
    rows = advance(rows, decoder.run(rows))
    fail_at_second(monkeypatch)
    rows = advance(rows, decoder.run(rows))
    with pytest.raises(BrokenStepError) as caught:
        decoder.run(rows)
    assert not isinstance(caught.value, RuntimeError)
    assert failure(caught.value)[0] == OUT_OF_MEMORY
