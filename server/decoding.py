"""Batches of sequences through the model: gather slots, lay deltas out, run, sample, scatter.

Knows tensors and slots; knows nothing of queues, deadlines or text. All rows of a call are one
batch, whatever their deltas, unless padding would cost more than it saves. Prompts are read on
copies: a slot is written only after all rows have succeeded, so a batch that raised can be run
again, in parts. Tokens are decoded in place, which can not: after an error these slots are lost.
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
    counter_uniforms,
    decode,
    penalize,
    prefill,
    sample_tokens,
    token_logprobs,
)
from imprint.models.pool_decoder import PoolDecoder
from imprint.server.delta_rows import DeltaRows, split
from imprint.server.messages import TokenLogprobs
from imprint.server.sequence import Sequence
from imprint.server.slot_states import SlotStates
from imprint.server.slots import NULL_SLOT, SlotHandle
from imprint.server.step_times import StepTimes

MAX_PADDING_TOKENS = 64
"""Padding that a batch of prompts may hold: a batch more costs as much as about so many tokens."""


class BrokenStepError(Exception):
    """A step in place broke off, and the slots of its rows hold nothing of use.

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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_logprobs: int | None = None
    """How many of the likeliest tokens to report beside the sampled one; None reports nothing."""


class Decoder:
    """Runs batches on one model; keeps deltas laid out as the last batches needed them."""

    def __init__(
        self,
        model: FastWeightModel,
        slots: SlotStates,
        times: StepTimes | None = None,
        *,
        in_place: bool = True,
    ) -> None:
        """`times` is told what the model and the slots take.

        `in_place`: decode without copying slots out and back, which is faster everywhere.
        """
        self._model = model
        self._slots = slots
        self._times = times or StepTimes()
        self._steps = PoolDecoder(model, slots.pool, padding_row=NULL_SLOT) if in_place else None
        self._widths = model.lora_targets()
        self._model_floats = sum(parameter.numel() for parameter in model.parameters())
        # by phase and number of the batch, so that prompts do not displace what decodes
        self._deltas: dict[tuple[bool, int], DeltaRows] = {}

    def forget(self) -> None:
        """Drop the deltas laid out and what graphs hold: these are copies."""
        self._deltas.clear()
        if self._steps is not None:
            self._steps.forget()

    def run(self, rows: Seq[Row], *, reading: bool) -> list[int | None]:
        """Read each row's tokens into its slot and sample one token after them.

        `reading`: of a prompt, any number of tokens, on copies of the slots. Otherwise one token a
        row, in place. None stands for a row whose logits were not finite. Raises `BrokenStepError`
        when slots were lost.
        """
        deltas = [row.delta for row in rows]
        batches = [
            [rows[i] for i in piece]
            for batch in split(deltas, self._widths, self._model_floats)
            for piece in _by_length(batch, [len(row.tokens) for row in rows])
        ]
        laid_out = [self._lay_out(reading, number, batch) for number, batch in enumerate(batches)]
        if self._steps is not None and not reading:
            sampled = [self._step(self._steps, batch, delta) for batch, delta in laid_out]
        else:
            outcomes = [self._read(batch, delta) for batch, delta in laid_out]
            with self._times.part("slots"):
                for (batch, _), (_, state) in zip(laid_out, outcomes, strict=True):
                    self._slots.write([row.slot for row in batch], state)
            sampled = [tokens for tokens, _ in outcomes]
        tokens = {
            id(row): token
            for (batch, _), batch_tokens in zip(laid_out, sampled, strict=True)
            for row, token in zip(batch, batch_tokens, strict=True)
        }
        return [tokens[id(row)] for row in rows]

    def _lay_out(
        self, reading: bool, number: int, rows: list[Row]
    ) -> tuple[list[Row], LoraDelta | None]:
        """The rows in the order that moves the fewest deltas, and their deltas in that order."""
        if all(row.delta is None for row in rows):
            return rows, None
        with self._times.part("slots"):
            deltas = self._deltas.setdefault((reading, number), DeltaRows(self._widths))
            rows = [rows[i] for i in deltas.order([row.delta for row in rows])]
            return rows, deltas.stack([row.delta for row in rows])

    def _step(
        self, steps: PoolDecoder, rows: list[Row], delta: LoraDelta | None
    ) -> list[int | None]:
        """One token a row, in place."""
        slots = self._slots.rows([row.slot for row in rows])
        try:
            with self._times.part("model"):
                logits_BV = steps.decode([row.tokens[0] for row in rows], slots, delta)
                return _sample(logits_BV, rows)
        except (RuntimeError, MemoryError) as error:
            raise BrokenStepError("a step in place failed") from error

    def _read(
        self, rows: list[Row], delta: LoraDelta | None
    ) -> tuple[list[int | None], RecurrentState]:
        """Any number of tokens a row; the states thereafter are still to be written."""
        with self._times.part("slots"):
            state = self._slots.read([row.slot for row in rows])
        lengths = [len(row.tokens) for row in rows]
        longest, device = max(lengths), self._model.device
        padded = [[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows]
        tokens_BT = torch.tensor(padded, device=device)
        ragged = min(lengths) < longest
        lengths_B = torch.tensor(lengths, device=device) if ragged else None
        with self._times.part("model"):
            if longest == 1:
                logits_BV, state = decode(self._model, tokens_BT[:, 0], state, delta=delta)
            else:
                logits_BV, state = prefill(
                    self._model, tokens_BT, state, delta=delta, lengths_B=lengths_B
                )
            return _sample(logits_BV, rows), state


def _by_length(rows: list[int], lengths: Seq[int]) -> list[list[int]]:
    """Row numbers in batches whose padding is bounded, the shortest first."""
    batches: list[list[int]] = []
    padding = 0
    for row in sorted(rows, key=lambda row: lengths[row]):
        if batches:
            more = (lengths[row] - lengths[batches[-1][-1]]) * len(batches[-1])
            if padding + more <= MAX_PADDING_TOKENS:
                batches[-1].append(row)
                padding += more
                continue
        batches.append([row])
        padding = 0
    return batches


def _sample(logits_BV: Tensor, rows: list[Row]) -> list[int | None]:
    """One token a row. The random number depends on the row's seed and token index alone."""
    # a sum is finite where all its terms are; float32, because float16 would overflow
    finite = logits_BV.sum(-1, dtype=torch.float32).isfinite().tolist()
    if not all(finite):
        logits_BV = logits_BV.nan_to_num()
    device = logits_BV.device
    plain_BV, logits_BV = logits_BV, _penalized(logits_BV, rows)
    uniform_B = counter_uniforms(
        [row.sequence.seed for row in rows], [len(row.sequence.tokens) for row in rows]
    )
    tokens_B = sample_tokens(
        logits_BV,
        torch.tensor([row.temperature for row in rows], device=device),
        torch.tensor([row.top_p for row in rows], device=device),
        uniform_B.to(device),
    )
    tokens = tokens_B.tolist()
    for i, row in enumerate(rows):
        if row.num_logprobs is not None:
            logprob, top = token_logprobs(plain_BV[i], tokens[i], row.num_logprobs)
            row.sequence.sampled = TokenLogprobs(logprob=logprob, top=top)
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def _penalized(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    """The logits themselves where no row has penalties; else a copy."""
    if not any(row.presence_penalty or row.frequency_penalty for row in rows):
        return logits_BV
    return torch.stack(
        [
            penalize(
                logits_V,
                row.sequence.tokens,
                presence=row.presence_penalty,
                frequency=row.frequency_penalty,
            )
            for logits_V, row in zip(logits_BV, rows, strict=True)
        ]
    )
