"""What breaks within a batch ends what it must, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models import DeltaNet
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    Prompt,
    RequestFailed,
    SequenceDone,
    TokenDelta,
)
from support.engine_rig import POISON, REFINE, TEXTS, FaultyModel, Rig, done_of, one, tokens_of


def test_a_broken_row_ends_its_own_request_only(
    make_rig: Callable[..., Rig], faulty: FaultyModel
) -> None:
    rig = make_rig(faulty)
    rig.ask("good")
    expected = tokens_of(rig.run(), "good")
    for switch, code in (("breaks", "internal_error"), ("poisons", "non_finite")):
        setattr(faulty, switch, True)
        rig.ask("good")
        rig.ask("bad", prompts=[Prompt(sequence_id="bad", tokens=[3, POISON, 3])])
        said = rig.run()
        assert tokens_of(said, "good") == expected
        failed = one(said, RequestFailed)
        assert (failed.request_id, failed.code) == ("bad", code)
        setattr(faulty, switch, False)
    assert rig.engine.slots.table.num_used == 0


class ShakyModel(DeltaNet):
    """A model whose steps in place break off, once they have spoilt the slots."""

    num_breaks = 0
    """How many of the coming steps break."""
    fatal: int | None = None
    """A token that nothing may read."""

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fatal is not None and bool((tokens_BT == self.fatal).any()):
            raise RuntimeError("a kernel broke")
        return super().forward(tokens_BT, *args, **kwargs)

    def step_(self, tokens_B: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_BD = super().step_(tokens_B, *args, **kwargs)
        if self.num_breaks or (self.fatal is not None and bool((tokens_B == self.fatal).any())):
            self.num_breaks = max(self.num_breaks - 1, 0)
            raise torch.OutOfMemoryError("no memory left")
        return hidden_BD


@pytest.fixture
def shaky(model: DeltaNet) -> ShakyModel:
    copy = ShakyModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def test_slots_that_a_broken_step_spoilt_are_read_again(
    make_rig: Callable[..., Rig], shaky: ShakyModel
) -> None:
    rig = make_rig(shaky, step_tokens=8)
    rig.study("a", TEXTS[0], **REFINE)
    asked = {"x": ("a", 0.9), "y": (None, 0.0)}

    def ask_both() -> None:
        for name, (adapter_id, temperature) in asked.items():
            rig.ask(name, adapter_id, temperature=temperature, max_tokens=20)

    ask_both()
    said = rig.run()
    expected = {name: tokens_of(said, name) for name in asked}
    used = {name: done_of(said, name).usage for name in asked}
    ask_both()
    for num_steps in (6, 2, 9):
        for _ in range(num_steps):
            rig.step()
        shaky.num_breaks = 1
    said = rig.run()
    assert {name: tokens_of(said, name) for name in asked} == expected
    assert {name: done_of(said, name).usage for name in asked} == used
    # one that breaks each time ends by itself; another's end is as it was
    shaky.fatal = next(token for token in expected["x"][:-1] if token not in expected["y"])
    ask_both()
    said = rig.run()
    assert one(said, RequestFailed).request_id == "x"
    assert tokens_of(said, "y") == expected["y"]
    shaky.fatal, shaky.num_breaks = None, 10**6
    ask_both()
    ends = [message for message in rig.run() if isinstance(message, RequestFailed)]
    assert {(end.request_id, end.code) for end in ends} == {
        ("x", "out_of_memory"),
        ("y", "out_of_memory"),
    }
    assert all(not tensor.any() for tensor in rig.engine.slots._states.tensors())


def test_a_focussed_answer_that_is_read_again_begins_where_it_began(
    make_rig: Callable[..., Rig], shaky: ShakyModel
) -> None:
    rig = make_rig(shaky, step_tokens=8)
    rig.study("a", TEXTS[0], **REFINE)
    focus = {"steps": 1, "focus_passages": 2, "focus_passage_tokens": 16, "focus_memory": 0.25}
    focus |= {"focus_draft_tokens": 0}

    def answer(*, breaks: bool) -> list[int]:
        rig.ask("x", "a", prompts=[rig.prompt(TEXTS[0][40:60])], focus=focus, max_tokens=20)
        while not any(isinstance(message, TokenDelta) for message in rig.sent):
            rig.step()
        shaky.num_breaks = int(breaks)
        return tokens_of(rig.run())

    expected = answer(breaks=False)
    assert len(expected) > 10
    assert answer(breaks=True) == expected
    assert shaky.num_breaks == 0


def test_running_out_of_memory_halves_the_segment_once(
    make_rig: Callable[..., Rig], faulty: FaultyModel
) -> None:
    rig = make_rig(faulty)
    rig.study("whole", TEXTS[0])
    faulty.longest = 20  # below the segment of 32, above half of it
    assert rig.study("halved", TEXTS[0]).status == "succeeded"
    ends = [rig.engine.cache.acquire(id).state.tensors() for id in ("whole", "halved")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends, strict=True))
    faulty.longest = 10
    tokens = rig.tokenizer.encode(TEXTS[0])
    rig.engine.handle(Adapt(adaptation_id="failed", tokens=tokens, method={"type": "read"}))
    assert one(rig.run(), AdaptationFailed).code == "out_of_memory"


def test_a_broken_quantum_ends_its_own_job_only(
    make_rig: Callable[..., Rig], faulty: FaultyModel
) -> None:
    rig = make_rig(faulty)
    faulty.breaks = True
    good, bad = rig.tokenizer.encode(TEXTS[0]), [7] * 50 + [POISON] + [7] * 50
    for id, tokens in (("bad", bad), ("good", good)):
        rig.engine.handle(Adapt(adaptation_id=id, tokens=tokens, method=REFINE))
    said = rig.run()
    failed = one(said, AdaptationFailed)
    assert (failed.adaptation_id, failed.code) == ("bad", "internal_error")
    assert "kernel" not in failed.message
    assert one(said, AdaptationDone).adaptation_id == "good"


def test_files_that_cannot_be_written_or_read_fail_their_own_job(
    make_rig: Callable[..., Rig], tmp_path: Path
) -> None:
    rig = make_rig(adapter_host_bytes=0)  # every answer loads from disk
    (tmp_path / "store" / "blocked.safetensors").mkdir()
    tokens = rig.tokenizer.encode(TEXTS[0])
    rig.engine.handle(Adapt(adaptation_id="blocked", tokens=tokens, method={"type": "read"}))
    assert one(rig.run(), AdaptationFailed).code == "store_failed"
    rig.study("a", TEXTS[0])
    rig.ask("r", "a")
    assert one(rig.run(), SequenceDone)
    file = tmp_path / "store" / "a.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 1
    file.write_bytes(blob)
    rig.ask("r", "a")
    assert one(rig.run(), RequestFailed).code == "adapter_corrupt"


def test_an_adapter_of_another_model_is_refused(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    adapter = rig.engine.cache.acquire("a")
    adapter.manifest["model_hash"] = "another"
    rig.ask("r", "a")
    assert one(rig.run(), RequestFailed).code == "adapter_corrupt"


def test_work_that_cannot_even_be_taken_in_gets_an_answer(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    method: Any = {"type": ["unhashable"]}
    rig.engine.handle(Adapt(adaptation_id="a", tokens=[5] * 50, method=method))
    assert one(rig.run(), AdaptationFailed).code == "invalid_method"
    with pytest.raises(TypeError):
        rig.engine.handle(Adapt(adaptation_id="b", tokens=[5] * 50, method=None))  # type: ignore[arg-type]
    rig.engine.fail_unit(TypeError())
    assert one(rig.run(), AdaptationFailed) == AdaptationFailed(
        adaptation_id="b", code="internal_error",
        message="the worker failed on this job; its log says why",
    )  # fmt: skip


def test_an_error_from_outside_a_unit_is_not_swallowed(make_rig: Callable[..., Rig]) -> None:
    with pytest.raises(KeyError):
        make_rig().engine.fail_unit(KeyError("a bug"))
