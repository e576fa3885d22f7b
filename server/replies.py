"""The JSON objects of replies, made from rows and events. Knows shapes; does no work."""

import time
from typing import Any

from imprint.server.document_records import DocumentRow
from imprint.server.generation import Finished
from imprint.server.job_run import ActiveJob
from imprint.server.records import AdaptationRow, EventRow


def adaptation_object(
    row: AdaptationRow, job: ActiveJob | None = None, finish_s: float | None = None
) -> dict[str, Any]:
    """An adaptation; `job` adds the progress of one that runs, `finish_s` a worker's estimate."""
    progress = job.progress if job is not None else row.progress
    ended = row.finished_at or (time.time() if row.status == "running" else None)
    began = row.started_at
    return {
        "id": row.id,
        "object": "adaptation",
        "status": row.status,
        "model": row.model,
        "method": row.method,
        "seed": row.seed,
        "priority": row.priority,
        "document_id": row.document_id,
        "sha256": row.sha256,
        "num_tokens": row.num_tokens,
        "bytes": row.num_bytes,
        "adapter_bytes": row.nbytes,
        "attempt": row.attempt,
        "created_at": _moment(row.created_at),
        "started_at": _moment(began),
        "finished_at": _moment(row.finished_at),
        "estimated_finish": None if finish_s is None else _moment(time.time() + finish_s),
        "expires_at": _moment(row.expires_at),
        "used_at": _moment(row.used_at),
        "idle_expires_after_s": row.idle_expires_after_s,
        "seconds": None if began is None or ended is None else round(ended - began, 3),
        "error": row.error,
        "progress": {name: progress.get(name) for name in ("phase", "step", "steps", "num_tokens")},
        "usage": row.usage,
        "result": row.result,
        "metadata": row.metadata,
    }


def document_object(row: DocumentRow) -> dict[str, Any]:
    """A document, without its text."""
    return {
        "id": row.id,
        "object": "document",
        "title": row.title,
        "media_type": row.media_type,
        "version": row.version,
        "sha256": row.sha256,
        "num_tokens": row.num_tokens,
        "bytes": row.num_bytes,
        "num_references": row.num_references,
        "created_at": _moment(row.created_at),
        "updated_at": _moment(row.updated_at),
        "expires_at": _moment(row.expires_at),
        "metadata": row.metadata,
    }


def event_object(event: EventRow) -> dict[str, Any]:
    """One event of an adaptation."""
    return {
        "object": "adaptation.event",
        "sequence": event.sequence,
        "created_at": _moment(event.created_at),
        "kind": event.kind,
        "data": event.data,
    }


def list_object(data: list[dict[str, Any]], *, has_more: bool, key: str = "id") -> dict[str, Any]:
    """A page; the next one comes after `last_id`."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0][key] if data else None,
        "last_id": data[-1][key] if data else None,
        "has_more": has_more,
    }


def answer_object(question: str, done: Finished) -> dict[str, Any]:
    """One question's outcome."""
    return {
        "index": done.index,
        "question": question,
        "answer": done.text,
        "adapted": done.adapted,
        "finish_reason": done.finish_reason,
        "usage": done.usage,
        "focus": done.focus,
    }


def _moment(seconds: float | None) -> float | None:
    """Unix time, to the millisecond."""
    return None if seconds is None else round(seconds, 3)
