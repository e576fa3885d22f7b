"""What studying several documents at a time costs, against studying one after another.

Runs the worker's own engine in this process, both ways alternately: scheduler, batches, gate,
checkpoints and store are those of a server. Limit: no sockets, no HTTP, and no questions meanwhile.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.batches import same_bits
from imprint.adapters.store import AdapterStore
from imprint.models.tokenizer import load_tokenizer
from imprint.server.answer_benchmark import make_document
from imprint.server.commands.common import CommandError
from imprint.server.config import BUNDLED_MODEL, Settings
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    Evict,
    FromWorker,
    Observations,
)
from imprint.server.worker import load_engine
from imprint.server.worker_memory import resident_bytes

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationBenchmark:
    """What to measure. Every other setting is the server's, from its variables or its default."""

    model: Path = BUNDLED_MODEL
    num_documents: int = 8
    num_tokens: int = 4096
    """Of each document."""
    preset: str = "default"
    rounds: int = 5
    """Pairs of the two ways; the first of a pair takes turns."""
    threads: int = 1
    seed: int = 0


def run_adaptation_benchmark(
    config: AdaptationBenchmark, progress: Say | None = None
) -> dict[str, Any]:
    """Measure, and return JSON values: the ratio first, then seconds, quanta and bytes.

    Raises CommandError where a document cannot be adapted.
    """
    say = progress or (lambda _: None)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="imprint-bench-") as folder:
            bench = _Bench(config, Path(folder))
            say("warming up: each kind of batch is computed both ways once")
            bench.warm_up()
            for number in range(config.rounds):
                say(f"round {number + 1} of {config.rounds}")
                bench.round(number)
            return bench.numbers()
    finally:
        torch.set_num_threads(before)


class _Way:
    """One of the two ways of adapting the documents: what it took, over all rounds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.phase_s: defaultdict[str, float] = defaultdict(float)
        self.longest_quantum_s = 0.0
        self.batch_sizes: list[float] = []

    def count(self, said: Iterable[FromWorker]) -> None:
        """Take in what the engine has observed."""
        for message in said:
            for seen in message.values if isinstance(message, Observations) else ():
                if seen.name == "quantum_duration_seconds":
                    self.phase_s[seen.labels["phase"]] += seen.value
                    self.longest_quantum_s = max(self.longest_quantum_s, seen.value)
                elif seen.name == "quantum_batch_size":
                    self.batch_sizes.append(seen.value)

    def numbers(self) -> dict[str, Any]:
        rounds = len(self.seconds)
        return {
            "seconds": statistics.median(self.seconds),
            "seconds_of_rounds": self.seconds,
            "quanta": len(self.batch_sizes) / rounds,
            "documents_per_quantum": statistics.fmean(self.batch_sizes),
            "longest_quantum_s": self.longest_quantum_s,
            "phase_s": {name: total / rounds for name, total in self.phase_s.items()},
        }


class _Bench:
    """An engine, documents, and what has been measured so far."""

    def __init__(self, config: AdaptationBenchmark, folder: Path) -> None:
        self._config = config
        settings = Settings(model=config.model, data_dir=folder, threads=config.threads)
        self._worker = settings.pool_config().worker
        self._said: list[FromWorker] = []
        self._engine: Engine = load_engine(self._worker, self._said.append)[0]
        self._store = AdapterStore(self._worker.store)
        self._documents = _documents(config)
        self._num_ids = 0
        self._memory = {"before": resident_bytes()}
        self._same = True
        self._alone, self._together = _Way(), _Way()

    def warm_up(self) -> None:
        """Adapt all once, uncounted."""
        ids = self.together()
        self._engine.flush_observations()
        self._forget(ids)

    def round(self, number: int) -> None:
        """Both ways once, and what they left compared."""
        left: dict[bool, list[Adapter]] = {}
        for together in (number % 2 == 1, number % 2 == 0):
            way = self._together if together else self._alone
            began = time.perf_counter()
            ids = self.together() if together else self.one_after_another()
            way.seconds.append(time.perf_counter() - began)
            self._engine.flush_observations()
            way.count(self._said)
            left[together] = [self._store.load(id) for id in ids]
            self._forget(ids)
        self._same = self._same and all(map(_same_adapter, left[False], left[True]))

    def together(self) -> list[str]:
        """Adapt all documents at a time; returns the ids of their adapters."""
        return self._adapt(self._documents)

    def one_after_another(self) -> list[str]:
        """The same, each when the one before is done."""
        return [id for document in self._documents for id in self._adapt([document])]

    def _adapt(self, documents: Sequence[list[int]]) -> list[str]:
        ids = []
        for document in documents:
            self._num_ids += 1
            ids.append(f"adp_{self._num_ids}")
            method = {"type": "refine", "preset": self._config.preset}
            seed = self._config.seed
            adapt = Adapt(adaptation_id=ids[-1], tokens=document, method=method, seed=seed)
            self._engine.handle(adapt)
        first, num_open = len(self._said), len(ids)
        while num_open:
            self._engine.step()
            num_open -= sum(map(_is_end, self._said[first:]))
            first = len(self._said)
        return ids

    def _forget(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._engine.handle(Evict(adapter_id=id))
        self._said.clear()

    def numbers(self) -> dict[str, Any]:
        """All that was measured."""
        pairs = zip(self._together.seconds, self._alone.seconds, strict=True)
        ratios = [together / alone for together, alone in pairs]
        self._memory |= {"after": resident_bytes()}
        config, worker = self._config, self._worker
        return {
            "together_over_alone": statistics.median(ratios),
            "target": "at most 0.7",
            "ratio_of_rounds": {"min": min(ratios), "max": max(ratios), "all": ratios},
            "same_bits": self._same,
            "documents": config.num_documents,
            "document_tokens": config.num_tokens,
            "preset": config.preset,
            "threads": config.threads,
            "rounds": config.rounds,
            "segment_tokens": worker.segment_tokens,
            "max_batched_adaptations": worker.max_batched_adaptations,
            "max_quantum_s": worker.quantum_bound_s,
            "together": self._together.numbers(),
            "alone": self._alone.numbers(),
            "memory_bytes": self._memory,
        }


def _documents(config: AdaptationBenchmark) -> list[list[int]]:
    """Different texts of exactly as many tokens each."""
    tokenizer = load_tokenizer(config.model)
    texts = (
        make_document(tokenizer, 2 * config.num_tokens, config.seed + number)
        for number in range(config.num_documents)
    )
    return [tokenizer.encode(text)[: config.num_tokens] for text in texts]


def _is_end(message: FromWorker) -> bool:
    if isinstance(message, AdaptationFailed):
        raise CommandError(f"a document could not be adapted: {message.message}")
    return isinstance(message, AdaptationDone)


def _same_adapter(mine: Adapter, theirs: Adapter) -> bool:
    tensors = [list(adapter.to_tensors().items()) for adapter in (mine, theirs)]
    return same_bits(*tensors) and mine.manifest == theirs.manifest
