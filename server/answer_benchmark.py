"""How long a question waits for its first token: on an idle server, and while others are studied.

Runs the whole stack (HTTP, journal, pool, worker process) on this machine and asks over HTTP.
Limit: client and API process share an interpreter, which adds about a millisecond.
"""

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from imprint.models.tokenizer import Tokenizer, load_tokenizer
from imprint.server.client import AnswerRequest, ClientError, ImprintClient
from imprint.server.commands.local_server import local_server
from imprint.server.config import BUNDLED_MODEL, Settings
from imprint.server.messages import Observation
from imprint.server.pool import Pool

Say = Callable[[str], None]

NAMES = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
THINGS = ("lantern", "ledger", "violin", "compass", "kettle", "anchor", "mirror", "basket")
WARM_UP = 3
MAX_PAUSE_S = 0.25


class QuantumLog:
    """Durations of quanta by phase, as the worker reports them."""

    def __init__(self) -> None:
        self._values: list[tuple[str, float]] = []

    def attach(self, pool: Pool) -> None:
        """Listen to a pool beside whoever listens already."""
        inner = pool.on_observation

        def listen(observation: Observation) -> None:
            if observation.name == "quantum_duration_seconds":
                self._values.append((observation.labels["phase"], observation.value))
            if inner is not None:
                inner(observation)

        pool.on_observation = listen

    def clear(self) -> None:
        """Forget what came so far."""
        self._values.clear()

    def summary(self) -> dict[str, Any]:
        """Number, median and longest, and the longest of each phase."""
        values = list(self._values)
        longest: dict[str, float] = {}
        for phase, duration_s in values:
            longest[phase] = max(duration_s, longest.get(phase, 0.0))
        durations = [duration_s for _, duration_s in values]
        return {
            "num_quanta": len(durations),
            "quantum_p50_s": statistics.median(durations) if durations else None,
            "longest_quantum_s": max(durations, default=None),
            "longest_quantum_s_by_phase": longest,
        }


def run_answer_benchmark(
    *,
    model: Path = BUNDLED_MODEL,
    num_questions: int = 50,
    document_tokens: int = 1024,
    background_tokens: int = 16384,
    background_documents: int = 1,
    segment_tokens: int = Settings.model_fields["segment_tokens"].default,
    threads: int = 1,
    seed: int = 0,
    progress: Say | None = None,
) -> dict[str, Any]:
    """Times to first token, p50 and p99 over `num_questions` each, and the longest quantum.

    The question is put to a document studied before; the background is one adaptation after the
    other (default preset) of each of `background_documents` of `background_tokens`, all at a time.
    Everything in seconds. Settings of the server are taken from their variables.
    """
    say = progress or (lambda what: None)
    tokenizer = load_tokenizer(model)
    quanta = QuantumLog()
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as folder:
        settings = Settings(
            model=model, data_dir=Path(folder), threads=threads, segment_tokens=segment_tokens
        )
        pool = Pool(settings.pool_config())
        with local_server(settings, pool) as url, ImprintClient(url) as client:
            quanta.attach(pool)
            document = make_document(tokenizer, document_tokens, seed)
            say(f"studying a document of {document_tokens} tokens")
            job = client.wait(client.adapt(document, method={"type": "refine"}).id)
            ask = _Asker(client, job.id, random.Random(seed))
            ask.times(WARM_UP)
            say(f"asking {num_questions} questions of an idle server")
            idle = ask.times(num_questions)
            say(f"asking {num_questions} questions while {background_tokens} tokens are studied")
            background = [
                make_document(tokenizer, background_tokens, seed + 1 + number)
                for number in range(background_documents)
            ]
            with ExitStack() as studies:
                for text in background:
                    studies.enter_context(_studying(url, text))
                ask.times(WARM_UP)
                quanta.clear()
                adapting = ask.times(num_questions)
                during = quanta.summary()
    return {
        "document_tokens": document_tokens,
        "background_tokens": background_tokens,
        "background_documents": background_documents,
        "max_quantum_s": settings.max_quantum_ms / 1000,
        "segment_tokens": segment_tokens,
        "threads": threads,
        "num_questions": num_questions,
        "idle": _summary(idle),
        "adapting": _summary(adapting),
        **during,
    }


class _Asker:
    """Asks one question after the other, with pauses, so that it meets quanta at any moment."""

    def __init__(self, client: ImprintClient, adaptation_id: str, rng: random.Random) -> None:
        self._client = client
        self._adaptation_id = adaptation_id
        self._rng = rng

    def times(self, num_questions: int) -> list[float]:
        """Seconds to the first text of each answer."""
        return [self._time() for _ in range(num_questions)]

    def _time(self) -> float:
        time.sleep(self._rng.uniform(0, MAX_PAUSE_S))
        question = f"What is the number of {self._rng.choice(NAMES)}'s {self._rng.choice(THINGS)}?"
        request = AnswerRequest(
            questions=(question,), adaptation=self._adaptation_id, focus=False, max_tokens=16
        )
        began, first = time.perf_counter(), None
        for event in self._client.stream_answer(request):
            if first is None and event.get("object") in ("answer.delta", "answer.done"):
                first = time.perf_counter() - began
        if first is None:
            raise ClientError("an answer came without any text or end")
        return first


@contextmanager
def _studying(url: str, document: str) -> Iterator[None]:
    """Adaptations of `document` back to back, from the first one's start until the context ends."""
    stop, begun = threading.Event(), threading.Event()

    def study() -> None:
        with ImprintClient(url) as client:
            number = 0
            while not stop.is_set():
                job = client.adapt(document, method={"type": "refine"}, seed=number)
                number += 1
                while not stop.is_set():
                    job = client.adaptation(job.id)
                    if job.is_terminal:
                        break
                    if job.status == "running":
                        begun.set()
                    stop.wait(0.1)
            client.cancel(job.id)

    thread = threading.Thread(target=study, name="bench-study")
    thread.start()
    try:
        if not begun.wait(60):
            raise ClientError("the adaptation in the background did not begin")
        yield
    finally:
        stop.set()
        thread.join()


def make_document(tokenizer: Tokenizer, num_tokens: int, seed: int) -> str:
    """Sentences about numbered things; the length in tokens is right to about a sentence."""
    rng = random.Random(seed)
    sentences: list[str] = []
    total = 0
    while total < num_tokens:
        name, thing, number = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(10_000, 100_000)
        sentences.append(f"The number of {name}'s {thing} in room {len(sentences)} is {number}. ")
        total += len(tokenizer.encode(sentences[-1]))
    return "".join(sentences)


def _summary(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {
        "ttft_p50_s": statistics.median(ordered),
        "ttft_p99_s": ordered[min(round(0.99 * (len(ordered) - 1)), len(ordered) - 1)],
        "ttft_max_s": ordered[-1],
    }
