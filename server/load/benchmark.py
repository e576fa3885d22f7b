"""`imprint bench serve`: documents prepared, the open loop, the targets; all over HTTP.

Runs a server of its own or loads the one at an address, from which it deletes what it has made.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from imprint.server.client_errors import ApiError, ClientError, ServerUnreachableError
from imprint.server.load import targets
from imprint.server.load.arrivals import document
from imprint.server.load.open_loop import OpenLoop, run_open_loop
from imprint.server.load.served import Served, own_server
from imprint.server.load.targets import Documents, Effort
from imprint.server.load.traffic import Traffic, traffic_to

Say = Callable[[str], None]

CONNECTIONS = 256
AT_ONCE = 32
"""Documents that are handed in at once while they are prepared."""
QUICK_STUDY: dict[str, Any] = {
    "type": "refine",
    "steps": 1,
    "positions": 2,
    "rollout_length": 5,
    "lambda_rl": 0.0,
    "probe_places": 8,
    "probe_margin": 0.0,
    "probe_confidence": 0.0,
    "neutral_margin": 100.0,
}
"""One cheap step that the gate lets pass: what is served afterwards costs what any delta costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBenchmark:
    """What is measured. `url`, or a server of its own on `model`."""

    url: str | None
    model: Path
    revision: str
    threads: int
    host_bytes: int | None
    """Capacity of the server's host tier; None leaves it as it is."""
    num_studied: int
    num_many: int
    load: OpenLoop
    effort: Effort | None
    """None: the open loop only."""


def run_load_benchmark(config: LoadBenchmark, say: Say) -> dict[str, Any]:
    """All figures, times in seconds. Raises ClientError, CommandError."""
    with _served(config, say) as served:
        try:
            return asyncio.run(_run(config, served, say))
        except httpx.TransportError as error:
            raise ServerUnreachableError(f"the connection to {served.url} broke: {error}") from None


@contextmanager
def _served(config: LoadBenchmark, say: Say) -> Iterator[Served]:
    if config.url is not None:
        yield Served(config.url.rstrip("/"))
        return
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as folder:
        say("starting a server")
        flags: dict[str, object] = {"threads": config.threads}
        if config.host_bytes is not None:
            flags["adapter-host-bytes"] = config.host_bytes
        with own_server(
            Path(folder), model=config.model, revision=config.revision, flags=flags
        ) as served:
            yield served


async def _run(config: LoadBenchmark, served: Served, say: Say) -> dict[str, Any]:
    async with traffic_to(served.url, connections=CONNECTIONS) as traffic:
        try:
            return await _measure(config, traffic, served, say)
        finally:
            if config.url is not None:
                say("deleting what was made")
                for id in traffic.made:
                    await traffic.delete(id)


async def _measure(
    config: LoadBenchmark, traffic: Traffic, served: Served, say: Say
) -> dict[str, Any]:
    documents = await _prepare(config, traffic, say)
    load = config.load
    say(
        f"open loop: {load.question_rate:g} questions and {load.document_rate:g} documents a "
        f"second for {load.duration_s:g} s"
    )
    before = await asyncio.to_thread(served.memory_bytes)
    results: dict[str, Any] = {
        "open_loop": {
            "memory_before_bytes": before,
            **await run_open_loop(traffic, served, documents.studied, load),
        }
    }
    if config.effort is None:
        return results
    say("answers a second: many documents, one, without deltas, far more documents")
    results["throughput"] = await targets.throughput(traffic, served, documents, config.effort)
    say("waiting for the first text, idle and beside a study")
    results["waiting"] = await targets.waiting(traffic, served, documents, config.effort)
    say(f"the engine's own time, decoding {targets.DECODING_SEQUENCES} sequences")
    results["own_time"] = await targets.own_time(traffic, served, config.effort)
    return results


async def _prepare(config: LoadBenchmark, traffic: Traffic, say: Say) -> Documents:
    """Study and read the documents. The gate refuses some deltas, so more are studied."""
    num = max(config.num_many if config.effort else 0, config.num_studied * 3 // 2)
    say(f"studying {num} documents")
    texts = [document(config.load.document_tokens, -1 - i) for i in range(num)]
    jobs = await _study_all(traffic, texts, QUICK_STUDY)
    with_delta = [i for i, job in enumerate(jobs) if job["status"] == "succeeded"]
    if len(with_delta) < config.num_studied:
        raise ClientError(
            f"only {len(with_delta)} of {num} studied documents got a delta, "
            f"{config.num_studied} are needed"
        )
    first = with_delta[: config.num_studied]
    read: Sequence[dict[str, Any]] = ()
    if config.effort is not None:
        read = await _study_all(traffic, [texts[i] for i in first], {"type": "read"})
    return Documents(
        studied=[jobs[i]["id"] for i in first],
        read=[job["id"] for job in read],
        many=[job["id"] for job in jobs],
    )


async def _study_all(
    traffic: Traffic, texts: Sequence[str], method: dict[str, Any]
) -> list[dict[str, Any]]:
    """The ended adaptations of all texts, in order."""
    room = asyncio.Semaphore(AT_ONCE)

    async def study(text: str) -> dict[str, Any]:
        async with room:
            job = await traffic.end_of(await traffic.submit(text, method))
        if job["status"] not in ("succeeded", "rejected"):
            error = job.get("error") or {}
            raise ApiError(
                f"a document could not be prepared: {error.get('message', job['status'])}",
                status=200,
                code=str(error.get("code", job["status"])),
                param=None,
                retry_after_s=None,
            )
        return job

    return list(await asyncio.gather(*(study(text) for text in texts)))
