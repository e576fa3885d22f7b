"""The same pool, with its workers on the nodes of a Ray cluster: two of them, on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
import zmq.asyncio

from imprint.adapters.store import AdapterStore
from imprint.models.tokenizer import Tokenizer, load_tokenizer
from imprint.server.launching import LaunchError
from imprint.server.messages import (
    AdaptationDone,
    AdaptationRequeued,
    AdaptationStarted,
    SequenceDone,
    TokenDelta,
)
from imprint.server.pool import Pool
from imprint.server.pool_wire import Wire, connect
from imprint.server.worker_config import PoolConfig, WireKeys, WorkerConfig
from support.live_server import LiveServer
from support.pool_work import LONG, ask, everything, read, run, running

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with room for one worker each."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args=size)
    found.add_node(**size)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path, cluster: Any) -> PoolConfig:
    worker = WorkerConfig(
        model=str(tiny_checkpoint), store=str(tmp_path / "adapters"), segment_tokens=64,
        heartbeat_interval_s=0.1,
    )  # fmt: skip
    return PoolConfig(
        worker=worker, restart_backoff_s=0.01, pool="ray", ray_address=cluster.address
    )


STUDY = {**LONG, "steps": 2}


def test_a_study_is_bit_for_bit_what_it_is_here_and_is_asked(
    config: PoolConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    async def studied(config: PoolConfig, names: int) -> None:
        async with running(config) as pool:
            said = await everything(pool.submit(read(tokenizer, method=STUDY)))
            assert isinstance(said[-1], AdaptationDone)
            while sum(worker.up for worker in pool.workers()) < names:
                await asyncio.sleep(0.05)
            for i in range(4):
                said = await everything(pool.submit(ask(tokenizer, f"r{i}", adapter_id="adp_1")))
                assert isinstance(said[-1], SequenceDone)

    async def test() -> None:
        here = msgspec.structs.replace(
            config,
            pool="local",
            worker=msgspec.structs.replace(config.worker, store=str(tmp_path / "here")),
        )
        await studied(here, 1)
        await studied(msgspec.structs.replace(config, num_workers=2), 2)

    run(test)
    mine = AdapterStore(tmp_path / "here").load("adp_1").to_tensors()
    theirs = AdapterStore(tmp_path / "adapters").load("adp_1").to_tensors()
    assert mine.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in mine.items())


def test_a_killed_worker_is_replaced_and_its_work_is_settled(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        async with running(config) as pool:
            stream = pool.submit(read(tokenizer, method=LONG))
            assert isinstance(await anext(stream), AdaptationStarted)
            assert pool.info is not None
            os.kill(pool.info.pid, signal.SIGKILL)
            async for message in stream:
                if isinstance(message, AdaptationRequeued):
                    break
            assert isinstance((await everything(pool.submit(ask(tokenizer))))[-1], SequenceDone)
            assert pool.workers()[0].restarts == {"crashed": 1}
            await pool.cancel("adp_1")

    run(test)


def test_a_hung_worker_is_killed(config: PoolConfig, tokenizer: Tokenizer) -> None:
    hasty = msgspec.structs.replace(config, heartbeat_timeout_s=1.5)

    async def test() -> None:
        async with running(hasty) as pool:
            assert isinstance((await everything(pool.submit(ask(tokenizer))))[-1], SequenceDone)
            assert pool.info is not None
            os.kill(pid := pool.info.pid, signal.SIGSTOP)
            while pool.workers()[0].restarts != {"hung": 1} or psutil.pid_exists(pid):
                await asyncio.sleep(0.05)

    run(test)


def test_closing_lets_answers_finish_and_leaves_no_process(
    config: PoolConfig, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        pool = Pool(config)
        await pool.start()
        answer = pool.submit(ask(tokenizer, max_tokens=30))
        assert isinstance(await anext(answer), TokenDelta)
        assert pool.info is not None
        await pool.close(grace_s=20)
        assert isinstance((await everything(answer))[-1], SequenceDone)
        while psutil.pid_exists(pool.info.pid):
            await asyncio.sleep(0.05)
        assert not ray.is_initialized()

    run(test)


def test_a_server_that_is_killed_leaves_no_worker(
    tiny_checkpoint: Path, tmp_path: Path, cluster: Any
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--pool", "ray", "--ray-address", cluster.address]
    with LiveServer(tmp_path / "data", *flags) as server:
        server.wait_until_ready()
        reply = server.http.post("/v1/answers", json={"document": "It is 12.", "questions": ["?"]})
        assert reply.is_success, reply.text
        assert reply.json()["answers"]
        workers = [p for p in psutil.process_iter() if "WorkerActor" in p.name()]
        assert workers
        server.process.kill()
        server.process.wait()
        assert not psutil.wait_procs(workers, 60)[1]


def test_no_cluster_and_no_ray_are_told(config: PoolConfig, monkeypatch: Any) -> None:
    async def test() -> None:
        nowhere = msgspec.structs.replace(config, ray_address="127.0.0.1:9")
        with pytest.raises(LaunchError, match=r"no Ray cluster at '127\.0\.0\.1:9'"):
            await Pool(nowhere).start()
        client = msgspec.structs.replace(config, ray_address="ray://127.0.0.1:10001")
        with pytest.raises(LaunchError, match="on a machine of the cluster"):
            await Pool(client).start()

        def refuse(**_: Any) -> None:  # as Ray 2.60 does where the token is missing
            raise ConnectionError("Failed to connect to Ray cluster")

        monkeypatch.setattr(ray, "init", refuse)
        with pytest.raises(LaunchError, match=r"Failed to connect .* RAY_AUTH_MODE=token"):
            await Pool(config).start()
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(LaunchError, match="pip install"):
            await Pool(config).start()

    run(test)


def test_what_never_answers_is_given_up() -> None:
    code = (
        "import asyncio, sys\n"
        "from imprint.server.ray_launching import RayLauncher\n"
        "asyncio.run(RayLauncher(sys.argv[1], connect_s=2.0).open())\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", code, address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "nothing has answered for 2 s" in ended.stderr
    assert ended.returncode == 1


@pytest.mark.parametrize("stranger", ["nobody", "another"])
def test_who_has_no_key_of_this_pool_is_not_heard(stranger: str) -> None:
    async def test() -> None:
        wire, other = Wire("127.0.0.1"), Wire("127.0.0.1")
        context = zmq.asyncio.Context()
        assert wire.worker_keys is not None
        assert other.worker_keys is not None
        worker, foreign = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        for peer in (worker, foreign):
            peer.setsockopt(zmq.LINGER, 0)
        own = msgspec.structs.replace(other.worker_keys, server=wire.worker_keys.server)
        keys: WireKeys | None = own if stranger == "another" else None
        connect(foreign, wire.endpoint, keys)
        await foreign.send(b"let me in")
        connect(worker, wire.endpoint, wire.worker_keys)
        await worker.send(b"here I am")
        assert (await wire.socket.recv_multipart())[-1] == b"here I am"
        assert not await wire.socket.poll(500)
        for peer in (worker, foreign):
            peer.close()
        context.term()
        wire.close()
        other.close()

    run(test)


def test_a_port_that_is_taken_is_told() -> None:
    async def test() -> None:
        wire = Wire("127.0.0.1")
        port = int(wire.endpoint.rpartition(":")[-1])
        with pytest.raises(OSError, match="in use"):
            Wire("127.0.0.1", port)
        wire.close()

    run(test)


def test_a_pool_whose_port_is_taken_leaves_the_cluster(config: PoolConfig) -> None:
    async def test() -> None:
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(OSError, match="in use"):
                await Pool(msgspec.structs.replace(config, pool_port=port)).start()
        assert not ray.is_initialized()

    run(test)
