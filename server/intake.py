"""The door: model names, document and prompt lengths, adapters that may be asked, room for more.

Every refusal is typed and says what to do. Knows no HTTP and starts no work.
"""

import asyncio
import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imprint.adapters.exchange import ForeignAdapter
from imprint.models.tokenizer import Tokenizer
from imprint.server.config import Settings
from imprint.server.documents import Documents
from imprint.server.errors import (
    ConflictError,
    DeadlineError,
    GoneError,
    InvalidRequestError,
    NotFoundError,
    clip,
)
from imprint.server.jobs import Jobs
from imprint.server.limits import Limits
from imprint.server.messages import Prompt
from imprint.server.metrics import Metrics
from imprint.server.places import Places
from imprint.server.records import (
    IMPORT,
    READY,
    AdaptationRow,
    ImportedFile,
    NewAdaptation,
    StoredText,
)
from imprint.server.schemas import MAX_SEED, CreateAdaptation, CreateAnswers, parse_method


def new_id() -> str:
    """The id of an adaptation that nobody can guess."""
    return f"adp_{secrets.token_hex(12)}"


class Intake:
    """Checks what a request asks for, before any work is done for it."""

    def __init__(
        self,
        settings: Settings,
        jobs: Jobs,
        documents: Documents,
        tokenizer: Tokenizer,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._documents = documents
        self._tokenizer = tokenizer
        self._metrics = metrics
        self.limits = limits
        self._places = Places("requests", settings.max_active_requests, limits.share, metrics)

    @property
    def num_requests(self) -> int:
        """Answers and completions waiting or running."""
        return self._places.num_taken

    def refuse_without_room(self, owner: str) -> None:
        """Raises what `request` would where there is no place for one more of the owner's."""
        self._jobs.refuse_when_draining()
        self._places.refuse_without_room(owner)

    @contextmanager
    def request(self, kind: str, owner: str) -> Iterator[None]:
        """Room for one answer or completion of the owner, counted with its outcome."""
        self._jobs.refuse_when_draining()
        with self._places.take(owner), self._outcome(kind):
            yield

    @contextmanager
    def _outcome(self, kind: str) -> Iterator[None]:
        outcome = "failed"
        try:
            yield
            outcome = "succeeded"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except DeadlineError as error:
            self._metrics.deadlines.labels(phase=error.phase).inc()
            raise
        finally:
            self._metrics.requests.labels(kind=kind, outcome=outcome).inc()

    @property
    def has_encoder(self) -> bool:
        """Whether the reward `semantic` can be had."""
        return bool(self._settings.reward_encoder)

    def _method(self, method: dict[str, Any] | None) -> dict[str, Any]:
        preset = self._settings.default_preset
        return parse_method(method, preset=preset, has_encoder=self.has_encoder)

    async def adaptation(
        self, body: CreateAdaptation, owner: str
    ) -> tuple[NewAdaptation, list[int]]:
        """The job that a client asks for by name, and its document's tokens."""
        self.check_model(body.model)
        method = self._method(body.method)
        limit_s = self._settings.adaptation_timeout_s
        idle_s = self._settings.adapter_idle_s
        new = NewAdaptation(
            id=new_id(),
            owner=owner,
            text=body.document or "",
            model=self._settings.served_model_name,
            method=method,
            seed=body.seed,
            num_tokens=0,
            pinned=True,
            priority=body.priority,
            timeout_s=min(body.timeout_s or limit_s, limit_s),
            expires_after_s=body.expires_after_s,
            idle_expires_after_s=body.idle_expires_after_s or idle_s or None,
            metadata=body.metadata,
        )
        if body.document is not None:
            await self._jobs.refuse_when_full(new)
        text, tokens = await self._document(body, owner)
        self.limits.admit_tokens(owner, len(tokens))
        return dataclasses.replace(new, text=text, num_tokens=len(tokens)), tokens

    def imported(
        self, id: str, owner: str, adapter: ForeignAdapter, num_bytes: int
    ) -> NewAdaptation:
        """The job that takes in an adapter's file; the same file is the same job."""
        named = b"\xff" + adapter.checksum.encode()  # no text has these bytes
        return NewAdaptation(
            id=id,
            owner=owner,
            text=ImportedFile(sha256=hashlib.sha256(named).hexdigest(), num_bytes=num_bytes),
            model=self._settings.served_model_name,
            method={"type": IMPORT},
            seed=0,
            num_tokens=adapter.num_tokens,
            pinned=True,
            timeout_s=self._settings.adaptation_timeout_s,
            idle_expires_after_s=self._settings.adapter_idle_s or None,
            metadata={},
        )

    def check_append(self, body: CreateAdaptation, owner: str) -> None:
        """Refuse what `adaptation` would refuse, before the document has a new version."""
        self._method(body.method)
        self._jobs.refuse_without_room(owner)
        self.limits.admit_tokens(owner, 0)

    async def answer_adaptation(
        self, body: CreateAnswers, owner: str
    ) -> tuple[NewAdaptation, list[int]]:
        """The job that answering from a document needs: a reading where the questions focus it."""
        default = {"type": "refine"} if body.focus is False else {"type": "read"}
        method = default if body.method is None else body.method
        # A reading has no random choices, so that one serves every seed.
        seed = 0 if method.get("type") == "read" else body.seed
        asked = CreateAdaptation(
            document=body.document,
            document_id=body.document_id,
            model=body.model,
            method=method,
            seed=seed,
        )
        new, tokens = await self.adaptation(asked, owner)
        ttl_s = self._settings.answer_adapter_ttl_s
        return dataclasses.replace(new, pinned=False, expires_after_s=ttl_s), tokens

    async def ready(self, id: str, owner: str, *, param: str | None = None) -> AdaptationRow:
        """An adaptation that can be asked; otherwise raises 404, 409 or 410."""
        row = await self._jobs.get(id, owner, param=param)
        if row.status in READY:
            return row
        if row.active:
            raise ConflictError(
                f"adaptation {id} is {row.status}; ask again when it has ended",
                code="adaptation_not_ready",
                retry_after_s=self._jobs.finish_s(id) or 1.0,
            )
        error = row.error or {}
        if row.status == "expired":
            raise GoneError(
                f"the adapter of {id} is gone: {error.get('message')}",
                code=error.get("code", "adapter_evicted"),
            )
        raise ConflictError(
            f"adaptation {id} is {row.status}: {error.get('message', 'it cannot be asked')}",
            code=f"adaptation_{row.status}",
        )

    async def model_adapter(self, model: str, owner: str) -> str | None:
        """The adaptation id in `<base>:<id>`, ready to be asked; None for the base model."""
        base, _, id = model.partition(":")
        self.check_model(base)
        if not id:
            return None
        if id.startswith("doc_"):
            return await self._document_adapter(id, owner)
        return (await self.ready(id, owner, param="model")).id

    async def _document_adapter(self, document_id: str, owner: str) -> str:
        """The newest adaptation of a document's newest version that can be asked."""
        row = await self._documents.get(document_id, owner, param="model")
        id = await self._documents.adaptation(row)
        if id is None:
            raise ConflictError(
                f"no adaptation of {row.id} is ready; make one with POST /v1/adaptations",
                code="adaptation_not_ready",
                param="model",
                retry_after_s=1.0,
            )
        return id

    def check_model(self, model: str | None, *, param: str = "model") -> None:
        """Raises NotFoundError for another base model than the served one."""
        served = self._settings.served_model_name
        if model is not None and model != served:
            raise NotFoundError(
                f"no model {clip(model)!r}; this server has {served!r}",
                code="model_not_found",
                param=param,
            )

    async def prompts(
        self,
        texts: list[str] | list[list[int]],
        owner: str,
        *,
        param: str,
        seed: int,
        continues: bool,
        num_choices: int = 1,
    ) -> list[Prompt]:
        """Prompts, each with its own random stream: `num_choices` for each text, one by one.

        Texts may be token ids already. `continues` says whether a document is before them.
        """
        limit = self._settings.max_questions
        if len(texts) * num_choices > limit:
            raise InvalidRequestError(
                f"{len(texts) * num_choices} in one request; at most {limit} are allowed",
                param=param if num_choices == 1 else "n",
            )
        batch = await self._encoded(texts, param, continues)
        for index, tokens in enumerate(batch):
            if not 0 < len(tokens) <= self._settings.max_document_tokens:
                raise InvalidRequestError(
                    f"{param}.{index} has {len(tokens)} tokens; "
                    f"1 to {self._settings.max_document_tokens} are allowed",
                    code="context_length_exceeded",
                    param=f"{param}.{index}",
                )
        self.limits.admit_tokens(owner, num_choices * sum(map(len, batch)))
        return [
            Prompt(sequence_id=str(index), tokens=tokens, seed=(seed + index) % (MAX_SEED + 1))
            for index, tokens in enumerate(tokens for tokens in batch for _ in range(num_choices))
        ]

    async def _encoded(
        self, texts: list[str] | list[list[int]], param: str, continues: bool
    ) -> list[list[int]]:
        strings = [text for text in texts if isinstance(text, str)]
        if strings:
            encode = self._tokenizer.encode_batch
            return await asyncio.to_thread(encode, strings, continues=continues)
        batch = [text for text in texts if not isinstance(text, str)]
        size = self._tokenizer.vocab_size
        for index, tokens in enumerate(batch):
            if max(tokens, default=0) >= size:
                raise InvalidRequestError(
                    f"{param}.{index} holds token {max(tokens)}; the vocabulary has {size}",
                    param=f"{param}.{index}",
                )
        return batch

    def max_tokens(self, asked: int | None) -> int:
        """The longest completion, checked against the server's limit."""
        limit = self._settings.max_completion_tokens
        if asked is None:
            return min(self._settings.default_max_tokens, limit)
        if asked > limit:
            raise InvalidRequestError(
                f"max_tokens may be at most {limit}, got {asked}", param="max_tokens"
            )
        return asked

    async def _document(
        self, body: CreateAdaptation, owner: str
    ) -> tuple[str | StoredText, list[int]]:
        if body.document is not None:
            return body.document, await self._documents.encode([body.document], param="document")
        assert body.document_id is not None  # the body has exactly one of the two
        row = await self._documents.get(body.document_id, owner, param="document_id")
        tokens = await self._documents.tokens(row)
        text = StoredText(document_id=row.id, sha256=row.sha256, num_bytes=row.num_bytes)
        return text, tokens
