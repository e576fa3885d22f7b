"""`imprint bench adapt`: documents handed in at a time, against one after another.

A server of its own studies the same documents both ways, by turns. Says what it took, and whether
the adapters are the same. Limit: no questions meanwhile.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from imprint.adapters.adapter import Adapter
from imprint.adapters.batches import same_bits
from imprint.adapters.store import AdapterStore
from imprint.models.tokenizer import load_tokenizer
from imprint.server.answer_benchmark import make_document
from imprint.server.client_errors import ServerUnreachableError
from imprint.server.commands.common import CommandError
from imprint.server.config import BUNDLED_MODEL
from imprint.server.load.served import Readings, Served, own_server, watching
from imprint.server.load.traffic import Traffic, traffic_to

Say = Callable[[str], None]

TARGET = 0.7
FLUSH_S = 1.5
"""Workers report once a second."""
CONNECTIONS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationBenchmark:
    """What to measure. Every other setting is the server's, from its variables or its default."""

    model: Path = BUNDLED_MODEL
    num_documents: int = 8
    num_tokens: int = 4096
    """Of each document, about."""
    preset: str = "default"
    rounds: int = 5
    """Pairs of the two ways; the first of a pair takes turns."""
    workers: int = 1
    threads: int = 1
    """Of each worker."""
    seed: int = 0


def run_adaptation_benchmark(
    config: AdaptationBenchmark, progress: Say | None = None
) -> dict[str, Any]:
    """Measure, and return JSON values: the ratio first, then seconds, quanta and bytes.

    Raises CommandError where a document cannot be adapted, ServerUnreachableError.
    """
    say = progress or (lambda _: None)
    flags = {"workers": config.workers, "threads": config.threads}
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as folder:
        say("starting a server")
        path = Path(folder)
        with own_server(path, model=config.model, revision="", flags=flags) as served:
            store = AdapterStore(path / "data" / "adapters")
            try:
                return asyncio.run(_run(config, served, store, say))
            except httpx.TransportError as error:
                raise ServerUnreachableError(f"the server broke off: {error}") from None


class _Way:
    """One of the two ways of adapting the documents: what it took, over all rounds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.phase_s: dict[str, float] = {}
        self.quanta = 0.0
        self.jobs = 0.0

    def count(self, before: Readings, after: Readings) -> None:
        """Take in what the server did between two scrapes."""
        phases = after.by("quantum_duration_seconds_sum", "phase")
        for phase, seconds in phases.items():
            earlier_s = before.sum("quantum_duration_seconds_sum", phase=phase)
            self.phase_s[phase] = self.phase_s.get(phase, 0.0) + seconds - earlier_s
        self.jobs += after.sum("quantum_batch_size_sum") - before.sum("quantum_batch_size_sum")
        self.quanta += after.sum("quantum_batch_size_count") - before.sum(
            "quantum_batch_size_count"
        )

    def numbers(self) -> dict[str, Any]:
        rounds = len(self.seconds)
        return {
            "seconds": statistics.median(self.seconds),
            "seconds_of_rounds": self.seconds,
            "quanta": self.quanta / rounds,
            "documents_per_quantum": self.jobs / self.quanta,
            "phase_s": {name: total / rounds for name, total in self.phase_s.items()},
        }


@dataclass(frozen=True, slots=True)
class _Done:
    """Documents that were adapted."""

    ids: list[str]
    seconds: float
    """By the server's clock: waiting for an answer between two documents is not counted."""


async def _run(
    config: AdaptationBenchmark, served: Served, store: AdapterStore, say: Say
) -> dict[str, Any]:
    documents, ways, same = _documents(config), {True: _Way(), False: _Way()}, True
    async with (
        traffic_to(served.url, connections=CONNECTIONS) as traffic,
        watching(served) as watch,
    ):
        say("warming up: each kind of batch is computed both ways once")
        await _forget(traffic, (await _together(traffic, documents, config)).ids)
        for number in range(config.rounds):
            say(f"round {number + 1} of {config.rounds}")
            left: dict[bool, list[Adapter]] = {}
            for together in (number % 2 == 1, number % 2 == 0):
                before = await _settled(served)
                adapt = _together if together else _one_after_another
                done = await adapt(traffic, documents, config)
                ways[together].seconds.append(done.seconds)
                ways[together].count(before, await _settled(served))
                left[together] = [store.load(id) for id in done.ids]
                await _forget(traffic, done.ids)
            same = same and all(map(_same_adapter, left[False], left[True]))
    pairs = zip(ways[True].seconds, ways[False].seconds, strict=True)
    ratios = [together / alone for together, alone in pairs]
    median = statistics.median(ratios)
    return {
        "together_over_alone": median,
        "target": f"at most {TARGET:g}: {'met' if median <= TARGET else 'MISSED'}",
        "ratio_of_rounds": {"min": min(ratios), "max": max(ratios), "all": ratios},
        "same_bits": same,
        "documents": config.num_documents,
        "document_tokens": config.num_tokens,
        "preset": config.preset,
        "workers": config.workers,
        "threads": config.threads,
        "rounds": config.rounds,
        "longest_quantum_s": watch.longest_quantum_s,
        "together": ways[True].numbers(),
        "alone": ways[False].numbers(),
        "peak_memory_bytes": watch.peak_memory_bytes,
    }


async def _settled(served: Served) -> Readings:
    """The metrics, once the workers have reported all that they did."""
    await asyncio.sleep(FLUSH_S)
    return await asyncio.to_thread(served.readings)


async def _together(
    traffic: Traffic, documents: Sequence[str], config: AdaptationBenchmark
) -> _Done:
    jobs = await asyncio.gather(*(_adapt(traffic, text, config) for text in documents))
    first, last = min(job["created_at"] for job in jobs), max(job["finished_at"] for job in jobs)
    return _Done([job["id"] for job in jobs], last - first)


async def _one_after_another(
    traffic: Traffic, documents: Sequence[str], config: AdaptationBenchmark
) -> _Done:
    jobs = [await _adapt(traffic, text, config) for text in documents]
    return _Done(
        [job["id"] for job in jobs], sum(job["finished_at"] - job["created_at"] for job in jobs)
    )


async def _adapt(traffic: Traffic, text: str, config: AdaptationBenchmark) -> dict[str, Any]:
    method = {"type": "refine", "preset": config.preset}
    job = await traffic.end_of(await traffic.submit(text, method, config.seed))
    if job["status"] not in ("succeeded", "rejected"):
        error = (job.get("error") or {}).get("message", job["status"])
        raise CommandError(f"a document could not be adapted: {error}")
    return job


async def _forget(traffic: Traffic, ids: Sequence[str]) -> None:
    for id in ids:
        await traffic.delete(id)


def _documents(config: AdaptationBenchmark) -> list[str]:
    tokenizer = load_tokenizer(config.model)
    return [
        make_document(tokenizer, config.num_tokens, config.seed + number)
        for number in range(config.num_documents)
    ]


def _same_adapter(mine: Adapter, theirs: Adapter) -> bool:
    tensors = [list(adapter.to_tensors().items()) for adapter in (mine, theirs)]
    return same_bits(*tensors) and mine.manifest == theirs.manifest
