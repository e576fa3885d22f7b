"""Workers on the machines of a Ray cluster: each is an actor that runs what a process would run.

Ray places them, and ends them when this process is gone; what they say and hear goes over the
pool's own socket. Limits: every node needs this version of Imprint, and the model's folder and the
store at the same paths as here. Loads Ray when it is opened, not before.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any

import msgspec

from imprint.server.launching import KEYS_VARIABLE, LaunchError
from imprint.server.worker_config import WorkerStart

log = logging.getLogger(__name__)

REACH_S = 10.0
CONNECT_S = 60.0
CRASHED = 1
"""The exit status of a worker of which Ray knows only that it is gone."""


class WorkerActor:
    """The process of one worker, on whichever node Ray has chosen."""

    def run(self, start: str) -> int:
        """Work until the end; the exit status. `start`: as the process's argument."""
        from imprint.server.worker import main

        return main([start])


class RayWorker:
    """An actor that runs a worker."""

    def __init__(self, ray: Any, actor: Any, start: WorkerStart) -> None:
        self._ray = ray
        self._actor = actor
        self._identity = start.identity
        result = actor.run.remote(msgspec.json.encode(start).decode())
        self._returncode: int | None = None
        self._ended = asyncio.ensure_future(self._watch(asyncio.wrap_future(result.future())))

    async def _watch(self, result: asyncio.Future[int]) -> None:
        try:
            self._returncode = await result
        except Exception as error:  # of Ray, whatever it is: the worker is gone
            reason = " ".join(str(error).split())
            log.warning("worker %s: Ray says: %s", self._identity, reason)
            self._returncode = CRASHED
        with suppress(Exception):  # Ray may have been left meanwhile
            self._ray.kill(self._actor)  # its process has done what it was there for

    @property
    def returncode(self) -> int | None:
        return self._returncode

    async def wait(self, timeout_s: float) -> bool:
        ended, _ = await asyncio.wait([self._ended], timeout=timeout_s)
        return bool(ended)

    def kill(self) -> None:
        if self._returncode is None:
            self._ray.kill(self._actor)


class RayLauncher:
    """Workers are actors of one job of a cluster, which ends with this process."""

    parent_pid: int | None = None

    def __init__(self, address: str, connect_s: float = CONNECT_S) -> None:
        """`address`: of the cluster: auto, local, or HOST:PORT."""
        self._address = address
        self._connect_s = connect_s
        self._ray: Any = None

    def device(self, device: str, index: int, num_workers: int) -> str:
        """Ray gives each worker a GPU, and shows it no other."""
        return device

    async def open(self) -> str | None:
        # a cluster that was there once is looked for without end: that must hold up nobody's exit
        connected: Future[str] = Future()
        Thread(target=self._open, args=(connected,), name="ray-connect", daemon=True).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(connected), self._connect_s)
        except LaunchError:
            raise
        except TimeoutError:
            reason = f"nothing has answered for {self._connect_s:g} s"
        except Exception as error:  # Ray raises many kinds
            reason = " ".join(str(error).split())
        raise LaunchError(f"no Ray cluster at {self._address!r}: {reason}")

    def _open(self, connected: "Future[str]") -> None:
        connected.set_running_or_notify_cancel()  # who stops waiting takes nothing from this side
        try:
            connected.set_result(self._connect())
        except BaseException as error:
            connected.set_exception(error)

    def _connect(self) -> str:
        try:
            import ray
        except ImportError as error:
            raise LaunchError(f"--pool ray needs pip install 'imprint[ray]': {error}") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that starts here
        self._refuse_unreachable()
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            if self._address == "auto":  # none runs here
                raise
            # something listens there, and does not let us in
            raise LaunchError(
                f"no Ray cluster at {self._address!r}: {error}; a cluster begun by `ray start` may "
                "ask for a token: set RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from its head"
            ) from None
        self._ray = ray
        util: Any = ray.util
        return str(util.get_node_ip_address())

    def _refuse_unreachable(self) -> None:
        """Ray itself would go on trying for minutes."""
        if self._address in ("auto", "local"):
            return
        host, _, port = self._address.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise LaunchError(
                f"--ray-address is auto, local or HOST:PORT, not {self._address!r}; run the server "
                "on a machine of the cluster"
            )
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()

    async def launch(self, start: WorkerStart, variables: Mapping[str, str]) -> RayWorker:
        actor = (
            self._ray.remote(WorkerActor)
            .options(
                name=start.identity,
                num_cpus=start.worker.threads,
                num_gpus=1 if start.worker.device.startswith("cuda") else 0,
                max_restarts=0,  # the pool knows when, and settles its work first
                runtime_env={"env_vars": {KEYS_VARIABLE: "", **variables}},
            )
            .remote()
        )
        return RayWorker(self._ray, actor, start)

    async def close(self) -> None:
        if self._ray is not None:
            await asyncio.to_thread(self._ray.shutdown)
            self._ray = None
