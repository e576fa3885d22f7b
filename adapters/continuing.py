"""Reading a document on from where an adapter of its beginning ended. Knows no jobs, no files.

What is read this way equals a reading of the whole: bit for bit on a CPU where the beginning ends
on a segment's border, else up to rounding, because segments then lie elsewhere.
"""

# T = tokens of the document

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.calls import Calls
from imprint.adapters.reading import Reading, read_segments
from imprint.models.architecture import FastWeightModel


def begins(base: Adapter | None, tokens_T: Tensor) -> bool:
    """Whether an adapter's document is the beginning of this one and its end state is the base
    model's: one of scope `lora` was read with its delta."""
    if base is None or not 0 < len(base.tokens_T) < len(tokens_T):
        return False
    beginning_T = tokens_T[: len(base.tokens_T)]
    return base.read_by_base and torch.equal(base.tokens_T.to(tokens_T.device), beginning_T)


def read_on(
    model: FastWeightModel,
    tokens_T: Tensor,
    base: Adapter | None,
    *,
    segment_tokens: int,
    entropy: bool = True,
    keep_states: bool = False,
    writes: bool = False,
) -> Calls[Reading]:
    """Read a document, or only what follows `base`, an adapter for which `begins` holds.

    With `keep_states` or `writes` all of it is read, for an adapter has the state of its end alone.
    """
    if base is None or keep_states or writes:
        return (
            yield from read_segments(
                model,
                tokens_T,
                segment_tokens=segment_tokens,
                entropy=entropy,
                keep_states=keep_states,
                writes=writes,
            )
        )
    reading = yield from read_segments(
        model,
        tokens_T[len(base.tokens_T) :],
        segment_tokens=segment_tokens,
        entropy=entropy,
        keep_states=False,
        state=base.state.to(tokens_T.device),
    )
    entropy_T = reading.entropy_T
    if entropy_T is not None:
        entropy_T = torch.cat([base.entropy_T.to(entropy_T), entropy_T])
    return dataclasses.replace(reading, tokens_T=tokens_T, entropy_T=entropy_T)
