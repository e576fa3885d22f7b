"""Messages survive the wire; frames of another build are refused, not guessed at."""

from __future__ import annotations

import msgspec
import pytest

from imprint.server import messages as m

STATS = m.WorkerStats(slots_used=3, adapters={"host": 1}, adaptation_finish_s={"adp_1": 2.5})
PROMPT = m.Prompt(sequence_id="s", tokens=[1, 2, 3], seed=7)
TO_WORKER: list[m.ToWorker] = [
    m.Adapt(adaptation_id="a", tokens=[1, 2], method={"type": "refine", "steps": 4}, seed=9),
    m.Generate(request_id="r", adapter_id="a", prompts=[PROMPT], stop=["\n"], focus={"steps": 2}),
    m.Cancel(id="a"),
    m.Evict(adapter_id="a"),
    m.Drain(),
]
FROM_WORKER: list[m.FromWorker] = [
    m.AdaptationStarted(adaptation_id="a", attempt=1),
    m.AdaptationResumed(adaptation_id="a", step=1, steps=4, events=[{"step": 1}]),
    m.AdaptationEvent(adaptation_id="a", kind="step", data={"reward_mean": 0.5}),
    m.AdaptationRead(adaptation_id="a", entropies=b"\x00\x3c"),
    m.AdaptationBranches(
        adaptation_id="a",
        steps=[
            m.StepBranches(
                step=1, num_positions=9, positions=[4], rollouts=[[[1, 2]]], rewards=[[None]]
            )
        ],
    ),
    m.AdaptationDone(adaptation_id="a", status="rejected", result={"alpha": None}, nbytes=5),
    m.AdaptationFailed(adaptation_id="a", code="non_finite", message="it broke"),
    m.AdaptationRequeued(adaptation_id="a", attempt=2, reason="killed"),
    m.FocusProgress(request_id="r", step=1, steps=4),
    m.TokenDelta(request_id="r", sequence_id="s", index=0, token_id=5, text="é"),
    m.SequenceDone(request_id="r", sequence_id="s", finish_reason="stop", usage={"a": 1}),
    m.Generated(values=[m.SequenceDone(request_id="r", sequence_id="s", finish_reason="stop")]),
    m.RequestFailed(request_id="r", code="cancelled", message="gone"),
    m.Evicted(adapter_id="a"),
    m.Heartbeat(time=1.5, stats=STATS),
    m.Observations(values=[m.Observation(name="n", value=1.0, labels={"phase": "read"})]),
    m.Spans(
        values=[
            m.SpanRecord(traceparent="00-1-2-01", name="read", began=1.5, ended=2.0,
                         attributes={"step": 1, "busy_seconds": 0.5, "reason": "stop"})
        ]
    ),
    m.Ready(
        pid=1, model="tiny", model_hash="h", num_parameters=2, state_bytes=3, num_slots=4,
        max_tokens=5, device="cpu", dtype="float32",
    ),
]  # fmt: skip


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda message: type(message).__name__)
def test_messages_to_a_worker_survive_the_wire(message: m.ToWorker) -> None:
    assert m.decode_to_worker(m.encode(message)) == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda message: type(message).__name__)
def test_messages_from_a_worker_survive_the_wire(message: m.FromWorker) -> None:
    assert m.decode_from_worker(m.encode(message)) == message


def test_every_message_is_tested_here() -> None:
    tested = {type(message) for message in [*TO_WORKER, *FROM_WORKER]}
    assert tested == set(m.Message.__subclasses__())


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes([m.PROTOCOL_VERSION + 1]) + m.encode(m.Drain())[1:],
        bytes([m.PROTOCOL_VERSION]),
        bytes([m.PROTOCOL_VERSION]) + msgspec.msgpack.encode({"type": "Unheard"}),
        bytes([m.PROTOCOL_VERSION]) + msgspec.msgpack.encode({"type": "Cancel", "id": 3}),
        m.encode(m.AdaptationStarted(adaptation_id="a", attempt=1)),
    ],
    ids=["empty", "version", "no body", "unknown tag", "wrong type", "wrong direction"],
)
def test_unreadable_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(m.ProtocolError):
        m.decode_to_worker(frame)
