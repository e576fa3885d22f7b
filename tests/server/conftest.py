"""An in-memory pool, and the app on a real socket in the test's own event loop."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from imprint.adapters.focus import FocusResult
from imprint.server import messages
from imprint.server.app import create_app
from imprint.server.config import Settings
from imprint.server.protocol import uvicorn_config

FOCUSED = FocusResult(
    adapted=True,
    accepted=True,
    steps=4,
    alpha=0.25,
    probe_before=2.5,
    probe_after=1.5,
    reward_first=None,
    reward_last=None,
    passage_tokens=260,
    way="focus",
    drafts={
        "focus": {"confidence": -0.02, "grounding": 6},
        "document": {"confidence": -0.61, "grounding": 1},
    },
    reason="recall improved",
)
"""How a study for a question went, of every answer that asks for one."""

Message = messages.AdaptationMessage | messages.RequestMessage


@dataclass
class FakeWorkerStatus:
    name: str = "0"
    up: bool = True
    heartbeat_age_s: float = 0.1
    restarts: dict[str, int] = field(default_factory=dict)
    stats: messages.Heartbeat | None = None


class FakePool:
    """Answers every work by a script at once, or, when told to hold, whenever the test says."""

    def __init__(self) -> None:
        self.on_observation: Callable[[messages.Observation], None] | None = None
        self.on_span: Callable[[messages.SpanRecord], None] | None = None
        self.ready = True
        self.info = messages.Ready(
            pid=1,
            model="tiny",
            model_hash="0" * 64,
            num_parameters=1000,
            state_bytes=100,
            num_slots=4,
            max_tokens=1000,
            device="cpu",
            dtype="float32",
        )
        self.worker = FakeWorkerStatus()
        self.works: list[Any] = []
        self.queues: dict[str, asyncio.Queue[Message]] = {}
        self.abandoned: list[str] = []
        self.cancelled: list[str] = []
        self.evicted: list[str] = []
        self.hold = False
        self.hold_evict: asyncio.Event | None = None
        self.closed = False
        self.answer_text: Sequence[str] = " forty two \n"
        self.scripts: list[list[Message]] = []

    async def start(self) -> None:
        pass

    def finish_s(self, id: str) -> float | None:
        stats = self.worker.stats
        return None if stats is None else stats.stats.adaptation_finish_s.get(id)

    def backlog_s(self) -> float:
        return 0.0 if self.worker.stats is None else self.worker.stats.stats.backlog_s

    async def close(self, *, grace_s: float) -> None:
        self.closed = True

    def workers(self) -> list[FakeWorkerStatus]:
        return [self.worker]

    @property
    def adapts(self) -> list[messages.Adapt]:
        return [work for work in self.works if isinstance(work, messages.Adapt)]

    @property
    def generates(self) -> list[messages.Generate]:
        return [work for work in self.works if isinstance(work, messages.Generate)]

    def submit(self, work: Any) -> AsyncGenerator[Message, None]:
        id = work.adaptation_id if isinstance(work, messages.Adapt) else work.request_id
        self.works.append(work)
        queue = self.queues[id] = asyncio.Queue()
        if not self.hold:
            for message in self.scripts.pop(0) if self.scripts else self.script(work):
                queue.put_nowait(message)
        num_open = len(work.prompts) if isinstance(work, messages.Generate) else 1
        return self._stream(id, queue, num_open)

    async def _stream(
        self, id: str, queue: "asyncio.Queue[Message]", num_open: int
    ) -> AsyncGenerator[Message, None]:
        ended = False
        try:
            while not ended:
                message = await queue.get()
                num_open -= isinstance(message, messages.SequenceDone)
                ended = num_open == 0 or isinstance(
                    message,
                    messages.AdaptationDone | messages.AdaptationFailed | messages.RequestFailed,
                )
                yield message
        finally:
            if not ended:
                self.abandoned.append(id)

    def say(self, id: str, *said: Message) -> None:
        for message in said:
            self.queues[id].put_nowait(message)

    def script(self, work: Any) -> list[Message]:
        if isinstance(work, messages.Adapt):
            return self.adaptation_script(work.adaptation_id)
        return self.answer_script(work)

    def adaptation_script(self, id: str) -> list[Message]:
        event = messages.AdaptationEvent
        return [
            messages.AdaptationStarted(adaptation_id=id, attempt=1),
            event(adaptation_id=id, kind="progress", data={"phase": "read", "num_tokens": 5}),
            event(
                adaptation_id=id,
                kind="step",
                data={"phase": "adapt", "step": 1, "steps": 2, "reward_mean": 0.5},
            ),
            messages.AdaptationDone(
                adaptation_id=id,
                status="succeeded",
                result={"accepted": True, "probe_before": 2.0, "probe_after": 1.5},
                usage={"tokens_forward": 10, "rollout_tokens": 3},
                nbytes=77,
            ),
        ]

    def logprobs(self, num: int | None) -> messages.TokenLogprobs | None:
        if num is None:
            return None
        top = [(2 + rank, -1.0 - rank) for rank in range(num)]
        return messages.TokenLogprobs(logprob=-0.5, top=top)

    def answer_script(self, work: messages.Generate) -> list[Message]:
        id = work.request_id
        said: list[Message] = []
        if work.focus is not None:
            said.append(messages.FocusProgress(request_id=id, step=1, steps=4))
        for prompt in work.prompts:
            name = prompt.sequence_id
            for index, text in enumerate(self.answer_text):
                said.append(
                    messages.TokenDelta(
                        request_id=id,
                        sequence_id=name,
                        index=index,
                        token_id=1,
                        text=text,
                        logprobs=self.logprobs(work.logprobs),
                    )
                )
            said.append(
                messages.SequenceDone(
                    request_id=id,
                    sequence_id=name,
                    finish_reason="stop",
                    usage={"prompt_tokens": 3, "completion_tokens": 4, "document_tokens": 5},
                    adapted=work.focus is not None,
                    focus=FOCUSED.to_dict() if work.focus is not None else None,
                )
            )
        return said

    async def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        if id in self.queues:
            self.say(id, messages.AdaptationDone(adaptation_id=id, status="cancelled"))

    async def evict(self, adapter_id: str) -> None:
        if self.hold_evict is not None:
            await self.hold_evict.wait()
        self.evicted.append(adapter_id)


@asynccontextmanager
async def _serve(settings: Settings, pool: FakePool) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings, pool)
    server = uvicorn.Server(uvicorn_config(app, settings, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            while not server.started:
                assert not serving.done(), "the server did not start"
                await asyncio.sleep(0.005)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            # no TLS here, and reading the certificates that httpx trusts is slow
            async with httpx.AsyncClient(base_url=url, timeout=20, verify=False) as client:
                client.app = app  # type: ignore[attr-defined]
                client.server = server  # type: ignore[attr-defined]
                yield client
        finally:
            server.should_exit = True
            await serving


Serve = Callable[[Settings, FakePool], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def serve() -> Serve:
    """Runs the app with given settings and pool; a context manager that gives an HTTP client."""
    return _serve


@pytest.fixture
def settings(tiny_checkpoint: Path, tmp_path: Path) -> Settings:
    return Settings(model=tiny_checkpoint, data_dir=tmp_path / "data", port=0)


@pytest.fixture
async def client(settings: Settings, pool: FakePool) -> AsyncIterator[httpx.AsyncClient]:
    async with _serve(settings, pool) as client:
        yield client
