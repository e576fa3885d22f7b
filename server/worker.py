"""One worker process: a model, an engine, and a socket to the pool. Start it through the pool.

`python -m imprint.server.worker CONFIG` with `WorkerStart` as JSON. Between two units of work it
takes messages in and, once an interval, sends a heartbeat: it is silent for at most an interval
and one quantum. Idle, it sleeps in poll. SIGTERM or `Drain` lets running answers finish, and
adapters come to the disk, and exits with 0; a second SIGTERM aborts. It dies with its parent, if it
has one (in a Ray cluster, Ray sees to that). The
last thing that it says is whether it still has the base weights that it loaded.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import torch
import zmq

from imprint.adapters import faults
from imprint.adapters.files import StoreGoneError
from imprint.adapters.gate import load_neutral
from imprint.adapters.similarity import EncoderError, load_similarity
from imprint.models import ModelError, load_model, load_tokenizer, weights_hash
from imprint.models.host_memory import give_freed_memory_back, keep_freed_memory
from imprint.models.kernels import uses_triton
from imprint.models.pool_decoder import warm_up
from imprint.server.engine import Engine
from imprint.server.logs import configure_logging
from imprint.server.messages import Drain, FromWorker, Heartbeat, Ready, decode_to_worker, encode
from imprint.server.pool_wire import connect
from imprint.server.tasks import Emit
from imprint.server.worker_config import WorkerConfig, WorkerStart

log = logging.getLogger(__name__)

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
EXIT_LINGER_MS = 2000
IDLE_S = 5.0
"""Without work for so long, a worker gives the memory back that it has freed."""
EXIT_STORE_GONE = 74  # EX_IOERR of sysexits.h
EXIT_UNUSABLE_MODEL = 78  # EX_CONFIG of sysexits.h


class Worker:
    """The loop around one engine."""

    def __init__(self, start: WorkerStart) -> None:
        config = start.worker
        self._config = config
        self._parent_pid = start.parent_pid
        self._num_signals = 0
        self._drain_deadline: float | None = None
        self._next_heartbeat = 0.0
        self._rest_at: float | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, start.identity.encode())
        self._socket.setsockopt(zmq.LINGER, EXIT_LINGER_MS)
        connect(self._socket, start.endpoint, start.keys)
        self._engine, self._ready = load_engine(config, self._send)

    def run(self) -> int:
        """Work until drained or orphaned; returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the API process's to handle
        self._send(self._ready)
        busy = False
        while True:
            self._receive(busy)
            self._beat()
            if self._parent_pid not in (None, os.getppid()):
                log.error("the parent process is gone; exiting")
                return 1
            if self._drained():
                break
            busy = self._guarded(self._engine.step)
            self._rest(busy)
        self._engine.flush_observations()
        self._socket.close()
        self._context.term()
        return last_words(self._engine)

    def _guarded(self, work: Callable[[], T]) -> T | Literal[True]:
        """The only place that catches everything: one job's error must not end the others."""
        try:
            return work()
        except Exception as error:
            self._engine.fail_unit(error)
            return True

    def _receive(self, busy: bool) -> None:
        """Take in what has arrived; without work to do, wait for it until the next heartbeat."""
        wait_s = 0.0 if busy else max(self._next_heartbeat - time.monotonic(), 0.0)
        while self._socket.poll(int(wait_s * 1000), zmq.POLLIN):
            frame = self._socket.recv(zmq.NOBLOCK)
            faults.at("message_receive")
            message = decode_to_worker(frame)
            self._guarded(partial(self._engine.handle, message))
            wait_s = 0.0

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self._config.heartbeat_interval_s
            self._engine.flush_observations()
            self._send(Heartbeat(time=time.time(), stats=self._engine.stats()))

    def _rest(self, busy: bool) -> None:
        """Give memory back once the engine has had no work for a while; it is asked once a
        heartbeat then."""
        now = time.monotonic()
        if busy:
            self._rest_at = now + IDLE_S
        elif self._rest_at is not None and now >= self._rest_at:
            self._rest_at = None
            give_freed_memory_back()

    def _drained(self) -> bool:
        if not self._engine.draining:
            return False
        now = time.monotonic()
        if self._drain_deadline is None:
            log.info("draining")
            self._drain_deadline = now + self._config.drain_timeout_s
        if now >= self._drain_deadline:
            self._engine.abort_answers("draining", "the server stopped before the answer was done")
        return self._engine.drained

    def _send(self, message: FromWorker) -> None:
        faults.at("message_send")
        self._socket.send(encode(message))

    def _on_sigterm(self, signum: int, frame: object) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            raise SystemExit(1)
        self._engine.handle(Drain())


def check_place(config: WorkerConfig) -> None:
    """Raises StoreGoneError without the store's folder, which the pool has made once, and
    ModelError without the device."""
    if not Path(config.store).is_dir():
        raise StoreGoneError(Path(config.store))
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"there is no {config.device}: torch sees {torch.cuda.device_count()} GPUs; "
            "each of --workers needs one"
        )


def load_engine(config: WorkerConfig, emit: Emit) -> tuple[Engine, Ready]:
    """The engine of a configuration, and what the worker says when it stands."""
    folder = Path(config.model)
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = load_model(folder, device=config.device, dtype=dtype)
    uses_triton(model.device)  # decided, and checked, before anything is served
    if model.device.type == "cuda":
        warm_up(model)  # compiling takes longer than a worker may be silent later
    tokenizer = load_tokenizer(folder)
    similarity = load_similarity(config.reward_encoder, tokenizer.decode)
    model_hash = weights_hash(model)
    engine = Engine(
        model,
        tokenizer,
        config,
        emit,
        model_hash=model_hash,
        neutral=load_neutral(folder, tokenizer),
        similarity=similarity,
    )
    ready = Ready(
        pid=os.getpid(),
        model=folder.resolve().name,
        model_hash=model_hash,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=model.init_state(1).nbytes,
        num_slots=config.num_slots,
        max_tokens=config.max_tokens,
        device=config.device,
        dtype=config.dtype,
    )
    return engine, ready


def last_words(engine: Engine) -> int:
    """The exit status of an orderly end: 1 where a job, or broken memory, has changed the model.

    The invariant that everything rests on, asked of live memory; it takes as long as at the start.
    """
    if engine.weights_are_kept():
        log.info("the base weights are as they were loaded")
        return 0
    log.error("the base weights are not as they were loaded: do not trust what was answered")
    return 1


def die_with_parent(parent_pid: int) -> None:
    """Ask Linux for SIGKILL when the parent dies, which even a worker hung in a kernel obeys."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before we could ask
        raise SystemExit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the process."""
    (config,) = sys.argv[1:] if arguments is None else arguments
    start = msgspec.json.decode(config.encode(), type=WorkerStart)
    if start.parent_pid is not None:
        die_with_parent(start.parent_pid)
    configure_logging(start.log_level, start.log_format, start.identity)
    torch.set_num_threads(start.worker.threads)
    keep_freed_memory()
    try:
        check_place(start.worker)
        worker = Worker(start)
    except StoreGoneError as error:
        log.error("%s; trying again until it is back", error)
        return EXIT_STORE_GONE
    except (ModelError, EncoderError) as error:
        log.error("%s", error)
        return EXIT_UNUSABLE_MODEL
    return worker.run()


if __name__ == "__main__":
    sys.exit(main())
