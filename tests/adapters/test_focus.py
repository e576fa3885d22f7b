"""Focus: each question alone, whatever else is asked and however long the document is."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.document import DocumentReader
from imprint.adapters.errors import ConfigError
from imprint.adapters.focus import Focus
from imprint.adapters.refine import Refiner
from imprint.models import DeltaNet, LoraDelta, weights_hash
from imprint.models.generate import generate_greedy

QUESTIONS = [list(range(40, 52)), [7, 7, 9], [200, 3, 77, 81, 12]]


@pytest.fixture(scope="module")
def config(small: RefineConfig) -> RefineConfig:
    """Without drafts: what a random model is surer of says nothing."""
    return small.replace(
        scope="query_lora", branches="recall", learning_rate=5e-3, focus_draft_tokens=0
    )


@pytest.fixture(scope="module")
def adapter64(tiny_model64: DeltaNet, document: list[int]) -> Adapter:
    reader = DocumentReader(tiny_model64, document, segment_tokens=64)
    list(reader.run())
    assert reader.adapter is not None
    return reader.adapter


def focused(
    model: DeltaNet, adapter: Adapter, questions: list[list[int]], config: RefineConfig, **kwargs
) -> Focus:
    focus = Focus(model, adapter, questions, config, **kwargs)
    list(focus.run())
    assert len(focus.deltas) == len(focus.results) == len(focus.adapted) == len(questions)
    return focus


def one_delta(focus: Focus) -> LoraDelta:
    """Those of all questions; nothing is zeros."""
    delta = LoraDelta.padded(focus.deltas)
    assert delta is not None
    return delta


def from_document(document: list[int]) -> list[list[int]]:
    """Questions in the document's own words, so that focusing on them helps."""
    return [document[11:16], document[20:23], document[3:9]]


@pytest.mark.parametrize("segment_tokens", [16, 64, 4096])  # batches of parts, of one, of all
@pytest.mark.parametrize("group_size", [1, 2])
def test_several_questions_equal_each_alone(
    tiny_model64: DeltaNet,
    adapter64: Adapter,
    document: list[int],
    config: RefineConfig,
    segment_tokens: int,
    group_size: int,
) -> None:
    config = config.replace(segment_tokens=segment_tokens, group_size=group_size)
    questions = from_document(document)
    together = focused(tiny_model64, adapter64, questions, config, seed=5)
    for i, question in enumerate(questions):
        alone = focused(tiny_model64, adapter64, [question], config, seed=5)
        own, theirs = together.deltas[i], alone.deltas[0]
        assert (own is None) == (theirs is None)
        pairs = () if own is None else zip(own.parameters(), theirs.parameters(), strict=True)
        for got, right in pairs:
            torch.testing.assert_close(got, right, rtol=0, atol=1e-6)
        mine, single = together.results[i], alone.results[0]
        assert (mine.adapted, mine.steps, mine.reason) == (
            single.adapted,
            single.steps,
            single.reason,
        )
        for name in ("probe_before", "probe_after", "reward_first", "reward_last"):
            assert getattr(mine, name) == pytest.approx(getattr(single, name), abs=1e-6)


def test_focusing_on_the_documents_words_helps(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(steps=8, positions=8, learning_rate=2e-2)
    focus = focused(tiny_model, read_adapter, from_document(document), config)
    assert all(result.adapted for result in focus.results)
    for result in focus.results:
        assert result.probe_after is not None
        assert result.probe_before is not None
        assert result.probe_after < result.probe_before - 0.5
        assert result.to_dict()["steps"] == 8
        assert result.to_dict()["alpha"] == 1.0
    assert all(bool(b.any()) for b in one_delta(focus).b.values())
    assert focus.adapted == [True] * 3


def test_cost_does_not_depend_on_the_documents_length(
    tiny_model: DeltaNet, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(blend_factors=(0.5,))  # how many are probed is the gate's to say
    usages = []
    for text in (document, document * 8):
        reader = DocumentReader(tiny_model, text, segment_tokens=64)
        list(reader.run())
        assert reader.adapter is not None
        focus = focused(tiny_model, reader.adapter, from_document(document), config)
        usages.append(focus.usage.to_dict())
    assert usages[0] == usages[1]
    assert all(count > 0 for count in usages[0].values())


def test_usage_is_what_the_quanta_say(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig
) -> None:
    focus = Focus(tiny_model, read_adapter, QUESTIONS, config)
    quanta = list(focus.run())
    assert sum(quantum.num_tokens for quantum in quanta) == sum(focus.usage.to_dict().values())
    steps = [quantum.event for quantum in quanta if quantum.event]
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert {"ntp_loss", "reward_mean"} <= set(steps[0])


def test_same_seed_is_bit_for_bit_the_same(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(steps=8, positions=8, learning_rate=2e-2)
    questions = from_document(document)
    runs = [focused(tiny_model, read_adapter, questions, config, seed=s) for s in (1, 1, 2)]
    first, second, other = (one_delta(run).parameters() for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert runs[0].results == runs[1].results


def test_neither_model_nor_adapter_changes(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    refiner = Refiner(tiny_model, document, config, seed=3)
    list(refiner.run())
    adapted = refiner.adapter
    assert adapted is not None
    for adapter in (read_adapter, adapted):
        before = {name: tensor.clone() for name, tensor in adapter.to_tensors().items()}
        weights = weights_hash(tiny_model)
        focused(tiny_model, adapter, QUESTIONS, config)
        assert weights_hash(tiny_model) == weights
        for name, tensor in adapter.to_tensors().items():
            assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_the_first_blend_that_is_accepted_is_kept(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(steps=8, positions=8, learning_rate=2e-2)
    whole, half = (
        focused(
            tiny_model,
            read_adapter,
            from_document(document),
            config.replace(blend_factors=factors),
        )
        for factors in ([1.0], [0.5])
    )
    gains = [r.probe_before - r.probe_after for r in half.results]  # type: ignore[operator]
    # what only a whole delta brings is out of reach of half of it
    margin = 1.001 * max(gains)
    between = config.replace(blend_factors=[0.5, 1.0], probe_margin=margin, probe_confidence=0)
    focus = focused(tiny_model, read_adapter, from_document(document), between)
    assert {result.alpha for result in whole.results} == {1.0}
    assert {result.alpha for result in half.results} == {0.5}
    assert {result.alpha for result in focus.results} == {1.0}
    whole_delta = one_delta(whole)
    for got, right in zip(one_delta(focus).parameters(), whole_delta.parameters(), strict=True):
        assert torch.equal(got, right)
    for name, b_QOR in one_delta(half).b.items():  # what it started from is zero
        torch.testing.assert_close(b_QOR, whole_delta.b[name] / 2)


def studied(adapter: Adapter, model: DeltaNet, scope: str) -> Adapter:
    """The same, with a delta as a study of this scope may leave it."""
    own = LoraDelta.init(model.lora_targets(), 2, seed=9)
    for tensor in own.b.values():
        tensor.fill_(0.01)
    manifest = {**adapter.manifest, "config": {"scope": scope}}
    return dataclasses.replace(adapter, delta=own, manifest=manifest)


@pytest.mark.parametrize("scope", ["query_lora", "lora"])
def test_refused_questions_keep_what_the_adapter_had(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig, scope: str
) -> None:
    refuses_all = config.replace(probe_margin=100.0, focus_passages=0)
    focus = focused(tiny_model, read_adapter, QUESTIONS, refuses_all)
    assert not any(result.adapted for result in focus.results)
    assert (focus.deltas, focus.adapted) == ([None] * 3, [False] * 3)

    adapter = studied(read_adapter, tiny_model, scope)
    focus = focused(tiny_model, adapter, QUESTIONS, refuses_all)
    assert not any(result.adapted for result in focus.results)
    assert all(delta is adapter.delta for delta in focus.deltas)
    assert focus.adapted == [True] * 3


def test_a_studied_document_is_studied_for_questions_as_if_it_had_only_been_read(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(focus_passages=2, focus_passage_tokens=8)
    adapter, questions = studied(read_adapter, tiny_model, "query_lora"), from_document(document)
    before = adapter.delta.clone()  # type: ignore[union-attr]
    for settings in (config, config.replace(probe_margin=100.0)):
        plain = focused(tiny_model, read_adapter, questions, settings)
        focus = focused(tiny_model, adapter, questions, settings)
        assert focus.passages == plain.passages
        assert focus.results == plain.results
        assert focus.adapted == plain.adapted == [result.adapted for result in plain.results]
        for mine, theirs in zip(focus.deltas, plain.deltas, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
                assert all(torch.equal(one, other) for one, other in pairs)
    assert adapter.delta is not None
    for now, then in zip(adapter.delta.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)


def test_a_document_that_was_read_with_its_delta_is_asked_with_it(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(focus_passages=2, focus_passage_tokens=8)
    adapter = studied(read_adapter, tiny_model, "lora")
    rank = 2 + config.lora_rank
    focus = focused(tiny_model, adapter, from_document(document), config.replace(steps=8))
    assert focus.adapted == [True] * 3
    for delta, result in zip(focus.deltas, focus.results, strict=True):
        assert delta is not None
        assert delta.rank == rank if result.adapted else delta is adapter.delta


def test_what_a_study_left_answers_where_its_draft_is_best(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(focus_passages=2, focus_passage_tokens=8, focus_draft_tokens=9)
    adapter = studied(read_adapter, tiny_model, "query_lora")
    questions = [document[i : i + 5] for i in range(12)]
    focus = focused(tiny_model, adapter, questions, config)
    plain = focused(tiny_model, read_adapter, questions, config)
    assert len({result.way for result in focus.results}) > 1
    for i, result in enumerate(focus.results):
        for way in ("focus", "passages"):
            # of another number of drafts in a batch: the same up to rounding
            assert result.drafts[way] == pytest.approx(plain.results[i].drafts[way], abs=1e-4)
        read = pytest.approx(plain.results[i].drafts["document"], abs=1e-4)
        assert result.drafts["document"] != read
        assert result.drafts["base"] == read
        left = result.way == "document"
        assert (focus.deltas[i] is adapter.delta) == left
        assert focus.adapted[i] == (result.adapted or left)


def test_a_delta_that_breaks_is_refused(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig
) -> None:
    broken = LoraDelta.init(tiny_model.lora_targets(), 2, seed=9)
    next(iter(broken.b.values())).fill_(float("nan"))
    adapter = dataclasses.replace(read_adapter, delta=broken)
    focus = focused(tiny_model, adapter, QUESTIONS, config)
    assert not any(result.adapted for result in focus.results)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 9])
def test_tiny_documents_end_clearly(
    tiny_model: DeltaNet, config: RefineConfig, num_tokens: int
) -> None:
    reader = DocumentReader(tiny_model, list(range(num_tokens)), segment_tokens=64)
    list(reader.run())
    assert reader.adapter is not None
    focus = focused(tiny_model, reader.adapter, QUESTIONS, config)
    assert len(focus.results) == 3
    if num_tokens <= config.rollout_length:
        assert [result.reason for result in focus.results] == ["the document is too short"] * 3
        assert focus.deltas == [None] * 3


@pytest.mark.parametrize("question", [[], [0], [256] * 300])
def test_any_question_will_do(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig, question: list[int]
) -> None:
    assert len(focused(tiny_model, read_adapter, [question], config).results) == 1


def test_next_token_loss_alone_rolls_nothing_out(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig
) -> None:
    focus = focused(tiny_model, read_adapter, QUESTIONS, config.replace(lambda_rl=0))
    assert focus.usage.rollout_tokens == 0
    assert focus.results[0].reward_first is None


def test_unusable_settings_are_named(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig
) -> None:
    for field, value in (("scope", "lora"), ("branches", "continue")):
        with pytest.raises(ConfigError) as error:
            Focus(tiny_model, read_adapter, QUESTIONS, config.replace(**{field: value}))
        assert error.value.field == field
    with pytest.raises(ValueError, match="at least one question"):
        Focus(tiny_model, read_adapter, [], config)


def test_runs_the_same_where_the_caller_switched_gradients_off(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(steps=8, positions=8, learning_rate=2e-2)
    questions = from_document(document)
    right = one_delta(focused(tiny_model, read_adapter, questions, config))
    focus = Focus(tiny_model, read_adapter, questions, config)
    with torch.no_grad():
        for _ in focus.run():
            assert not torch.is_grad_enabled()
    for got, expected in zip(one_delta(focus).parameters(), right.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_passages_are_the_documents_own_and_each_questions_own(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(focus_passages=2, focus_passage_tokens=8)
    questions = [document[30:36], document[8:14]]
    focus = focused(tiny_model, read_adapter, questions, config, line_break=[5])
    text = " ".join(map(str, document))
    for passages, question, result in zip(focus.passages, questions, focus.results, strict=True):
        pieces = [passages[i : i + 9] for i in range(0, len(passages), 9)]
        assert all(piece[0] == 5 and len(piece) == 9 for piece in pieces)
        assert all(" ".join(map(str, piece[1:])) in text for piece in pieces)
        assert any(question[-1] in piece[1:] for piece in pieces)
        assert result.passage_tokens == len(passages)
    assert focus.passages[0] != focus.passages[1]
    none = focused(tiny_model, read_adapter, questions, config.replace(focus_passages=0))
    assert none.passages == [[], []]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_answers_begin_from_a_fainter_memory_where_passages_are_read(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig,
    share: float,
) -> None:  # fmt: skip
    config = config.replace(focus_passages=2, focus_passage_tokens=8, focus_memory=share)
    focus = focused(tiny_model, read_adapter, [document[30:36], document[8:14]], config)
    assert focus.memory_shares == [share, share]
    none = focused(tiny_model, read_adapter, QUESTIONS, config.replace(focus_passages=0))
    assert none.memory_shares == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_question_is_answered_in_the_way_whose_draft_is_best(
    tiny_model: DeltaNet,
    read_adapter: Adapter,
    document: list[int],
    config: RefineConfig,
    weight: float,
) -> None:
    config = config.replace(focus_passages=2, focus_passage_tokens=8)
    questions = [document[i : i + 5] for i in range(12)]
    without = focused(tiny_model, read_adapter, questions, config)
    assert all(result.drafts == {} for result in without.results)
    drafted = config.replace(focus_draft_tokens=9, segment_tokens=28, focus_draft_grounding=weight)
    focus = focused(
        tiny_model, read_adapter, questions, drafted, ends=lambda token, so_far: len(so_far) == 6
    )
    for i, result in enumerate(focus.results):
        read, end = without.passages[i], read_adapter.state
        ways = {
            "focus": (read, tiny_model.faded(end, config.focus_memory), without.deltas[i]),
            "passages": (read, tiny_model.faded(end, 0.0), None),
            "document": ([], end, None),
        }
        assert set(result.drafts) == set(ways)
        worth = {}
        for way, (passages, state, delta) in ways.items():
            asked = torch.tensor([[*passages, *questions[i]]])
            answer = generate_greedy(tiny_model, asked, state, num_tokens=7, delta=delta)
            with torch.no_grad():
                both = torch.cat((asked, answer), 1)
                hidden, _ = tiny_model(both, state, delta=delta)
                log_probs = tiny_model.logits(hidden[0, asked.shape[1] - 1 : -1]).log_softmax(-1)
            confidence = float(log_probs.gather(1, answer.T).mean())
            text = answer[0, :-1].tolist()  # the last token ends it
            runs = {tuple(text[at : at + 4]) for at in range(3)}
            copied = [run for run in runs if stands_in(run, document, questions[i])]
            assert result.drafts[way]["confidence"] == pytest.approx(confidence, abs=1e-4)
            assert result.drafts[way]["grounding"] == len(copied)
            worth[way] = confidence + weight * math.log(1 + len(copied))
        assert worth[result.way] == pytest.approx(max(worth.values()), abs=1e-3)
        passages, state, delta = ways[result.way]
        assert focus.passages[i] == passages
        assert focus.deltas[i] is delta or result.way == "focus"
        faded = tiny_model.faded(end, focus.memory_shares[i])
        pairs = zip(faded.tensors(), state.tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        expected = without.results[i]
        if result.way == "focus":
            assert (result.adapted, result.reason) == (expected.adapted, expected.reason)
        else:
            assert not result.adapted
            assert "draft" in result.reason
        assert result.passage_tokens == len(passages)
        assert result.accepted == expected.accepted == expected.adapted
    assert len({result.way for result in focus.results}) > 1


def stands_in(run: tuple[int, ...], document: list[int], question: list[int]) -> bool:
    """Whether these tokens follow each other in the document, and nowhere in the question."""
    found = [
        any(tuple(tokens[i : i + len(run)]) == run for i in range(len(tokens)))
        for tokens in (document, question)
    ]
    return found == [True, False]


def test_a_focus_without_steps_compares_what_a_study_left_with_what_was_read(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int]
) -> None:
    config = RefineConfig.preset("drafts", focus_draft_tokens=9)
    questions = [document[i : i + 5] for i in range(12)]
    plain = focused(tiny_model, read_adapter, questions, config)
    assert (plain.deltas, plain.memory_shares) == ([None] * 12, [1.0] * 12)
    for result in plain.results:
        assert (result.way, result.drafts, result.steps) == ("document", {}, 0)
        assert result.reason == "nothing was to be learnt"
    adapter = studied(read_adapter, tiny_model, "query_lora")
    focus = focused(tiny_model, adapter, questions, config)
    for i, result in enumerate(focus.results):
        assert set(result.drafts) == {"document", "base"}
        kept = result.way == "document"
        assert focus.deltas[i] is (adapter.delta if kept else None)
        assert focus.adapted[i] == kept
        assert focus.passages[i] == []
        assert result.reason == (
            "nothing was to be learnt"
            if kept
            else "a draft without the document's study was better"
        )
    assert len({result.way for result in focus.results}) == 2
    # one that was read with its delta cannot do without
    of_lora = focused(tiny_model, studied(read_adapter, tiny_model, "lora"), questions, config)
    assert all(result.drafts == {} for result in of_lora.results)


def test_passages_are_read_again_without_a_step_too(
    tiny_model: DeltaNet, read_adapter: Adapter, document: list[int], config: RefineConfig
) -> None:
    config = config.replace(focus_passages=2, focus_passage_tokens=8, steps=0)
    focus = focused(tiny_model, read_adapter, from_document(document), config)
    assert all(focus.passages)
    assert [result.way for result in focus.results] == ["focus"] * 3
    assert (focus.deltas, focus.adapted) == ([None] * 3, [False] * 3)


def test_no_draft_is_written_where_nothing_was_done(
    tiny_model: DeltaNet, read_adapter: Adapter, config: RefineConfig
) -> None:
    config = config.replace(focus_passages=0, probe_margin=100.0, focus_draft_tokens=9)
    quanta = list((focus := Focus(tiny_model, read_adapter, QUESTIONS, config)).run())
    assert {quantum.phase for quantum in quanta} >= {"select", "probe"}
    assert "draft" not in {quantum.phase for quantum in quanta}
    assert all(result.drafts == {} for result in focus.results)
