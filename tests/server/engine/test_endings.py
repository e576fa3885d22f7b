"""Work that ends early or never starts: cancelled, deleted, late, drained, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    Cancel,
    Drain,
    Evict,
    Evicted,
    Prompt,
    RequestFailed,
    SequenceDone,
)
from support.engine_rig import REFINE, TEXTS, Rig, one


def test_cancelled_work_leaves_nothing_behind(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    long = {**REFINE, "steps": 1000, "patience": 1000}
    rig.engine.handle(Adapt(adaptation_id="b", tokens=[5] * 300, method=long))
    rig.ask("decoding", "a", max_tokens=10_000)
    rig.ask("studying", "a", focus={"steps": 1000, "patience": 1000, "lora_rank": 2})
    for _ in range(20):
        rig.step()
    stats = rig.engine.stats()
    assert (stats.adaptations_running, stats.requests_running, stats.requests_waiting) == (1, 1, 1)
    assert stats.slots_used == 1
    for id in ("b", "decoding", "studying", "unknown"):
        rig.engine.handle(Cancel(id=id))
    said = rig.run()
    assert one(said, AdaptationDone).status == "cancelled"
    failed = [message for message in said if isinstance(message, RequestFailed)]
    assert {(message.request_id, message.code) for message in failed} == {
        ("decoding", "cancelled"), ("studying", "cancelled"),
    }  # fmt: skip
    stats = rig.engine.stats()
    assert (stats.adaptations_running, stats.requests_running, stats.requests_waiting) == (0, 0, 0)
    assert stats.slots_used == 0
    assert stats.adapters == {"host": 1, "disk": 1}


def test_a_deleted_adapter_is_gone_everywhere(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make_rig()
    empty = rig.engine.stats()
    rig.study("a", TEXTS[0], **REFINE)
    rig.ask("r", "a", max_tokens=10_000)
    for _ in range(5):
        rig.step()
    rig.engine.handle(Evict(adapter_id="a"))
    said = rig.run()
    assert one(said, RequestFailed).code == "adapter_not_found"
    assert said[-1] == Evicted(adapter_id="a")
    stats = rig.engine.stats()
    assert (stats.adapters, stats.adapter_bytes) == (empty.adapters, empty.adapter_bytes)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert all(not tensor.any() for tensor in rig.engine.slots._states.tensors())
    rig.ask("again", "a")
    assert one(rig.run(), RequestFailed).code == "adapter_not_found"
    for unknown in ("never", "../never"):
        rig.engine.handle(Evict(adapter_id=unknown))
        assert rig.run() == [Evicted(adapter_id=unknown)]


def test_deadlines_end_work_wherever_it_is(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.now = 0.0
    long = {**REFINE, "steps": 1000, "patience": 1000}
    rig.engine.handle(Adapt(adaptation_id="a", tokens=[5] * 300, method=long, timeout_s=5))
    rig.ask("r", max_tokens=10_000, timeout_s=5)
    for _ in range(5):
        rig.step()
    rig.now = 5.0
    said = rig.run()
    ends = [one(said, AdaptationFailed), one(said, RequestFailed)]
    assert {end.code for end in ends} == {"deadline_exceeded"}
    assert [end.phase for end in ends] == ["quantum", "decode"]
    assert rig.engine.slots.table.num_used == 0


def test_a_drain_finishes_answers_and_takes_no_more(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    rig.engine.handle(Adapt(adaptation_id="b", tokens=[5] * 300, method=REFINE))
    rig.ask("r", "a", focus={"steps": 2, "lora_rank": 2})
    rig.step()
    rig.engine.handle(Drain())
    assert not rig.engine.drained
    rig.ask("late", "a")
    said = rig.run()
    assert one(said, SequenceDone).request_id == "r"
    assert one(said, RequestFailed).code == "draining"
    assert not any(isinstance(message, AdaptationDone) for message in said)
    assert rig.engine.drained


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "method", "code"),
    [
        ([], {"type": "read"}, "document_empty"),
        ([], REFINE, "document_empty"),
        ([5, 9999], REFINE, "invalid_token"),
        ([5] * 501, REFINE, "document_too_large"),
        ([5] * 50, {"type": "dream"}, "invalid_method"),
        ([5] * 50, {"type": "refine", "stepz": 3}, "invalid_method"),
        ([5] * 50, {"type": "read", "steps": 3}, "invalid_method"),
        ([5] * 50, {"type": "refine", "lora_rank": 256, "scope": "lora"}, "document_too_large"),
    ],
)
def test_adaptations_that_cannot_run_say_why(
    make_rig: Callable[..., Rig], tokens: list[int], method: dict[str, Any], code: str
) -> None:
    rig = make_rig(max_tokens=500, adaptation_bytes=4_000_000)
    rig.engine.handle(Adapt(adaptation_id="a", tokens=tokens, method=method))
    assert one(rig.run(), AdaptationFailed).code == code


@pytest.mark.parametrize("length", [1, 2, 7, 20, 40])
def test_tiny_documents_end_clearly(make_rig: Callable[..., Rig], length: int) -> None:
    rig = make_rig()
    for method in (REFINE, {"type": "read"}, {"type": "refine", "scope": "lora", "steps": 1}):
        assert rig.study("a", TEXTS[0][:length], **method).status in ("succeeded", "rejected")
        rig.ask("r", "a", focus={"steps": 1})
        assert one(rig.run(), SequenceDone).finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompts": [Prompt(sequence_id="s", tokens=[])]}, "invalid_request"),
        ({"prompts": [Prompt(sequence_id="s", tokens=[-1])]}, "invalid_request"),
        ({"prompts": [Prompt(sequence_id="s", tokens=[1])] * 2}, "invalid_request"),
        ({"max_tokens": 0}, "invalid_request"),
        ({"prompts": [Prompt(sequence_id="s", tokens=[1] * 501)]}, "context_length_exceeded"),
        ({"adapter_id": "nowhere"}, "adapter_not_found"),
        ({"adapter_id": "../../etc"}, "adapter_not_found"),
    ],
)
def test_requests_that_cannot_run_say_why(
    make_rig: Callable[..., Rig], fields: dict[str, Any], code: str
) -> None:
    rig = make_rig(max_tokens=500)
    rig.ask("r", **fields)
    assert one(rig.run(), RequestFailed).code == code


def test_a_full_queue_refuses(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(max_waiting_requests=2)
    for number in range(3):
        rig.ask(f"r{number}")
    assert one(rig.run(), RequestFailed).code == "queue_full"
