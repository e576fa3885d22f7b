"""One worker seen from the pool: its process, its name over restarts, when it was last heard.

Knows how to start, judge and kill one process; knows nothing of the work it does.
"""

import logging
import os
import signal
import time
from dataclasses import dataclass, field

import msgspec

from imprint.adapters import faults
from imprint.models.kernels import VARIABLE as KERNELS_VARIABLE
from imprint.server.launching import Launched, Launcher
from imprint.server.messages import Heartbeat, Ready
from imprint.server.pool_wire import Wire
from imprint.server.worker_config import PoolConfig, WorkerStart

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
ENDINGS = {0: "exited", 74: "store_gone", 78: "unusable_model", -signal.SIGKILL: "killed"}
"""Reasons by exit status; every other status is a crash."""
STABLE_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, as health and metrics show it."""

    name: str
    up: bool
    """Ready, and its last heartbeat is young."""
    heartbeat_age_s: float
    restarts: dict[str, int] = field(default_factory=dict)
    """Times it was replaced, by reason: killed, crashed, hung, startup_timeout, exited,
    store_gone, unusable_model."""
    stats: Heartbeat | None = None


class WorkerProcess:
    """One place for a worker; its process comes and goes."""

    def __init__(self, name: str, config: PoolConfig, device: str | None = None) -> None:
        """`device` stands in for that of the config, which all workers share."""
        self.name = name
        device = config.worker.device if device is None else device
        self._worker = msgspec.structs.replace(config.worker, device=device)
        self.ready: Ready | None = None
        self.beat: Heartbeat | None = None
        self.identity = b""
        self._config = config
        self._process: Launched | None = None
        self._incarnation = 0
        self._started_at = self._heard_at = time.monotonic()
        self._verdict: str | None = None
        self._restarts: dict[str, int] = {}
        self._backoff_s = config.restart_backoff_s

    @property
    def up(self) -> bool:
        """Whether it can be given work."""
        age_s = time.monotonic() - self._heard_at
        return self.ready is not None and age_s < self._config.heartbeat_timeout_s

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    def status(self) -> WorkerStatus:
        """A snapshot."""
        age_s = time.monotonic() - self._heard_at
        return WorkerStatus(self.name, self.up, age_s, dict(self._restarts), self.beat)

    def heard(self, message: object) -> None:
        """Any message is a sign of life."""
        self._heard_at = time.monotonic()
        if isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, Heartbeat):
            self.beat = message

    async def spawn(self, launcher: Launcher, wire: Wire) -> None:
        """Start a process under a new identity; it will connect to the wire."""
        self._incarnation += 1
        identity = f"{self.name}.{self._incarnation}"
        start = WorkerStart(
            worker=self._worker,
            endpoint=wire.endpoint,
            keys=wire.worker_keys,
            identity=identity,
            parent_pid=launcher.parent_pid,
            log_level=self._config.log_level,
            log_format=self._config.log_format,
        )
        self.identity = identity.encode()
        self._started_at = self._heard_at = time.monotonic()
        self._verdict = None
        own_faults = faults.for_worker(os.environ, identity)
        variables = {KERNELS_VARIABLE: self._config.kernels, faults.VARIABLE: own_faults}
        self._process = await launcher.launch(start, variables)

    async def wait(self, timeout_s: float) -> bool:
        """Whether the process has ended, after at most `timeout_s`."""
        assert self._process is not None
        return await self._process.wait(timeout_s)

    def judge(self) -> None:
        """Kill a process that has been silent for too long."""
        silent_s = time.monotonic() - self._heard_at
        if self.ready is None and silent_s > self._config.startup_timeout_s:
            self._condemn("startup_timeout")
        elif self.ready is not None and silent_s > self._config.heartbeat_timeout_s:
            self._condemn("hung")

    def _condemn(self, verdict: str) -> None:
        log.error("worker %s: %s; killing it", self.name, verdict)
        self._verdict = verdict
        self.kill()

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._process is not None:
            self._process.kill()

    def bury(self) -> str:
        """After its end: the reason, counted; the next `backoff` is longer if it lived shortly."""
        assert self._process is not None
        code = self._process.returncode
        assert code is not None
        reason = self._verdict or ENDINGS.get(code, "crashed")
        log.error("worker %s is gone: %s (exit status %s)", self.name, reason, code)
        self._restarts[reason] = self._restarts.get(reason, 0) + 1
        if time.monotonic() - self._started_at > STABLE_AFTER_S:
            self._backoff_s = self._config.restart_backoff_s
        self.ready = None
        self.beat = None
        return reason

    def next_backoff_s(self) -> float:
        """How long to wait before the next start: each time twice as long."""
        wait_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, MAX_BACKOFF_S)
        return wait_s
