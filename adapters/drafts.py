"""Greedy drafts of answers, and how sure the model is of them: by that two ways to answer compare.

A draft is the first line of an answer, as far as so many tokens go. Knows models and tokens; knows
nothing of studies. Shapes: R = drafts, V = vocabulary, [1, T] = one row of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from imprint.adapters.calls import AloneCall, Calls, Work, ask, stacked_states
from imprint.models import FastWeightModel, LoraDelta, RecurrentState, decode, prefill
from imprint.models.tokenizer import Tokenizer

_PIECE_TOKENS = 8  # of a quantum: answers of others wait for it


class LineEnd:
    """Whether a token ends an answer of one line: eos, or a line break after some text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._breaks_line: dict[int, bool] = {}

    def __call__(self, token: int, so_far: Sequence[int]) -> bool:
        """`so_far`: the answer's tokens before it."""
        if token == self._tokenizer.eos_id:
            return True
        breaks = self._breaks_line.get(token)
        if breaks is None:
            breaks = self._breaks_line[token] = "\n" in self._tokenizer.decode([token])
        return breaks and bool(self._tokenizer.decode(list(so_far)).strip())


Ends = Callable[[int, Sequence[int]], bool]
"""Whether a token ends an answer that has these tokens before it."""


@dataclass(frozen=True, slots=True)
class DraftPrompt:
    """Where a draft begins."""

    tokens: Sequence[int]
    """One or more, read from `state`."""
    state: RecurrentState
    """Of one row."""
    delta: LoraDelta | None
    """One delta, if any."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The tokens of an answer, that which ends it included, and the log-probability of each."""

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    ended: bool = False

    @property
    def confidence(self) -> float:
        """The mean log-probability of its tokens in nats; minus infinity where one has none."""
        mean = sum(self.log_probs) / max(len(self.log_probs), 1)
        return mean if math.isfinite(mean) else -math.inf

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """Without the token that ends it."""
        return self.tokens[:-1] if self.ended else self.tokens

    def followed_by(self, token: int, log_prob: float, ends: Ends) -> Draft:
        """With one token more."""
        ended = ends(token, self.tokens)
        return Draft((*self.tokens, token), (*self.log_probs, log_prob), ended)


def write_drafts(
    model: FastWeightModel, prompts: Sequence[DraftPrompt], *, num_tokens: int, ends: Ends
) -> Calls[list[Draft]]:
    """A draft of at most `num_tokens` for each prompt; prompts are read alone, drafts together.

    Each call decodes a few tokens of all. What they cost counts the drafts that have ended, too.
    """
    read = []
    for prompt in prompts:
        cost = Work("draft", forward_tokens=len(prompt.tokens))
        read.append((yield from ask(AloneCall(cost, partial(_read, model, prompt)))))
    logits_RV = torch.cat([logits for logits, _ in read])
    state = stacked_states([state for _, state in read])
    delta = LoraDelta.padded([prompt.delta for prompt in prompts])
    drafts = [Draft()] * len(prompts)
    for first in range(0, num_tokens, _PIECE_TOKENS):
        num = min(_PIECE_TOKENS, num_tokens - first)
        cost = Work("draft", forward_tokens=num * len(prompts))
        piece = partial(_go_on, model, drafts, logits_RV, state, delta, num, ends)
        drafts, logits_RV, state = yield from ask(AloneCall(cost, piece))
        if all(draft.ended for draft in drafts):
            break
    return drafts


def _read(model: FastWeightModel, prompt: DraftPrompt) -> tuple[Tensor, RecurrentState]:
    tokens_BT = torch.tensor([list(prompt.tokens)], device=model.device)
    return prefill(model, tokens_BT, prompt.state, delta=prompt.delta)


def _go_on(
    model: FastWeightModel,
    drafts: list[Draft],
    logits_RV: Tensor,
    state: RecurrentState,
    delta: LoraDelta | None,
    num_tokens: int,
    ends: Ends,
) -> tuple[list[Draft], Tensor, RecurrentState]:
    """The drafts with so many tokens more, unless they end; leaves its arguments alone."""
    for _ in range(num_tokens):
        log_probs_R, tokens_R = logits_RV.float().log_softmax(-1).max(-1)
        drafts = [
            draft if draft.ended else draft.followed_by(token, log_prob, ends)
            for draft, token, log_prob in zip(
                drafts, tokens_R.tolist(), log_probs_R.tolist(), strict=True
            )
        ]
        if all(draft.ended for draft in drafts):
            break
        logits_RV, state = decode(model, tokens_R, state, delta=delta)
    return drafts, logits_RV, state
