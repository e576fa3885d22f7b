"""Passages of a document read again before a question, as focus reads them at serving time."""

from __future__ import annotations

import random
from collections.abc import Sequence

NUM_PASSAGES = 4
"""How many passages are read again before a question, where they are."""


def reread(
    rng: random.Random,
    document: Sequence[int],
    wanted: Sequence[int],
    size: int,
    line_break: Sequence[int],
) -> list[int]:
    """Passages of `size` tokens in the document's order, a line each: what begins at `wanted` is
    somewhere in them, mostly; others beside them."""
    last = max(len(document) - size, 0)
    kept = [start for start in wanted if rng.random() < 0.95]
    kept = [min(max(start - rng.randint(0, size // 2), 0), last) for start in kept]
    kept += [rng.randint(0, last) for _ in range(NUM_PASSAGES - len(kept))]
    chosen: list[int] = []
    for start in kept[:NUM_PASSAGES]:
        if all(abs(start - other) >= size for other in chosen):
            chosen.append(start)
    passages = [[*line_break, *document[start : start + size]] for start in sorted(chosen)]
    return [token for passage in passages for token in passage]
