"""What in a document has to do with a question, by the tokens they share.

A score per place for the positions that focus studies, and the passages that it reads again. No
model is run here.
"""

# T = tokens of the document, M = terms of the question

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_TERM_TOKENS = 3
_TERMS_AT_ONCE = 32
_ROUNDING = 1e-9  # less is what sums and their parts differ by


class Relevance:
    """How much the tokens just before each place of a document have to do with a question.

    The terms are the question's runs of 1 to 3 tokens. Each adds its inverse document frequency
    (BM25's, over stretches of `window` tokens), fading to a half over `window` tokens after a match
    and then to nothing, so places right after rare question terms score best: the cue then holds
    the term and the rollout what the document says next.
    """

    def __init__(self, document: Tensor | list[int], question: list[int], *, window: int) -> None:
        self._document_T = torch.as_tensor(document, dtype=torch.long).cpu()
        question_M = torch.tensor(question, dtype=torch.long)
        self._window = window
        length = self._document_T.numel()
        self.score_T = torch.zeros(length, dtype=torch.float64)
        """[T], float64, 0 to 1; all zeros where no term occurs."""
        self._terms: dict[int, list[int]] = {}
        if not length or not question:
            return
        self._base = 1 + int(torch.maximum(question_M.max(), self._document_T.max()))
        for width in range(1, min(_MAX_TERM_TOKENS, len(question), length) + 1):
            self._terms[width] = sorted(set(run_codes(question_M, width, self._base).tolist()))
            self.score_T += self._scores(width, self._terms[width])
        self._peak = float(self.score_T.max())
        if self._peak > 0:
            self.score_T /= self._peak

    def passages(self, num: int, size: int, *, repeat: float = 1.0) -> list[int]:
        """Starts of up to `num` passages of `size` tokens, as `relevant_passages` places them.

        A term that a passage has weighs only `repeat` (0 to 1) of its inverse document frequency in
        the choice of the next: they shall hold all that the question asks for, not the same thing.
        """
        if repeat == 1.0:
            return relevant_passages(self.score_T, num, size)
        left = {width: set(terms) for width, terms in self._terms.items()}
        lost = partial(self._lost, left, 1.0 - repeat)
        return relevant_passages(self.score_T, num, size, lost=lost)

    def _lost(self, left: dict[int, set[int]], share: float, start: int, stop: int) -> Tensor:
        """The share of their scores that terms lose which are `left` and end in a passage."""
        lost_T = torch.zeros_like(self.score_T)
        for width, terms in left.items():
            first = max(start - width + 1, 0)
            codes = run_codes(self._document_T[first:stop], width, self._base)
            had = sorted(terms.intersection(codes.tolist()))
            terms.difference_update(had)
            lost_T += self._scores(width, had)
        return lost_T * (share / self._peak)

    def _scores(self, width: int, terms: list[int]) -> Tensor:
        """The sum of what some terms of `width` tokens add: [T]."""
        score_T = torch.zeros_like(self.score_T)
        codes_T = run_codes(self._document_T, width, self._base)
        codes_T = F.pad(codes_T, (width - 1, 0), value=-1)
        for i in range(0, len(terms), _TERMS_AT_ONCE):
            terms_M = torch.tensor(terms[i : i + _TERMS_AT_ONCE])
            score_T += _term_scores(codes_T, terms_M, self._window)
        return score_T


def relevant_passages(
    relevance_T: Tensor,
    num: int,
    size: int,
    *,
    lost: Callable[[int, int], Tensor] | None = None,
) -> list[int]:
    """Starts of up to `num` passages of `size` tokens around the most relevant places, ascending.

    Each has such a place in its middle, so that an answer may stand on either side of it, as far as
    the document's ends and the other passages leave room. Fewer where no other place is relevant.
    `lost(start, stop)`: what each place's relevance loses when that passage is chosen.
    """
    left_T = relevance_T.clone()
    open_T = torch.ones_like(left_T, dtype=torch.bool)
    last = max(len(left_T) - size, 0)
    starts: list[int] = []
    while len(starts) < num and bool((left_T[open_T] > 0).any()):
        start = int(left_T.where(open_T, -torch.inf).argmax()) - size // 2
        before = max((other for other in starts if other <= start), default=start - size)
        start = max(start, before + size)
        after = min((other for other in starts if other > start), default=start + size)
        start = min(max(min(start, after - size), 0), last)
        starts.append(start)
        open_T[start : start + size] = False
        if lost is not None and len(starts) < num:
            left_T -= lost(start, start + size)
            left_T[left_T < _ROUNDING] = 0.0
    return sorted(starts)


def run_codes(tokens_T: Tensor, width: int, base: int) -> Tensor:
    """One number for every run of `width` tokens, held at its last token: [T - width + 1]."""
    if tokens_T.numel() < width:
        return tokens_T[:0]
    powers = base ** torch.arange(width - 1, -1, -1)
    return (tokens_T.unfold(0, width, 1) * powers).sum(-1)


def _term_scores(codes_T: Tensor, terms_M: Tensor, window: int) -> Tensor:
    """Sum over terms of idf * freshness of the term's last match: [T]."""
    index_T = torch.arange(codes_T.numel())
    match_MT = codes_T == terms_M.unsqueeze(1)
    last_MT = torch.where(match_MT, index_T, -window).cummax(1).values
    age_MT = (index_T - last_MT) / window
    fresh_MT = torch.where(age_MT < 1, 1 - age_MT / 2, 0.0).double()
    num_stretches = max(codes_T.numel() / window, 1.0)
    frequency_M = ((fresh_MT > 0).sum(1) / window).clamp_max(num_stretches)
    idf_M = torch.log1p((num_stretches - frequency_M + 0.5) / (frequency_M + 0.5))
    return idf_M.double() @ fresh_MT
