"""What the engine is held to, each as a ratio of things measured alternately in one run.

Knows traffic and metrics; starts no server. Every arm of the throughput targets asks the same
questions, all at once; only what is asked differs.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from imprint.server.client_errors import ClientError
from imprint.server.load.arrivals import document, poisson, question
from imprint.server.load.figures import percentile, ratio
from imprint.server.load.served import Readings, Served, watching
from imprint.server.load.traffic import Traffic

FLUSH_S = 1.5
"""Workers report once a second: so long after the last work its time is in the metrics."""
DECODING_SEQUENCES = 32
WARM_UP_QUESTIONS = 3

ARMS = {"one_document": 0.9, "no_deltas": 0.85}
"""Smallest share of these that answers about many documents may come to."""
RARE_SHARE = 0.85
OWN_SHARE = 0.1
QUANTA = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Adaptations to ask, made before."""

    studied: Sequence[str]
    """Each with a delta of its own."""
    read: Sequence[str]
    """The same documents without deltas."""
    many: Sequence[str]
    """Far more, the studied ones among them; where they don't fit into memory, most are on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    rounds: int
    questions: int
    """In a round, of each arm."""
    max_tokens: int
    waits: int
    """Questions whose wait is timed, idle and beside a study each."""
    wait_rate: float
    background_tokens: int
    seed: int


async def throughput(
    traffic: Traffic, served: Served, documents: Documents, effort: Effort
) -> dict[str, Any]:
    """Answers a second over many documents, as shares of those over one, of those without deltas,
    and over far more documents: the host tier decides how many of these are read from disk."""
    arms = {
        "one_document": [documents.studied[0]] * effort.questions,
        "many_documents": _in_turn(documents.studied, effort.questions, 0),
        "no_deltas": _in_turn(documents.read, effort.questions, 0),
    }
    rates: dict[str, list[float]] = {name: [] for name in (*arms, "rare_documents")}
    tokens: dict[str, float] = {}
    adapted: dict[str, float] = {}
    found_before = await asyncio.to_thread(served.readings)
    for number in range(effort.rounds + 1):
        arms["rare_documents"] = _in_turn(
            documents.many, effort.questions, number * effort.questions
        )
        names = list(arms)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            began = time.perf_counter()
            answered = await asyncio.gather(
                *(
                    traffic.ask(id, question(effort.seed + i), effort.max_tokens)
                    for i, id in enumerate(arms[name])
                )
            )
            elapsed_s = time.perf_counter() - began
            for one in answered:
                if one.error is not None:
                    raise ClientError(f"a question of {name} failed: {one.error}")
            if number > 0:  # the first round warms up
                rates[name].append(len(answered) / elapsed_s)
            tokens[name] = statistics.mean(one.num_tokens for one in answered)
            adapted[name] = statistics.mean(one.adapted for one in answered)
    many = rates["many_documents"]
    await asyncio.sleep(FLUSH_S)
    found = (await asyncio.to_thread(served.readings)).by("adapter_hits_total", "tier")
    for tier in found:
        found[tier] -= found_before.sum("adapter_hits_total", tier=tier)
    return {
        "adapters_found": found,
        "num_documents": {"many": len(documents.studied), "rare": len(documents.many)},
        "answers_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "tokens_per_answer": tokens,
        "share_with_delta": adapted,
        "over_one_document": _at_least(ratio(many, rates["one_document"]), ARMS["one_document"]),
        "over_no_deltas": _at_least(ratio(many, rates["no_deltas"]), ARMS["no_deltas"]),
        "rare_over_no_deltas": _at_least(
            ratio(rates["rare_documents"], rates["no_deltas"]), RARE_SHARE
        ),
    }


async def waiting(
    traffic: Traffic, served: Served, documents: Documents, effort: Effort
) -> dict[str, Any]:
    """Seconds to the first text, idle and while a long document is studied, in turns."""
    firsts: dict[str, list[float]] = {"idle": [], "adapting": []}
    longest_s = 0.0
    half = -(-effort.waits // 2)
    for turn in range(2):
        await _ask_at_rate(traffic, documents.studied, effort, WARM_UP_QUESTIONS, turn)
        firsts["idle"] += await _ask_at_rate(traffic, documents.studied, effort, half, turn)
        async with _studying(traffic, effort, turn), watching(served) as watch:
            firsts["adapting"] += await _ask_at_rate(traffic, documents.studied, effort, half, turn)
        longest_s = max(longest_s, watch.longest_quantum_s)
    p99 = {name: percentile(values, 0.99) for name, values in firsts.items()}
    quanta = (p99["adapting"] - p99["idle"]) / longest_s
    return {
        "questions": 2 * half,
        "first_text_p50_s": {name: percentile(values, 0.5) for name, values in firsts.items()},
        "first_text_p99_s": p99,
        "longest_quantum_s": longest_s,
        "more_in_quanta": {"value": quanta, "target": QUANTA, "met": quanta <= QUANTA},
    }


async def own_time(traffic: Traffic, served: Served, effort: Effort) -> dict[str, Any]:
    """The engine's own Python time as a share of its time, decoding 32 sequences together."""
    model = await traffic.base_model()
    prompts = [question(effort.seed + i) for i in range(DECODING_SEQUENCES)]
    before = await asyncio.to_thread(served.readings)
    num_tokens = await traffic.complete(model, prompts, 8 * effort.max_tokens, effort.seed)
    await asyncio.sleep(FLUSH_S)
    after = await asyncio.to_thread(served.readings)
    spent_s = {
        part: after.sum("engine_time_seconds_total", part=part)
        - before.sum("engine_time_seconds_total", part=part)
        for part in ("model", "slots", "own")
    }
    share = spent_s["own"] / sum(spent_s.values())
    return {
        "tokens": num_tokens,
        "mean_batch_size": _mean(before, after, "engine_batch_size"),
        "seconds": spent_s,
        "own_share": {"value": share, "target": OWN_SHARE, "met": share <= OWN_SHARE},
    }


def _mean(before: Readings, after: Readings, histogram: str) -> float:
    total, count = (
        after.sum(f"{histogram}_{end}") - before.sum(f"{histogram}_{end}")
        for end in ("sum", "count")
    )
    return total / count


def _at_least(found: dict[str, float], target: float) -> dict[str, Any]:
    return {**found, "target": target, "met": found["median"] >= target}


def _in_turn(ids: Sequence[str], num: int, first: int) -> list[str]:
    return [ids[(first + i) % len(ids)] for i in range(num)]


async def _ask_at_rate(
    traffic: Traffic, adaptations: Sequence[str], effort: Effort, num: int, turn: int
) -> list[float]:
    """Seconds to the first text of `num` questions, which arrive by chance."""
    duration_s = 4 * num / effort.wait_rate + 1
    arrivals = poisson(effort.wait_rate, duration_s, "question", effort.seed + turn)[:num]
    began = time.perf_counter()
    tasks = []
    for arrival in arrivals:
        await asyncio.sleep(max(began + arrival.at_s - time.perf_counter(), 0.0))
        asked = adaptations[arrival.number % len(adaptations)]
        text = question(effort.seed + arrival.number)
        tasks.append(asyncio.create_task(traffic.ask(asked, text, effort.max_tokens)))
    answered = await asyncio.gather(*tasks)
    for one in answered:
        if one.error is not None:
            raise ClientError(f"a question failed while waits were timed: {one.error}")
    return [one.first_s for one in answered]


@asynccontextmanager
async def _studying(traffic: Traffic, effort: Effort, turn: int) -> AsyncIterator[None]:
    """Adaptations of a long document, one after the other, from the first one's start on."""
    text = document(effort.background_tokens, effort.seed + turn)
    begun = asyncio.Event()

    async def study() -> None:
        for number in range(1_000_000):
            id = await traffic.submit(text, {"type": "refine"}, seed=number)
            try:
                while (await traffic.adaptation(id))["status"] == "queued":
                    await asyncio.sleep(0.05)
                begun.set()
                await traffic.end_of(id)
            except asyncio.CancelledError:
                await traffic.cancel(id)
                raise

    task = asyncio.create_task(study())
    try:
        waiter = asyncio.create_task(begun.wait())
        await asyncio.wait({waiter, task}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if task.done():
            task.result()
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
