"""How much of a text stands in a document word for word: what copies it is told from what only
sounds like it.

Knows tokens; knows no model and no question's meaning.
"""

# T = tokens of the document

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.adapters.relevance import run_codes

RUN_TOKENS = 4
"""Tokens of a run: 3 to 5 were measured to choose alike."""


class Grounding:
    """The runs of four tokens that a document has."""

    def __init__(self, document_T: Tensor, vocab_size: int) -> None:
        """`document_T`: token ids below `vocab_size`."""
        self._base = vocab_size
        self._has = run_codes(document_T.long().cpu(), RUN_TOKENS, vocab_size)

    def count(self, tokens: Sequence[int], question: Sequence[int] = ()) -> int:
        """How many different runs of `tokens` the document has and the question has not."""
        runs = set(self._runs(tokens).tolist()) - set(self._runs(question).tolist())
        return int(torch.isin(torch.tensor(sorted(runs), dtype=torch.long), self._has).sum())

    def _runs(self, tokens: Sequence[int]) -> Tensor:
        return run_codes(torch.tensor(list(tokens), dtype=torch.long), RUN_TOKENS, self._base)
