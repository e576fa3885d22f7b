"""What arrives when: documents and questions as Poisson processes, from a seed. Sends nothing.

An open loop: arrivals do not wait for earlier ones to be served, as those of many strangers do not.
"""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["document", "question"]

NAMES = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
THINGS = ("lantern", "ledger", "violin", "compass", "kettle", "anchor", "mirror", "basket")
TOKENS_PER_SENTENCE = 22
"""Of the bundled tokenizer; others differ, so lengths in tokens are rough."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a client that knows of no other."""

    at_s: float
    kind: Kind
    number: int
    """Counts the arrivals of this kind."""


def poisson(rate: float, duration_s: float, kind: Kind, seed: int) -> list[Arrival]:
    """Arrivals at `rate` a second, with exponential gaps; none for rate 0."""
    rng = random.Random(f"{kind} {seed}")
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(rate) if rate > 0 else duration_s
    while at_s < duration_s:
        arrivals.append(Arrival(at_s, kind, len(arrivals)))
        at_s += rng.expovariate(rate)
    return arrivals


def plan(
    *, question_rate: float, document_rate: float, duration_s: float, seed: int
) -> list[Arrival]:
    """Both kinds, in order of time."""
    arrivals = poisson(question_rate, duration_s, "question", seed)
    arrivals += poisson(document_rate, duration_s, "document", seed)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def document(num_tokens: int, seed: int) -> str:
    """Sentences about numbered things, of about so many tokens."""
    rng = random.Random(f"document {seed}")
    sentences = [
        f"The number of {rng.choice(NAMES)}'s {rng.choice(THINGS)} in room {room} is "
        f"{rng.randrange(10_000, 100_000)}. "
        for room in range(max(num_tokens // TOKENS_PER_SENTENCE, 1))
    ]
    return "".join(sentences)


def question(seed: int) -> str:
    """About a thing of such a document."""
    rng = random.Random(f"question {seed}")
    return f"What is the number of {rng.choice(NAMES)}'s {rng.choice(THINGS)}?"
