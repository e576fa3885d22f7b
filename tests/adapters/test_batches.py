"""Calls of several studies in one batch: each result is what it would be alone, whatever fails."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from imprint.adapters.batches import Batches, same_bits
from imprint.adapters.calls import Call, Work, telling_delta, telling_state
from imprint.adapters.config import RefineConfig
from imprint.adapters.course import Course
from imprint.adapters.reading import ReadSegment
from imprint.adapters.refine import Refiner
from imprint.models import DeltaNet, FastWeightModel, LoraDelta, load_model
from imprint.models.config import BUNDLED


@dataclass(frozen=True)
class Double(Call[Tensor]):
    """Twice a number; a batch may round otherwise, or break at a value."""

    value: float
    off: float = 0.0
    breaks: bool = False

    @property
    def work(self) -> Work:
        return Work("read", forward_tokens=1)

    @property
    def key(self) -> Hashable:
        return ("double", self.off)

    def together(self, calls: Sequence[Self]) -> list[Tensor]:
        if any(call.breaks for call in calls):
            raise RuntimeError("a kernel broke")
        extra = self.off if len(calls) > 1 else 0.0
        return [torch.tensor(2 * call.value + extra) for call in calls]


def doubled(batches: Batches, *calls: Double) -> list[Any]:
    return [float(r) if isinstance(r, Tensor) else r for r in batches.run(calls)]


def test_a_kind_of_batch_is_compared_once_and_then_used() -> None:
    batches = Batches(exact=True)
    for _ in range(3):
        assert doubled(batches, Double(1), Double(2)) == [2, 4]
    assert batches.num_tried == 1
    assert doubled(batches, Double(1), Double(2), Double(float("nan")))[:2] == [2, 4]
    assert batches.num_tried == 2
    assert batches.most(Double(1)) is None


def test_a_batch_that_rounds_otherwise_is_never_used() -> None:
    batches = Batches(exact=True)
    for _ in range(3):
        assert doubled(batches, Double(1, off=1e-3), Double(2, off=1e-3)) == [2, 4]
    assert batches.num_tried == 1
    assert batches.most(Double(1, off=1e-3)) == 1
    assert doubled(Batches(exact=False), Double(1, off=1), Double(2, off=1)) == [3, 5]


@dataclass(frozen=True)
class Coarse(Double):
    """Its result is the same in company by chance; what it is made from is not."""

    def together(self, calls: Sequence[Self]) -> list[Tensor]:
        return [result.round() for result in self.witness(calls)]

    def witness(self, calls: Sequence[Self]) -> list[Tensor]:
        return Double.together(self, calls)


def test_results_that_agree_by_chance_do_not_count() -> None:
    batches = Batches(exact=True)
    assert doubled(batches, Coarse(1, off=0.1), Coarse(2, off=0.1)) == [2, 4]
    assert batches.most(Coarse(1, off=0.1)) == 1
    assert doubled(batches, Coarse(1), Coarse(2)) == [2, 4]
    assert batches.most(Coarse(1)) is None


def test_a_comparison_sees_through_what_is_still_zero(tiny_model: DeltaNet) -> None:
    fresh = LoraDelta.init(tiny_model.lora_targets(), 2, seed=1)
    told = telling_delta(fresh)
    assert told is not None
    assert all(bool(b.all()) for b in told.b.values())
    assert not any(bool(b.any()) for b in fresh.b.values())
    start = tiny_model.init_state(1)
    assert all(bool(tensor.any()) for tensor in telling_state(start).tensors())
    calls = [ReadSegment(tiny_model, torch.arange(n, n + 16), start, fresh, True) for n in (0, 9)]
    for mine, right in zip(calls[0].witness(calls), map(ReadSegment.alone, calls), strict=True):
        assert not same_bits(mine, right)  # other numbers than the call's own
    assert Batches(exact=True).run(calls)[0].entropy_C is not None


def test_a_batch_that_fails_is_tried_call_by_call_and_made_smaller() -> None:
    batches = Batches(exact=True)
    good, bad = Double(1), Double(2, breaks=True)
    results = doubled(batches, good, bad, good, good)
    assert results[:1] + results[2:] == [2, 2, 2]
    assert isinstance(results[1], RuntimeError)
    assert batches.most(good) == 2


def test_not_a_number_equals_itself_and_nothing_else() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([1.0, 2.0]))
    assert not same_bits(nan, nan.double())


# ---- whole studies -----------------------------------------------------------------------------


def study_together(refiners: Sequence[Refiner], batches: Batches) -> list[list[dict[str, Any]]]:
    """Run the largest group of equal calls, again and again; the events of each."""
    courses = [Course(refiner.study()) for refiner in refiners]
    events: list[list[dict[str, Any]]] = [[] for _ in refiners]
    waiting: list[tuple[int, Any]] = [(number, None) for number in range(len(courses))]
    while True:
        for number, result in waiting:
            assert not isinstance(result, Exception)
            reports = courses[number].go_on(result)
            events[number] += [report.event for report in reports if report.event is not None]
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for number, course in enumerate(courses):
            if course.call is not None:
                key = course.call.key
                groups[number if key is None else key].append(number)
        if not groups:
            return events
        numbers = max(groups.values(), key=len)
        results = batches.run([call for n in numbers if (call := courses[n].call) is not None])
        waiting = list(zip(numbers, results, strict=True))


def assert_as_alone(
    model: FastWeightModel, documents: Sequence[list[int]], config: RefineConfig
) -> Batches:
    def begin() -> list[Refiner]:
        neutral = list(range(60, 90))
        return [
            Refiner(model, document, config, seed=number, neutral=neutral)
            for number, document in enumerate(documents)
        ]

    alone = begin()
    events = [
        [quantum.event for quantum in refiner.run() if quantum.event is not None]
        for refiner in alone
    ]
    batches, company = Batches(exact=True), begin()
    assert study_together(company, batches) == events
    for mine, right in zip(company, alone, strict=True):
        assert mine.adapter is not None
        assert right.adapter is not None
        assert mine.adapter.manifest == right.adapter.manifest
        tensors = right.adapter.to_tensors()
        for name, tensor in mine.adapter.to_tensors().items():
            assert torch.equal(tensor, tensors[name]), name
    assert batches.num_tried > 0
    return batches


@pytest.mark.parametrize(
    ("scope", "branches", "group_size"),
    [
        ("query_lora", "recall", 1),
        ("query_lora", "mixed", 3),
        ("lora", "recall", 3),
        ("state", "recall", 3),
        ("full", "recall", 3),
    ],
)
def test_documents_together_are_each_as_alone(
    tiny_model: DeltaNet,
    small: RefineConfig,
    caplog: pytest.LogCaptureFixture,
    scope: str,
    branches: str,
    group_size: int,
) -> None:
    draw = torch.Generator().manual_seed(5)
    documents = [torch.randint(257, (n,), generator=draw).tolist() for n in (100, 100, 130)]
    config = small.replace(
        scope=scope, branches=branches, group_size=group_size, positions=8, steps=2
    )
    assert_as_alone(tiny_model, documents, config)
    assert "cannot be compared" not in caplog.text


def test_a_document_of_the_bundled_model_is_the_same_in_company() -> None:
    model = load_model(BUNDLED)
    draw = torch.Generator().manual_seed(6)
    documents = [torch.randint(4096, (160,), generator=draw).tolist() for _ in range(2)]
    config = RefineConfig(steps=1, segment_tokens=64, probe_confidence=0.0)
    assert_as_alone(model, documents, config)
