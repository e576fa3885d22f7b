"""The scheduler's promises, on numbers alone: answers first, bounded steps, fair shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.server.scheduler import (
    ADAPTATION_EVERY,
    PREFILL_PIECE,
    Plan,
    QueueFullError,
    Scheduler,
    SchedulerConfig,
    TooLargeError,
)
from imprint.server.sequence import Job, Request, Sequence
from imprint.server.slots import SlotHandle


def scheduler(**changes: float) -> Scheduler:
    numbers = {
        "num_slots": 4, "step_tokens": 32, "adaptation_share": 0.5, "max_running_adaptations": 3,
        "adaptation_bytes": 100, "max_waiting_requests": 3,
    }  # fmt: skip
    return Scheduler(SchedulerConfig(**{**numbers, **changes}))  # type: ignore[arg-type]


def job(id: str, *, arrived: float = 0.0, num_bytes: int = 10, **rest: object) -> Job:
    return Job(id=id, work_tokens=100, num_bytes=num_bytes, arrived=arrived, **rest)  # type: ignore[arg-type]


def request(
    id: str, *prompt_lengths: int, max_tokens: int = 4, deadline: float | None = None
) -> Request:
    sequences = [
        Sequence(request_id=id, sequence_id=f"{id}.{i}", prompt=[1] * n, max_tokens=max_tokens)
        for i, n in enumerate(prompt_lengths or (5,))
    ]
    return Request(id=id, sequences=sequences, arrived=0.0, deadline=deadline)


def begin(sched: Scheduler, requests: list[Request]) -> None:
    """What the engine does with requests that need no focus run."""
    for item in requests:
        sched.begun(item.id)
        for sequence in item.sequences:
            sequence.slot = SlotHandle(1, 0)
        sched.activate(item.id)


def prefill(shares: list[tuple[Sequence, int]]) -> None:
    for sequence, num_tokens in shares:
        sequence.num_prefilled += num_tokens
        if not sequence.num_unread:
            sequence.tokens.append(1)


def test_every_decoding_sequence_is_in_every_step() -> None:
    sched = scheduler()
    requests = [request("a", 5, 6), request("b", 7)]
    for item in requests:
        sched.add_request(item)
    sched.add_job(job("study"))
    begin(sched, sched.schedule(0.0).begin)
    prefill(sched.schedule(0.0).prefill)
    for step in range(5):
        plan = sched.schedule(float(step))
        assert {s.sequence_id for s in plan.decode} == {"a.0", "a.1", "b.0"}


def test_quanta_keep_to_their_share_while_answers_decode() -> None:
    sched = scheduler(adaptation_share=0.25)
    study = job("study")
    sched.add_job(study)
    sched.add_request(request("a"))
    begin(sched, sched.schedule(0.0).begin)
    prefill(sched.schedule(0.0).prefill)
    assert sched.schedule(1.0).quantum == [study]
    sched.charge([study], 64, duration_s=0.1, now=1.1)
    assert sched.schedule(1.2).quantum == []
    assert sched.schedule(1.41).quantum == [study]  # three times as long for the answers
    sched.remove("a")
    sched.charge([study], 64, duration_s=0.1, now=2.0)
    assert sched.schedule(2.0).quantum == [study]  # nobody waits for an answer


def test_no_quantum_stands_between_a_request_and_its_first_token() -> None:
    sched = scheduler()
    sched.add_job(job("study"))
    sched.add_request(request("a"))
    plan = sched.schedule(0.0)
    assert len(plan.begin) == 1
    assert plan.quantum == []
    begin(sched, plan.begin)
    assert sched.schedule(0.0).prefill


def test_the_least_served_document_runs_next_and_priority_doubles_a_share() -> None:
    sched = scheduler()
    jobs = [job("a"), job("b"), job("c", priority=1)]
    for item in jobs:
        sched.add_job(item)
    for step in range(40):
        (chosen,) = sched.schedule(float(step)).quantum
        sched.charge([chosen], 10, 0.001, float(step))
    assert [item.served_tokens for item in jobs] == [100, 100, 200]


def test_a_newcomer_does_not_claim_the_past() -> None:
    sched = scheduler()
    old, new = job("old"), job("new", arrived=1.0)
    sched.add_job(old)
    for step in range(10):
        sched.schedule(float(step))
        sched.charge([old], 10, 0.001, float(step))
    sched.add_job(new)
    for step in range(10, 20):
        (chosen,) = sched.schedule(float(step)).quantum
        sched.charge([chosen], 10, 0.001, float(step))
    assert new.served_tokens == 50


def test_quanta_of_one_kind_share_a_batch_within_its_bounds() -> None:
    sched = scheduler(max_running_adaptations=8, max_batched_adaptations=4, max_quantum_s=0.35)
    jobs = [job(name) for name in "abcdef"]
    for item in jobs:
        sched.add_job(item)
        item.kind, item.quantum_tokens = "read", 100
    jobs[1].kind = "probe"
    first = sched.schedule(0.0).quantum
    assert first == [jobs[0]]  # nobody knows yet how long it takes
    sched.charge(first, 100, 0.01, 0.0)
    second = sched.schedule(1.0).quantum
    assert second == [jobs[1]]  # the least served, and alone of its kind
    sched.charge(second, 100, 0.01, 1.0)
    assert sched.schedule(2.0).quantum == [jobs[i] for i in (2, 3, 4, 5)]
    for _ in range(40):
        sched.charge([jobs[2]], 100, 0.1, 2.0)  # it has become slow: three fit 0.35 s
        jobs[2].virtual_tokens = 0.0
    assert len(sched.schedule(3.0).quantum) == 3
    for item in jobs:
        item.most_together = 2
    assert len(sched.schedule(4.0).quantum) == 2


def test_focus_runs_never_share_a_quantum_with_adaptations() -> None:
    sched = scheduler(max_running_adaptations=8, max_batched_adaptations=4)
    jobs = [job("a"), job("b"), job("c", focus=True), job("d", focus=True)]
    for item in jobs:
        sched.add_job(item)
        item.kind, item.quantum_tokens = "probe", 10
    sched.schedule(0.0)
    sched.charge([jobs[0]], 10, 0.001, 0.0)
    seen = set()
    for step in range(8):
        chosen = sched.schedule(1.0 + step).quantum
        seen.add(tuple(sorted(item.id for item in chosen)))
        sched.charge(chosen, 10, 0.001, 1.0 + step)
    assert seen == {("a", "b"), ("c", "d")}


def test_documents_that_came_at_different_times_fall_into_step() -> None:
    """Each cycles through three stages; after a while every quantum is a batch of all."""
    sched = scheduler(max_running_adaptations=8, max_batched_adaptations=8)
    jobs = [job(name) for name in "abc"]
    for number, item in enumerate(jobs):
        item.stage = number
        sched.add_job(item)
    sizes = []
    for step in range(60):
        for item in jobs:
            item.kind, item.quantum_tokens = item.stage, (200, 400, 300)[item.stage]
        chosen = sched.schedule(float(step)).quantum
        sched.charge(chosen, chosen[0].quantum_tokens, 0.001, float(step), stage=chosen[0].stage)
        sizes.append(len(chosen))
        for item in chosen:
            item.stage = (item.stage + 1) % 3
    assert sizes[-10:] == [3] * 10


def test_focus_comes_first_but_leaves_every_fourth_quantum() -> None:
    sched = scheduler()
    study, focus = job("study"), job("focus", focus=True)
    sched.add_job(study)
    sched.add_job(focus)
    order = []
    for step in range(2 * ADAPTATION_EVERY):
        (chosen,) = sched.schedule(float(step)).quantum
        order.append(chosen.id)
        sched.charge([chosen], 10, 0.001, float(step))
    assert order == (["focus"] * (ADAPTATION_EVERY - 1) + ["study"]) * 2


def test_admission_by_bytes_by_number_and_by_priority() -> None:
    sched = scheduler(max_running_adaptations=2)
    for item in (job("a", num_bytes=60), job("b", num_bytes=60), job("c", num_bytes=10)):
        sched.add_job(item)
    sched.schedule(0.0)
    assert sched.counts().adaptations_running == 1  # b does not fit, c does not overtake it
    sched.remove("a")
    sched.schedule(1.0)
    assert sched.counts().adaptations_running == 2
    early, urgent = job("early", arrived=9.0), job("urgent", arrived=10.0, priority=2)
    sched.add_job(early)
    sched.add_job(urgent)
    sched.remove("b")
    sched.schedule(2.0)
    assert urgent.running
    assert not early.running
    with pytest.raises(TooLargeError):
        sched.add_job(job("huge", num_bytes=101))


def test_requests_wait_for_slots_in_order_and_the_queue_is_bounded() -> None:
    sched = scheduler()
    for item in (request("a", 1, 1, 1), request("b", 1, 1), request("c", 1)):
        sched.add_request(item)
    with pytest.raises(QueueFullError):
        sched.add_request(request("d"))
    plan = sched.schedule(0.0)
    assert [item.id for item in plan.begin] == ["a"]  # b must wait, c does not overtake it
    begin(sched, plan.begin)
    sched.remove("a")
    assert [item.id for item in sched.schedule(1.0).begin] == ["b", "c"]
    assert [item.id for item in sched.schedule(1.0).begin] == ["b", "c"]  # until they have begun
    with pytest.raises(TooLargeError):
        sched.add_request(request("e", 1, 1, 1, 1, 1))


def test_deadlines_are_seen_in_the_queue_between_quanta_and_in_decode() -> None:
    sched = scheduler(max_running_adaptations=1)
    sched.add_job(job("running", deadline=10.0))
    sched.add_job(job("queued", deadline=10.0, arrived=1.0))
    decoding = request("decoding", 1, 1, 1, 1, deadline=10.0)
    sched.add_request(decoding)
    sched.add_request(request("waiting", deadline=10.0))
    begin(sched, sched.schedule(9.0).begin)
    late = {item.id: item.phase for item in sched.schedule(10.0).expired}
    assert late == {
        "running": "quantum", "queued": "queue", "decoding": "decode", "waiting": "queue"
    }  # fmt: skip
    assert sched.schedule(11.0) == Plan()
    assert not sched.answering


def test_a_drain_lets_answers_finish_and_starts_no_adaptation_quantum() -> None:
    sched = scheduler()
    sched.add_job(job("study"))
    sched.schedule(0.0)
    sched.add_request(request("a"))
    begun = sched.schedule(0.0).begin
    sched.begun("a")
    sched.add_job(job("a", focus=True))
    sched.draining = True
    for step in range(8):
        (chosen,) = sched.schedule(float(step)).quantum
        assert chosen.focus
        sched.charge([chosen], 10, 0.001, float(step))
    begin(sched, begun)
    prefill(sched.schedule(9.0).prefill)
    assert len(sched.schedule(10.0).decode) == 1
    sched.remove("a")
    assert sched.schedule(11.0).quantum == []
    assert not sched.answering


def test_finish_estimates_follow_the_rate_and_the_shares() -> None:
    sched = scheduler(max_running_adaptations=2)
    short, long = job("short"), job("long")
    short.work_tokens, long.work_tokens = 120, 520
    for item in (short, long, job("next", arrived=5.0)):
        sched.add_job(item)
    assert sched.finish_estimates() == ({}, 0.0)
    sched.schedule(0.0)
    sched.charge([short], 20, duration_s=0.2, now=1.0)
    sched.charge([long], 20, duration_s=0.2, now=1.0)
    finish, total = sched.finish_estimates()
    assert finish == pytest.approx({"short": 2.0, "long": 6.0, "next": 7.0})
    assert total == pytest.approx(7.0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 64))
def test_prefill_is_bounded_complete_and_starves_no_one(
    lengths: list[int], step_tokens: int
) -> None:
    sched = scheduler(num_slots=12, step_tokens=step_tokens)
    item = request("a", *lengths)
    sched.add_request(item)
    begin(sched, sched.schedule(0.0).begin)
    # in one step at least so many get a share, and all get theirs by turns
    at_once = min(max(step_tokens // PREFILL_PIECE, 1), len(lengths))
    longest_wait = -(-len(lengths) // at_once)
    served = dict.fromkeys(range(len(lengths)), 0)
    for step in range(1, sum(lengths) + 2):
        shares = sched.schedule(0.0).prefill
        if not shares:
            break
        unread = sum(sequence.num_unread for sequence in item.sequences)
        assert sum(num_tokens for _, num_tokens in shares) == min(step_tokens, unread)
        for sequence, num_tokens in shares:
            assert 1 <= num_tokens <= sequence.num_unread
            place = item.sequences.index(sequence)
            assert step - served[place] <= longest_wait
            served[place] = step
        prefill(shares)
    assert all(sequence.num_unread == 0 for sequence in item.sequences)


@settings(deadline=None)
@given(st.data())
def test_whatever_happens_limits_hold_and_all_work_ends(data: st.DataObject) -> None:
    sched = scheduler()
    now = 0.0
    known: dict[str, Job | Request] = {}
    for number in range(data.draw(st.integers(1, 40))):
        now += 0.1
        action = data.draw(st.sampled_from(["job", "request", "cancel", "step", "step"]))
        if action == "job":
            item = job(f"j{number}", arrived=now, num_bytes=data.draw(st.integers(1, 100)))
            sched.add_job(item)
            known[item.id] = item
        elif action == "request" and sched.counts().requests_waiting < 3:
            ask = request(
                f"r{number}", *data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
            )
            sched.add_request(ask)
            known[ask.id] = ask
        elif action == "cancel" and known:
            id = data.draw(st.sampled_from(sorted(known)))
            sched.remove(id)
            del known[id]
        else:
            _engine_step(sched, now, known)
    for _ in range(2000):
        if not known:
            break
        now += 0.1
        _engine_step(sched, now, known)
    assert not known
    assert not sched.answering


def _engine_step(sched: Scheduler, now: float, known: dict[str, Job | Request]) -> None:
    plan = sched.schedule(now)
    begin(sched, plan.begin)
    running = [j for j in known.values() if isinstance(j, Job) and j.running]
    assert len(running) <= sched.config.max_running_adaptations
    assert len(running) <= 1 or sum(j.num_bytes for j in running) <= sched.config.adaptation_bytes
    slots = {s.request_id: known[s.request_id] for s in plan.decode}
    assert sum(r.num_slots for r in slots.values() if isinstance(r, Request)) <= 4
    for sequence in plan.decode:
        sequence.tokens.append(1)
        sequence.finished = len(sequence.tokens) >= sequence.max_tokens
    prefill(plan.prefill)
    for item in list(known.values()):
        if isinstance(item, Request) and item.finished:
            sched.remove(item.id)
            del known[item.id]
    if plan.quantum:
        sched.charge(plan.quantum, 50, 0.01, now)
    for chosen in plan.quantum:
        if chosen.served_tokens >= chosen.work_tokens:
            sched.remove(chosen.id)
            del known[chosen.id]
