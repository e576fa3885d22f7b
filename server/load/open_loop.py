"""The open loop: arrivals sent when their time comes, whatever the server makes of earlier ones.

Everything is timed from the planned arrival, so that a server that stalls is charged for all who
came meanwhile. What arrives during the warm-up is sent and not counted.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from imprint.server.load.arrivals import Arrival, document, plan, question
from imprint.server.load.figures import spread
from imprint.server.load.served import Served, watching
from imprint.server.load.traffic import Answered, Studied, Traffic

REFUSED = ("queue_full", "rate_limit_exceeded", "share_exceeded")
"""Codes of questions that were refused, and not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """What arrives, for how long."""

    question_rate: float
    """Questions a second."""
    document_rate: float
    """Documents a second; each is studied."""
    duration_s: float
    warm_up_s: float
    document_tokens: int
    max_tokens: int
    """Of an answer."""
    method: dict[str, Any]
    seed: int


@dataclass(slots=True)
class Outcomes:
    """What became of everything that was sent and counts."""

    answered: list[Answered] = field(default_factory=list)
    studied: list[Studied] = field(default_factory=list)
    last_answer: float = 0.0
    last_study: float = 0.0
    """When the last of them ended."""
    latest_s: float = 0.0
    """How late the generator itself sent, at worst."""


async def run_open_loop(
    traffic: Traffic, served: Served, adaptations: Sequence[str], load: OpenLoop
) -> dict[str, Any]:
    """Questions go to `adaptations` in turn. Returns counts, and times in seconds."""
    arrivals = plan(
        question_rate=load.question_rate,
        document_rate=load.document_rate,
        duration_s=load.warm_up_s + load.duration_s,
        seed=load.seed,
    )
    outcomes = Outcomes()
    async with watching(served) as watch:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for arrival in arrivals:
                await asyncio.sleep(max(began + arrival.at_s - time.perf_counter(), 0.0))
                late_s = time.perf_counter() - began - arrival.at_s
                group.create_task(_send(traffic, adaptations, load, arrival, late_s, outcomes))
    return {
        "seconds": load.duration_s,
        **figures_of(outcomes, began + load.warm_up_s),
        "longest_quantum_s": watch.longest_quantum_s,
        "peak_memory_bytes": watch.peak_memory_bytes,
    }


async def _send(
    traffic: Traffic,
    adaptations: Sequence[str],
    load: OpenLoop,
    arrival: Arrival,
    late_s: float,
    outcomes: Outcomes,
) -> None:
    counted = arrival.at_s >= load.warm_up_s
    seed = load.seed * 1_000_003 + arrival.number
    if counted:
        outcomes.latest_s = max(outcomes.latest_s, late_s)
    if arrival.kind == "document":
        studied = await traffic.study(document(load.document_tokens, seed), load.method)
        if counted:
            outcomes.studied.append(studied)
            outcomes.last_study = time.perf_counter()
        return
    asked = adaptations[arrival.number % len(adaptations)]
    answered = await traffic.ask(asked, question(seed), load.max_tokens, late_s=late_s)
    if counted:
        outcomes.answered.append(answered)
        outcomes.last_answer = time.perf_counter()


def figures_of(outcomes: Outcomes, counted_from: float) -> dict[str, Any]:
    """Counts, rates and spreads of times, in seconds; `counted_from` on the clock of outcomes."""
    good = [answered for answered in outcomes.answered if answered.error is None]
    studied = [one for one in outcomes.studied if one.error is None]
    errors = [one.error for one in outcomes.answered] + [one.error for one in outcomes.studied]
    refusals = Counter(error for error in errors if error is not None)
    # each rate until the last of its kind has ended: a long study does not dilute the answers
    answering_s = max(outcomes.last_answer - counted_from, 1e-9)
    studying_s = max(outcomes.last_study - counted_from, 1e-9)
    return {
        "sent_late_s": outcomes.latest_s,
        "questions": len(outcomes.answered),
        "documents": len(outcomes.studied),
        "refused_or_failed": dict(refusals),
        "refusal_s": spread([one.total_s for one in outcomes.answered if one.error in REFUSED]),
        "answers_per_s": len(good) / answering_s,
        "tokens_per_s": sum(answered.num_tokens for answered in good) / answering_s,
        "documents_per_s": len(studied) / studying_s,
        "document_tokens_per_s": sum(one.num_tokens for one in studied) / studying_s,
        "time_to_first_text_s": spread([answered.first_s for answered in good]),
        "between_texts_s": spread([gap for answered in good for gap in answered.gaps_s]),
        "answer_s": spread([answered.total_s for answered in good]),
        "adaptation_s": spread([one.total_s for one in studied]),
    }
