"""Drafts are what the model would answer, and their confidence is what it gives each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from imprint.adapters.calls import run_calls
from imprint.adapters.drafts import Draft, DraftPrompt, LineEnd, write_drafts
from imprint.models import DeltaNet, LoraDelta, RecurrentState, load_tokenizer
from imprint.models.generate import generate_greedy

PROMPTS = ([4, 200, 31], [7, 7, 9, 100, 12, 3, 77], [55])


def never(token: int, so_far: Sequence[int]) -> bool:
    return False


def states(model: DeltaNet) -> list[RecurrentState]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(200, (3, 20), generator=draw)
    with torch.no_grad():
        return [model(row.unsqueeze(0))[1] for row in tokens]


def deltas(model: DeltaNet) -> list[LoraDelta]:
    made = []
    for seed in range(3):
        delta = LoraDelta.init(
            model.lora_targets(), 2, seed=seed, num=1, device="cpu", dtype=torch.float64
        )
        for i, tensor in enumerate(delta.b.values()):
            tensor.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(100 * seed + i))
        made.append(delta)
    return made


@pytest.mark.parametrize("num_tokens", [1, 8, 21])
@pytest.mark.parametrize("with_deltas", [False, True])
def test_they_are_greedy_and_each_as_alone(
    tiny_model64: DeltaNet, num_tokens: int, with_deltas: bool
) -> None:
    model = tiny_model64
    own = deltas(model) if with_deltas else [None] * 3
    prompts = list(map(DraftPrompt, PROMPTS, states(model), own))
    drafts = run_calls(write_drafts(model, prompts, num_tokens=num_tokens, ends=never))
    for prompt, draft in zip(prompts, drafts, strict=True):
        right = generate_greedy(
            model,
            torch.tensor([prompt.tokens]),
            prompt.state,
            num_tokens=num_tokens,
            delta=prompt.delta,
        )[0].tolist()
        assert list(draft.tokens) == right
        assert not draft.ended
        read = torch.tensor([[*prompt.tokens, *right]])
        with torch.no_grad():
            hidden, _ = model(read, prompt.state, delta=prompt.delta)
            log_probs = model.logits(hidden).log_softmax(-1)[0]
        first = len(prompt.tokens) - 1
        wanted = [float(log_probs[first + i, token]) for i, token in enumerate(right)]
        assert draft.log_probs == pytest.approx(wanted, abs=1e-6)
        assert draft.confidence == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)


def test_each_ends_by_itself_and_costs_until_the_last_has(tiny_model: DeltaNet) -> None:
    prompts = [DraftPrompt(p, s, None) for p, s in zip(PROMPTS, states(tiny_model), strict=True)]
    whole = run_calls(write_drafts(tiny_model, prompts, num_tokens=20, ends=never))
    lengths = {whole[0].tokens[0]: 1, whole[1].tokens[0]: 3, whole[2].tokens[0]: 11}
    assert len(lengths) == 3

    def ends(token: int, so_far: Sequence[int]) -> bool:
        return len(so_far) + 1 == lengths[(*so_far, token)[0]]

    costs = []
    drafts = run_calls(
        write_drafts(tiny_model, prompts, num_tokens=20, ends=ends), lambda work: costs.append(work)
    )
    for draft, full in zip(drafts, whole, strict=True):
        num = lengths[full.tokens[0]]
        assert draft.ended
        assert draft.tokens == full.tokens[:num]
        assert draft.log_probs == full.log_probs[:num]
    # the prompts, then 8 and 8 tokens of three drafts, of which the longest has 11
    assert [work.num_tokens for work in costs] == [3, 7, 1, 24, 24]


def test_what_is_not_finite_is_least_sure() -> None:
    assert Draft((1, 2), (-0.5, math.nan)).confidence == -math.inf
    assert Draft((1, 2), (-0.5, -1.5)).confidence == -1.0


def test_a_line_ends_after_some_text(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    ends = LineEnd(tokenizer)
    newline, space, letter = (tokenizer.encode(text)[0] for text in ("\n", " ", "a"))
    assert ends(tokenizer.eos_id, [])
    assert not ends(newline, [])
    assert not ends(newline, [space, newline])
    assert not ends(letter, [letter])
    assert ends(newline, [newline, letter])
