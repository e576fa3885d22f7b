"""The pool with real worker processes on a tiny random model: work, deaths, drains, deletions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from imprint.models import Tokenizer, load_tokenizer
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    AdaptationRequeued,
    AdaptationStarted,
    Generate,
    Observation,
    Prompt,
    SequenceDone,
    TokenDelta,
)
from imprint.server.pool import Pool
from imprint.server.worker_config import PoolConfig, WorkerConfig

LONG = {"type": "refine", "steps": 1000, "patience": 1000, "positions": 4, "lora_rank": 2}
TEXT = "The keeper of the lighthouse wrote down the number 4711 before the storm came. " * 8


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> PoolConfig:
    worker = WorkerConfig(
        model=str(tiny_checkpoint), store=str(tmp_path / "adapters"), segment_tokens=64,
        heartbeat_interval_s=0.1,
    )  # fmt: skip
    return PoolConfig(worker=worker, restart_backoff_s=0.01)


@asynccontextmanager
async def running(config: PoolConfig) -> AsyncIterator[Pool]:
    pool = Pool(config)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close(grace_s=5)


async def everything(stream: Any) -> list[Any]:
    return [message async for message in stream]


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def read(tokenizer: Tokenizer, id: str = "adp_1", **changes: Any) -> Adapt:
    fields: dict[str, Any] = {"adaptation_id": id, "tokens": tokenizer.encode(TEXT)}
    return Adapt(**{**fields, "method": {"type": "read"}, **changes})


def ask(tokenizer: Tokenizer, id: str = "req_1", **changes: Any) -> Generate:
    prompt = Prompt(sequence_id="s", tokens=tokenizer.encode("Which number?"))
    fields: dict[str, Any] = {"request_id": id, "prompts": [prompt], "max_tokens": 4}
    return Generate(**{**fields, **changes})


def test_work_given_before_the_worker_is_ready_is_done(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        async with running(config) as pool:
            values: list[Observation] = []
            pool.on_observation = values.append
            assert not pool.ready
            said = await everything(pool.submit(read(tokenizer)))
            assert isinstance(said[0], AdaptationStarted)
            assert isinstance(said[-1], AdaptationDone)
            assert said[-1].status == "succeeded"
            assert pool.ready
            assert pool.info is not None
            assert pool.info.state_bytes > 0
            said = await everything(pool.submit(ask(tokenizer, adapter_id="adp_1")))
            assert sum(isinstance(message, TokenDelta) for message in said) == 4
            assert isinstance(said[-1], SequenceDone)
            assert said[-1].usage["document_tokens"] == len(TEXT)
            while not values:
                await asyncio.sleep(0.01)
            assert {"engine_steps_total", "quantum_duration_seconds"} <= {v.name for v in values}

    run(test)


def test_a_killed_worker_is_replaced_and_its_adaptation_is_tried_once_more(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        async with running(config) as pool:
            stream = pool.submit(read(tokenizer, method=LONG))
            deaths = 0
            said = []
            async for message in stream:
                said.append(message)
                if isinstance(message, AdaptationStarted):
                    assert pool.info is not None
                    assert message.attempt == deaths + 1
                    os.kill(pool.info.pid, signal.SIGKILL)
                    deaths += 1
            assert deaths == 2
            requeued = [m for m in said if isinstance(m, AdaptationRequeued)]
            assert [(m.attempt, m.reason) for m in requeued] == [(2, "killed")]
            assert isinstance(said[-1], AdaptationFailed)
            assert said[-1].code == "worker_died"
            # and the pool goes on
            assert isinstance((await everything(pool.submit(ask(tokenizer))))[-1], SequenceDone)
            assert pool.workers()[0].restarts == {"killed": 2}

    run(test)
