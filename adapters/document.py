"""A document as a model sees it: checked token ids, their fingerprint, and one plain reading."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.continuing import begins, read_on
from imprint.adapters.errors import AdaptationError
from imprint.adapters.quantum import Quanta, Study, Usage, quanta_alone
from imprint.models.architecture import FastWeightModel


def document_tokens(model: FastWeightModel, tokens: Sequence[int]) -> Tensor:
    """Token ids as a tensor on the model's device. Raises AdaptationError if there are none."""
    if not tokens:
        raise AdaptationError("document_empty", "the document holds no tokens; send some text")
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < model.config.vocab_size:
            raise AdaptationError(
                "invalid_token",
                f"token id {token} is outside the vocabulary of {model.config.vocab_size}",
            )
    return torch.tensor(tokens, dtype=torch.long, device=model.device)


def tokens_sha256(tokens_T: Tensor) -> str:
    """Fingerprint of a document's token ids."""
    return hashlib.sha256(tokens_T.cpu().to(torch.int32).numpy().tobytes()).hexdigest()


class DocumentReader:
    """Reads a document once with the base weights; the adapter holds its end state and no delta."""

    def __init__(
        self,
        model: FastWeightModel,
        tokens: Sequence[int],
        *,
        segment_tokens: int,
        base: Adapter | None = None,
    ) -> None:
        """`base`: an adapter of the document's beginning, of which only the end is read on."""
        self.model = model
        self.tokens_T = document_tokens(model, tokens)
        self.base = base if begins(base, self.tokens_T) else None
        self.segment_tokens = segment_tokens
        self.usage = Usage()
        self.adapter: Adapter | None = None

    def run(self) -> Quanta:
        """`study`, with each call run alone: one quantum a segment."""
        return quanta_alone(self.study())

    def study(self) -> Study[None]:
        """One call a segment."""
        work = read_on(self.model, self.tokens_T, self.base, segment_tokens=self.segment_tokens)
        reading = yield from self.usage.run(work, 0, 0)
        assert reading.entropy_T is not None
        self.adapter = Adapter(
            tokens_T=self.tokens_T,
            entropy_T=reading.entropy_T.float(),
            state=reading.end.state,
            manifest={
                "method": "read",
                "num_tokens": len(self.tokens_T),
                "document_sha256": tokens_sha256(self.tokens_T),
                "outcome": "succeeded",
                "usage": self.usage.to_dict(),
            },
        )
