"""The engine on a tiny random model: what it answers, what a study tells, and the text of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from imprint.adapters.config import RefineConfig
from imprint.adapters.focus import WAYS
from imprint.adapters.relevance import Relevance
from imprint.models import prefill
from imprint.models.generate import generate_greedy
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationEvent,
    AdaptationStarted,
    FocusProgress,
    RequestFailed,
    SequenceDone,
    TokenDelta,
)
from imprint.server.metrics import ZEROS
from imprint.server.reply_schemas import FocusOutcome, Way
from support.engine_rig import REFINE, TEXTS, Rig, one, tokens_of


def test_a_completion_equals_plain_generation(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    prompt = rig.prompt("The ship sailed at dawn, " * 4)  # several pieces of prefill
    rig.ask("r", prompts=[prompt], max_tokens=12)
    said = rig.run()
    expected = generate_greedy(rig.model, torch.tensor([prompt.tokens]), None, num_tokens=12)
    done = one(said, SequenceDone)
    assert tokens_of(said) == expected[0].tolist()
    assert done.finish_reason == "length"
    assert done.usage == {"prompt_tokens": 100, "completion_tokens": 12, "document_tokens": 0}
    assert not done.adapted
    assert rig.engine.slots.table.num_used == 0


def test_an_answer_continues_from_the_document_end(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    question = rig.prompt("Where is it?")
    assert rig.study("adp_1", TEXTS[0]).status == "succeeded"
    rig.ask("r", "adp_1", prompts=[question])
    said = rig.run()
    _, state = prefill(rig.model, torch.tensor([rig.tokenizer.encode(TEXTS[0])]))
    expected = generate_greedy(rig.model, torch.tensor([question.tokens]), state, num_tokens=8)
    assert tokens_of(said) == expected[0].tolist()
    assert one(said, SequenceDone).usage["document_tokens"] == len(TEXTS[0])


def test_an_adaptation_tells_its_story(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.engine.handle(
        Adapt(adaptation_id="a", tokens=rig.tokenizer.encode(TEXTS[0]), method=REFINE, attempt=2)
    )
    said = rig.run()
    assert said[0] == AdaptationStarted(adaptation_id="a", attempt=2)
    events = [message for message in said if isinstance(message, AdaptationEvent)]
    steps = [event.data for event in events if event.kind == "step"]
    assert [data["step"] for data in steps] == [1, 2]
    assert all(math.isfinite(data["ntp_loss"]) for data in steps)
    assert events[0].kind == "progress"
    assert events[0].data["phase"] == "read"
    done = one(said, AdaptationDone)
    assert done.status == "succeeded"
    assert done.result["accepted"]
    assert done.result["num_tokens"] == len(TEXTS[0])
    assert done.usage["tokens_forward"] > len(TEXTS[0])
    rig.ask("r", "a")
    assert one(rig.run(), SequenceDone).adapted


def test_a_refused_study_is_rejected_and_its_reading_still_answers(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    done = rig.study("a", TEXTS[0], **{**REFINE, "probe_margin": 100.0})
    assert done.status == "rejected"
    rig.study("b", TEXTS[0])
    rig.ask("ra", "a")
    answers = rig.run()
    rig.ask("rb", "b")
    assert tokens_of(answers, "ra") == tokens_of(rig.run(), "rb")
    assert not one(answers, SequenceDone).adapted


def test_each_question_decodes_with_its_own_focus(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    focus = {"steps": 2, "lora_rank": 2, "learning_rate": 0.05, "probe_confidence": 0.0}
    focus |= {"positions": 4, "rollout_length": 8, "focus_draft_tokens": 0}
    questions = ["Where is the key?", "Who saw it? The dog?"]
    prompts = [rig.prompt(question, f"q{i}") for i, question in enumerate(questions)]
    rig.ask("both", "a", prompts=prompts, focus=focus)
    both = rig.run()
    progress = [message for message in both if isinstance(message, FocusProgress)]
    assert [(message.step, message.steps) for message in progress] == [(1, 2), (2, 2)]
    done = [message for message in both if isinstance(message, SequenceDone)]
    assert all(message.adapted and message.focus is not None for message in done)
    for i, prompt in enumerate(prompts):
        rig.ask(f"one{i}", "a", prompts=[prompt], focus=focus)
        assert tokens_of(rig.run(), f"q{i}") == tokens_of(both, f"q{i}")
    assert rig.engine.stats().requests_waiting == rig.engine.stats().slots_used == 0


@pytest.mark.parametrize("num_passages", [2, 0])
def test_passages_of_a_focus_are_read_before_the_prompt(
    make_rig: Callable[..., Rig], num_passages: int
) -> None:
    rig = make_rig()
    document = rig.tokenizer.encode(TEXTS[0])
    rig.study("a", TEXTS[0])
    question = rig.prompt(f"Where? {TEXTS[0][40:60]}")
    focus = {"steps": 1, "focus_passages": num_passages, "focus_passage_tokens": 16}
    # the gate refuses the delta: what is left is the reading, whatever the model is surer of
    focus |= {"probe_margin": 100.0, "focus_draft_tokens": 0}
    rig.ask("r", "a", prompts=[question], focus=focus)
    said = rig.run()
    preset = RefineConfig.preset("focus")
    relevance = Relevance(document, question.tokens, window=preset.focus_window)
    read = [
        token
        for start in relevance.passages(num_passages, 16, repeat=preset.focus_repeat)
        for token in (*rig.tokenizer.encode("\n"), *document[start : start + 16])
    ]
    assert len(read) == num_passages * 17
    _, state = prefill(rig.model, torch.tensor([document]))
    if num_passages:
        state = rig.model.faded(state, preset.focus_memory)
    prompt = torch.tensor([[*read, *question.tokens]])
    assert tokens_of(said) == generate_greedy(rig.model, prompt, state, num_tokens=8)[0].tolist()
    done = one(said, SequenceDone)
    assert (done.adapted, done.focus["passage_tokens"]) == (False, len(read))
    assert done.usage["prompt_tokens"] == len(question.tokens)


FOCUS = {"steps": 2, "learning_rate": 0.1, "focus_passages": 2, "focus_passage_tokens": 16}
BY_WAY: dict[str, dict[str, Any]] = {
    "focus": {**FOCUS, "focus_draft_tokens": 0},
    # the gate refuses what was learnt, and nothing of the memory is left
    "passages": {**FOCUS, "focus_draft_tokens": 0, "probe_margin": 100.0, "focus_memory": 0.0},
}


def test_a_question_is_answered_in_the_way_whose_draft_is_best(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    ways = {**BY_WAY, "document": None, "drafted": {**FOCUS, "focus_draft_grounding": 0.2}}
    used = []
    for i in range(12):
        prompts = [rig.prompt(TEXTS[0][5 * i : 5 * i + 20])]
        said = {}
        for way, asked in ways.items():
            rig.ask(f"{way}{i}", "a", prompts=prompts, focus=asked)
            said[way] = rig.run()
        done = one(said["drafted"], SequenceDone)
        worth = {
            way: draft["confidence"] + 0.2 * math.log(1 + draft["grounding"])
            for way, draft in done.focus["drafts"].items()
        }
        best = max(worth, key=lambda way: worth[way])
        assert set(worth) == {"focus", "passages", "document"}
        assert done.focus["way"] == best
        used.append(best)
        assert tokens_of(said["drafted"]) == tokens_of(said[best])
        assert best == "focus" or not done.adapted
        assert (done.focus["passage_tokens"] > 0) == (best != "document")
        focus = one(said["focus"], SequenceDone).focus
        assert (focus["way"], focus["drafts"]) == ("focus", {})
    assert len(set(used)) > 1


def test_focus_begins_from_what_was_read_also_where_it_was_studied(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    rig.study("read", TEXTS[0])
    assert rig.study("studied", TEXTS[0], **{**REFINE, "scope": "query_lora"}).status == "succeeded"
    prompts = [rig.prompt(TEXTS[0][10:30])]
    said = {}
    for adapter in ("read", "studied"):
        for way, asked in {**BY_WAY, "document": None, "drafted": FOCUS}.items():
            rig.ask(f"{adapter} {way}", adapter, prompts=prompts, focus=asked)
            said[f"{adapter} {way}"] = rig.run()
    assert tokens_of(said["studied focus"]) == tokens_of(said["read focus"])
    first, second = (one(said[f"{name} focus"], SequenceDone) for name in ("read", "studied"))
    assert (first.adapted, first.focus) == (second.adapted, second.focus)
    assert tokens_of(said["studied document"]) != tokens_of(said["read document"])
    done = one(said["studied drafted"], SequenceDone)
    way = done.focus["way"]
    said["studied base"] = said["read document"]
    assert set(done.focus["drafts"]) == {"focus", "passages", "document", "base"}
    assert tokens_of(said["studied drafted"]) == tokens_of(said[f"studied {way}"])
    assert done.adapted == (first.adapted if way == "focus" else way == "document")


def test_a_studys_answers_can_be_compared_with_those_of_the_base_alone(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    rig.study("read", TEXTS[0])
    rig.study("studied", TEXTS[0], **{**REFINE, "scope": "query_lora"})
    used = set()
    for i in range(10):
        prompts = [rig.prompt(TEXTS[0][5 * i : 5 * i + 20])]
        said = {}
        for adapter in ("read", "studied"):
            for asked in (None, {"preset": "drafts", "focus_draft_grounding": 0.1}):
                name = f"{adapter} {'drafts' if asked else 'plain'}"
                rig.ask(f"{name}{i}", adapter, prompts=prompts, focus=asked)
                said[name] = rig.run()
        assert tokens_of(said["read drafts"]) == tokens_of(said["read plain"])
        nothing = one(said["read drafts"], SequenceDone).focus
        assert (nothing["way"], nothing["steps"], nothing["drafts"]) == ("document", 0, {})
        done = one(said["studied drafts"], SequenceDone)
        assert set(done.focus["drafts"]) == {"document", "base"}
        way = done.focus["way"]
        used.add(way)
        assert done.adapted == (way == "document")
        plain = {"document": "studied plain", "base": "read plain"}[way]
        assert tokens_of(said["studied drafts"]) == tokens_of(said[plain])
    assert used == {"document", "base"}


def test_a_draft_that_breaks_is_the_worst_and_can_be_told(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0], **{**REFINE, "scope": "query_lora"})
    delta = rig.engine.cache.acquire("a").delta
    assert delta is not None
    next(iter(delta.b.values())).fill_(math.nan)
    rig.ask("r", "a", focus={"preset": "drafts"})
    done = one(rig.run(), SequenceDone)
    told = FocusOutcome.model_validate(done.focus)
    assert (told.way, told.drafts["document"].confidence) == ("base", None)
    assert told.drafts["base"].confidence is not None


def test_ways_have_the_same_names_everywhere() -> None:
    assert get_args(Way) == WAYS == ZEROS["focus_answers_total"]


@pytest.mark.parametrize(
    ("focus", "adapter_id", "names"),
    [
        ({"stepz": 2}, "a", "stepz"),
        ({"scope": "lora"}, "a", "scope"),
        ({}, None, "focus needs an adapter"),
    ],
)
def test_an_impossible_focus_is_refused_by_name(
    make_rig: Callable[..., Rig], focus: dict[str, Any], adapter_id: str | None, names: str
) -> None:
    rig = make_rig()
    rig.study("a", TEXTS[0])
    rig.ask("r", adapter_id, focus=focus)
    failed = one(rig.run(), RequestFailed)
    assert failed.code == "invalid_method"
    assert names in failed.message


# ---- text ------------------------------------------------------------------------------------


def test_text_has_whole_characters_and_stops_at_stop_strings(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.ask("r", max_tokens=200, temperature=1.5)
    said = rig.run()
    text = "".join(m.text for m in said if isinstance(m, TokenDelta | SequenceDone))
    tokens = tokens_of(said, "r")
    assert len(text) > 40
    assert rig.tokenizer.decode(tokens).startswith(text)
    stop = text[20:23]
    rig.ask(
        "s", prompts=[rig.prompt("Where is it?", "s")], max_tokens=200, temperature=1.5, stop=[stop]
    )
    said = rig.run()
    shown = "".join(m.text for m in said if isinstance(m, TokenDelta | SequenceDone))
    done = one(said, SequenceDone)
    assert shown == text[: text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.usage["completion_tokens"] < len(tokens)


def test_what_a_batch_has_generated_is_one_message(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(step_tokens=128)  # all prompts in one step
    names = ("a", "b", "c")
    rig.ask("r", prompts=[rig.prompt("Where is it?", name) for name in names], max_tokens=5)
    rig.ask("q", max_tokens=5)
    said = rig.run()
    assert [len(tokens_of(said, name)) for name in (*names, "q")] == [5, 5, 5, 5]
    assert sum(isinstance(message, SequenceDone) for message in said) == 4
    assert rig.num_batches == 5  # of at least four tokens each


# ---- ends ------------------------------------------------------------------------------------
