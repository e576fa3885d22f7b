"""A pool for one test, and work for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from imprint.models import Tokenizer
from imprint.server.messages import Adapt, Generate, Prompt
from imprint.server.pool import Pool
from imprint.server.worker_config import PoolConfig

LONG = {"type": "refine", "steps": 1000, "patience": 1000, "positions": 4, "lora_rank": 2}
TEXT = "The keeper of the lighthouse wrote down the number 4711 before the storm came. " * 8


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
    asyncio.run(asyncio.wait_for(test(), 100))  # a busy machine starts workers slowly


def read(tokenizer: Tokenizer, id: str = "adp_1", **changes: Any) -> Adapt:
    fields: dict[str, Any] = {"adaptation_id": id, "tokens": tokenizer.encode(TEXT)}
    return Adapt(**{**fields, "method": {"type": "read"}, **changes})


def ask(tokenizer: Tokenizer, id: str = "req_1", **changes: Any) -> Generate:
    prompt = Prompt(sequence_id="s", tokens=tokenizer.encode("Which number?"))
    fields: dict[str, Any] = {"request_id": id, "prompts": [prompt], "max_tokens": 4}
    return Generate(**{**fields, **changes})
