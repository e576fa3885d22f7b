"""One batch of sequences through the model: gather slots, stack deltas, run, sample, scatter.

Knows tensors and slots; knows nothing of queues, deadlines or text. A slot is written only after
all rows have succeeded, so a batch that raised can be run again, in parts. On a GPU tokens are
decoded in place instead, which can not: there, an error ends all sequences of the batch.
Shapes: B = rows, T = tokens, V = vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.models import (
    FastWeightModel,
    LoraDelta,
    RecurrentState,
    counter_uniform,
    decode,
    prefill,
    sample_tokens,
)
from imprint.models.pool_decoder import PoolDecoder
from imprint.server.sequence import Sequence
from imprint.server.slot_states import SlotStates
from imprint.server.slots import NULL_SLOT, SlotHandle


class BrokenStepError(Exception):
    """A step in place broke off, and the slots of its batch hold nothing of use.

    Not a RuntimeError, because such a batch cannot be run again. Its cause says what happened.
    """


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part in a batch: the tokens to read and how to sample after them."""

    sequence: Sequence
    slot: SlotHandle
    tokens: Seq[int]
    delta: LoraDelta | None
    """One delta, or None for the base weights."""
    temperature: float
    top_p: float


class Decoder:
    """Runs batches on one model; remembers the last stack of deltas, which rarely changes."""

    def __init__(
        self, model: FastWeightModel, slots: SlotStates, *, in_place: bool | None = None
    ) -> None:
        """`in_place`: decode without copying slots out and back; None: where there is a GPU."""
        self._model = model
        self._slots = slots
        if in_place is None:
            in_place = model.device.type == "cuda"
        self._steps = PoolDecoder(model, slots.pool, padding_row=NULL_SLOT) if in_place else None
        self._stacked: tuple[list[LoraDelta | None], LoraDelta] | None = None

    def forget(self) -> None:
        """Drop the remembered stack and what graphs hold: these are copies of deltas."""
        self._stacked = None
        if self._steps is not None:
            self._steps.forget()

    def run(self, rows: Seq[Row]) -> list[int | None]:
        """Read each row's tokens into its slot and sample one token after them.

        None stands for a row whose logits were not finite. Rows are split into batches only where
        their deltas differ in rank or targets.
        """
        batches = _by_shape(rows)
        if self._steps is not None and all(len(row.tokens) == 1 for row in rows):
            sampled = [self._step(self._steps, batch) for batch in batches]
        else:
            outcomes = [self._read(batch) for batch in batches]
            for batch, (_, state) in zip(batches, outcomes, strict=True):
                self._slots.write([row.slot for row in batch], state)
            sampled = [tokens for tokens, _ in outcomes]
        tokens = {
            id(row): token
            for batch, batch_tokens in zip(batches, sampled, strict=True)
            for row, token in zip(batch, batch_tokens, strict=True)
        }
        return [tokens[id(row)] for row in rows]

    def _step(self, steps: PoolDecoder, rows: list[Row]) -> list[int | None]:
        """One token a row, in place."""
        slots = self._slots.rows([row.slot for row in rows])
        delta = self._stack([row.delta for row in rows])
        try:
            logits_BV = steps.decode([row.tokens[0] for row in rows], slots, delta)
            return _sample(logits_BV, rows)
        except RuntimeError as error:
            raise BrokenStepError("a step in place failed") from error

    def _read(self, rows: list[Row]) -> tuple[list[int | None], RecurrentState]:
        """Any number of tokens a row; the states thereafter are still to be written."""
        state = self._slots.read([row.slot for row in rows])
        delta = self._stack([row.delta for row in rows])
        lengths = [len(row.tokens) for row in rows]
        device = self._model.device
        if max(lengths) == 1:
            tokens_B = torch.tensor([row.tokens[0] for row in rows], device=device)
            logits_BV, state = decode(self._model, tokens_B, state, delta=delta)
        else:
            padded = [[*row.tokens, *[0] * (max(lengths) - len(row.tokens))] for row in rows]
            ragged = min(lengths) < max(lengths)
            lengths_B = torch.tensor(lengths, device=device) if ragged else None
            logits_BV, state = prefill(
                self._model,
                torch.tensor(padded, device=device),
                state,
                delta=delta,
                lengths_B=lengths_B,
            )
        return _sample(logits_BV, rows), state

    def _stack(self, deltas: list[LoraDelta | None]) -> LoraDelta | None:
        present = [delta for delta in deltas if delta is not None]
        if not present:
            return None
        if all(delta is present[0] for delta in deltas):
            return present[0]
        if self._stacked is not None and _same(self._stacked[0], deltas):
            return self._stacked[1]
        nothing = present[0].scaled(0.0)
        stacked = LoraDelta.stack([nothing if delta is None else delta for delta in deltas])
        self._stacked = (deltas, stacked)
        return stacked


def _by_shape(rows: Seq[Row]) -> list[list[Row]]:
    """Rows whose deltas can be stacked; rows without a delta go with the first of them."""
    groups: dict[tuple[int, tuple[str, ...]], list[Row]] = {}
    bare: list[Row] = []
    for row in rows:
        if row.delta is None:
            bare.append(row)
        else:
            groups.setdefault((row.delta.rank, tuple(row.delta.a)), []).append(row)
    batches = list(groups.values()) or [[]]
    batches[0] = bare + batches[0]
    return [batch for batch in batches if batch]


def _same(old: list[LoraDelta | None], new: list[LoraDelta | None]) -> bool:
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def _sample(logits_BV: Tensor, rows: list[Row]) -> list[int | None]:
    """One token a row. The random number depends on the row's seed and token index alone."""
    finite = logits_BV.isfinite().all(-1).tolist()
    uniform_B = torch.cat([_uniform(row) for row in rows])
    device = logits_BV.device
    tokens_B = sample_tokens(
        logits_BV.nan_to_num(),
        torch.tensor([row.temperature for row in rows], device=device),
        torch.tensor([row.top_p for row in rows], device=device),
        uniform_B.to(device),
    )
    return [token if ok else None for token, ok in zip(tokens_B.tolist(), finite, strict=True)]


def _uniform(row: Row) -> Tensor:
    if row.temperature <= 0:
        return torch.full((1,), 0.5, dtype=torch.float64)  # greedy: not looked at
    return counter_uniform(row.sequence.seed, torch.tensor([len(row.sequence.tokens)]))
