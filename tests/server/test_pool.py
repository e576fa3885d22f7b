"""The pool with real worker processes on a tiny random model: work, deaths, drains, deletions."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import psutil
import pytest

from imprint.models import Tokenizer, load_tokenizer
from imprint.server.messages import (
    AdaptationDone,
    AdaptationFailed,
    AdaptationRequeued,
    AdaptationStarted,
    Observation,
    RequestFailed,
    SequenceDone,
    TokenDelta,
)
from imprint.server.pool import Pool
from imprint.server.worker_config import PoolConfig, WorkerConfig
from support.pool_work import LONG, TEXT, ask, everything, read, run, running


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
            wanted = {"engine_steps_total", "quantum_duration_seconds"}
            async with asyncio.timeout(30):  # a worker says what it has measured once a second
                while not wanted <= {value.name for value in values}:
                    await asyncio.sleep(0.01)

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


def test_a_dead_worker_fails_its_requests_and_spares_what_had_not_begun(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    worker = msgspec.structs.replace(config.worker, max_running_adaptations=1)
    one_at_a_time = msgspec.structs.replace(config, worker=worker)

    async def test() -> None:
        async with running(one_at_a_time) as pool:
            first = pool.submit(read(tokenizer, "first", method=LONG))
            assert isinstance(await anext(first), AdaptationStarted)
            waiting = pool.submit(read(tokenizer, "waiting"))
            answer = pool.submit(ask(tokenizer, max_tokens=4096))
            assert isinstance(await anext(answer), TokenDelta)
            assert pool.info is not None
            os.kill(pool.info.pid, signal.SIGKILL)
            failed = (await everything(answer))[-1]
            assert isinstance(failed, RequestFailed)
            assert failed.code == "worker_died"
            while not isinstance(await anext(first), AdaptationRequeued):
                pass
            assert (await anext(first)).attempt == 2
            await first.aclose()  # until then the suspect is studied alone
            with pytest.raises(ValueError, match="in flight"):
                pool.submit(read(tokenizer, "first"))
            said = await everything(waiting)
            assert isinstance(said[0], AdaptationStarted)
            assert said[0].attempt == 1
            again = await everything(pool.submit(read(tokenizer, "first")))
            assert isinstance(again[-1], AdaptationDone)

    run(test)


def test_cancel_close_and_evict(config: PoolConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        async with running(config) as pool:
            held = pool.submit(read(tokenizer, "held"))
            await pool.cancel("held")  # before there is a worker
            (done,) = await everything(held)
            assert done == AdaptationDone(adaptation_id="held", status="cancelled")
            await pool.cancel("unknown")

            study = pool.submit(read(tokenizer, "study", method=LONG))
            assert isinstance(await anext(study), AdaptationStarted)
            with pytest.raises(ValueError, match="in flight"):
                pool.submit(read(tokenizer, "study"))
            await pool.cancel("study")
            assert (await everything(study))[-1].status == "cancelled"

            closed = pool.submit(ask(tokenizer, max_tokens=10**6))
            assert isinstance(await anext(closed), TokenDelta)
            await closed.aclose()
            await never_iterated(pool, tokenizer)
            while pool.workers()[0].stats.stats.slots_used:
                await asyncio.sleep(0.02)

            await everything(pool.submit(read(tokenizer, "kept")))
            assert (tmp_path / "adapters" / "kept.safetensors").exists()
            assert pool.info is not None
            os.kill(pool.info.pid, signal.SIGKILL)
            await pool.evict("kept")  # a dead worker holds nothing, its files do
            assert not list((tmp_path / "adapters").rglob("kept*"))

            study = pool.submit(read(tokenizer, "study", method=LONG))
            assert isinstance(await anext(study), AdaptationStarted)
            await pool.evict("study")
            assert (await everything(study))[-1].status == "cancelled"
            assert not list((tmp_path / "adapters").rglob("study*"))

    run(test)


async def never_iterated(pool: Pool, tokenizer: Tokenizer) -> None:
    """Closing a stream that nobody has read from cancels its work as well."""
    stream = pool.submit(ask(tokenizer, "req_2", max_tokens=10**6))
    await stream.aclose()
    assert await everything(stream) == []


def test_a_hung_worker_is_killed(config: PoolConfig, tokenizer: Tokenizer) -> None:
    impatient = msgspec.structs.replace(config, heartbeat_timeout_s=1.0)

    async def test() -> None:
        async with running(impatient) as pool:
            await everything(pool.submit(read(tokenizer)))
            assert pool.info is not None
            os.kill(pool.info.pid, signal.SIGSTOP)
            said = await everything(pool.submit(ask(tokenizer)))
            assert isinstance(said[-1], RequestFailed)
            assert not pool.ready
            assert isinstance((await everything(pool.submit(ask(tokenizer))))[-1], SequenceDone)
            assert pool.workers()[0].restarts == {"hung": 1}

    run(test)


def test_two_workers_share_the_work_and_the_store(
    config: PoolConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    two = msgspec.structs.replace(config, num_workers=2)

    async def test() -> None:
        async with running(two) as pool:
            streams = [pool.submit(read(tokenizer, f"adp_{i}", method=LONG)) for i in range(2)]
            while not pool.ready:
                await asyncio.sleep(0.02)
            for stream in streams:
                assert isinstance(await anext(stream), AdaptationStarted)
            third = pool.submit(read(tokenizer, "adp_3"))
            await everything(third)
            for i in range(4):  # whoever answers loads it from the store
                said = await everything(pool.submit(ask(tokenizer, f"r{i}", adapter_id="adp_3")))
                assert isinstance(said[-1], SequenceDone)
            await pool.evict("adp_3")
            assert not (tmp_path / "adapters" / "adp_3.safetensors").exists()

    run(test)


def test_closing_lets_answers_finish_and_leaves_no_process(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        pool = Pool(config)
        await pool.start()
        study = pool.submit(read(tokenizer, method=LONG))
        assert isinstance(await anext(study), AdaptationStarted)
        answer = pool.submit(ask(tokenizer, max_tokens=30))
        assert isinstance(await anext(answer), TokenDelta)
        assert pool.info is not None
        pid = pool.info.pid
        await pool.close(grace_s=20)
        await pool.close(grace_s=20)
        assert isinstance((await everything(answer))[-1], SequenceDone)
        assert not psutil.pid_exists(pid)
        assert not study.ended  # its job goes on after a restart
        refused = await everything(pool.submit(ask(tokenizer)))
        assert refused[-1].code == "draining"

    run(test)


def test_while_no_worker_stands_work_waits_in_bounds(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    worker = msgspec.structs.replace(config.worker, model="/nowhere")
    broken = msgspec.structs.replace(config, worker=worker, max_waiting_requests=2)

    async def test() -> None:
        async with running(broken) as pool:
            held = [pool.submit(ask(tokenizer, f"r{i}", timeout_s=1.5)) for i in range(2)]
            full = await everything(pool.submit(ask(tokenizer, "full")))
            assert full[-1].code == "queue_full"
            for stream in held:
                assert (await everything(stream))[-1].code == "deadline_exceeded"
            while not pool.workers()[0].restarts:
                await asyncio.sleep(0.05)
            assert set(pool.workers()[0].restarts) == {"unusable_model"}
            assert not pool.ready

    run(test)
