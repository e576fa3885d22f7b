"""Studies a document for known questions: they choose the positions, each has a delta of its own.
They also choose passages, which are read once more before the question is. Drafts of the answer
then choose what it is answered from: all of this, the passages alone, or the document as before.

Works from the document-end state alone, with recall branches in scope `query_lora`: a step costs
some hundred tokens per question whatever the document's length, and so do the passages.
Shapes: Q = questions, N = positions of a question, T = document tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.branches import query_step
from imprint.adapters.calls import AloneCall, Work, ask
from imprint.adapters.config import RefineConfig, check_focus
from imprint.adapters.delta import init_delta, make_optimizer
from imprint.adapters.drafts import DraftPrompt, Ends, write_drafts
from imprint.adapters.gate import ProbeResult, judge, probe_call
from imprint.adapters.grounding import Grounding
from imprint.adapters.loss import clip_grads_per_delta
from imprint.adapters.policy import StepResult
from imprint.adapters.quantum import Quanta, Quantum, Study, Usage, quanta_alone
from imprint.adapters.relevance import Relevance
from imprint.adapters.selection import focus_positions
from imprint.adapters.similarity import Similarity, check_reward
from imprint.models.architecture import FastWeightModel
from imprint.models.lora import LoraDelta

_PROBE_STEP = (1 << 19) - 1  # a step no run reaches
FOCUS, PASSAGES, DOCUMENT, BASE = WAYS = "focus", "passages", "document", "base"
"""What a question is answered from: passages after the faded document, with what was learnt for the
question; the same passages alone; the document without either; the document without what its own
study left, either. Drafts that are as good as one another leave the first."""
_REASONS = {
    PASSAGES: "a draft from the passages alone was better",
    DOCUMENT: "a draft without it was better",
    BASE: "a draft without the document's study was better",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FocusResult:
    """What focusing did for one question. Probes are in nats per token at relevant places."""

    adapted: bool
    """Whether the question is answered with what was learnt for it."""
    accepted: bool
    """What the gate said of that, whatever the drafts chose."""
    steps: int
    alpha: float | None
    """How far towards what was learnt the delta went; None where nothing was kept."""
    probe_before: float | None
    probe_after: float | None
    reward_first: float | None
    reward_last: float | None
    passage_tokens: int
    """Document tokens that are read again before the question, whatever the gate says."""
    way: str
    """One of `WAYS`: what the question is answered from."""
    drafts: dict[str, dict[str, float]]
    """By way, of the draft that was written so: `confidence`, the mean log-probability of its
    tokens in nats, and `grounding`, how many of its runs of tokens the document has. Empty
    where no draft was written."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As it stands in an answer's `focus`."""
        values = dataclasses.asdict(self)
        del values["adapted"], values["accepted"]
        return values


class Focus:
    """One focus run for Q questions about one adapter; then `deltas` and `results` are set."""

    def __init__(
        self,
        model: FastWeightModel,
        adapter: Adapter,
        questions: Sequence[Sequence[int]],
        config: RefineConfig,
        *,
        seed: int = 0,
        similarity: Similarity | None = None,
        line_break: Sequence[int] = (),
        ends: Ends = lambda token, so_far: False,
    ) -> None:
        """`line_break`: tokens before each passage that is read again. `ends`: of drafts."""
        check_focus(config)
        check_reward(config, similarity)
        self._similarity = similarity
        self._line_break, self._ends = list(line_break), ends
        if not questions:
            raise ValueError("focus needs at least one question")
        self.model, self.adapter, self.config, self.seed = model, adapter, config, seed
        self.questions = [list(question) for question in questions]
        self.usage = Usage()
        self.deltas: list[LoraDelta | None] = []
        """Each question's. The adapter's own object where nothing was done for it."""
        self.results: list[FocusResult] = []
        self.passages: list[list[int]] = []
        """What is read before each question's prompt, from the document's end, faded to its
        share of `memory_shares`: the passages that have to do with it, in the document's order."""

    @property
    def memory_shares(self) -> list[float]:
        """How much of its strength the memory keeps before the answer to each question: all of it
        where no passages are read. States are large, so whoever needs one fades it then."""
        return [self._share(result.way, i) for i, result in enumerate(self.results)]

    def _share(self, way: str, i: int) -> float:
        if way == PASSAGES:
            return 0.0
        return self.config.focus_memory if way == FOCUS and self.passages[i] else 1.0

    @property
    def adapted(self) -> list[bool]:
        """Whether each question is answered with what a study has changed: its own or the
        document's."""
        ways = [DOCUMENT] if self.adapter.read_by_base else [DOCUMENT, FOCUS]
        return [
            result.adapted or (self.adapter.adapted and result.way in ways)
            for result in self.results
        ]

    def run(self) -> Quanta:
        """`study`, with each call run alone; yields a quantum for each."""
        return quanta_alone(self.study())

    def study(self) -> Study[None]:
        """Step for all questions at once, then judge each, then draft each answer."""
        yield from self._learn()
        if self.config.focus_draft_tokens:
            yield from self._compare()

    def _learn(self) -> Study[None]:
        scores: list[Tensor] = []
        for question in self.questions:
            call = AloneCall(Work("select"), partial(self._relevant, question))
            score_T, passages = yield from self.usage.run(ask(call), 0, self.config.steps)
            scores.append(score_T)
            self.passages.append(passages)
        probe_QN = self._positions(scores, _PROBE_STEP)
        if probe_QN.shape[1] == 0 or self.config.steps == 0:
            why = "the document is too short" if self.config.steps else "nothing was to be learnt"
            self.deltas = [self._unlearnt(i) for i in range(len(self.questions))]
            self.results = [self._unchanged(i, why) for i in range(len(self.questions))]
            return
        start = self._start()
        before = yield from self._probe(probe_QN, start, 0)
        delta = start.clone().detach().requires_grad_()
        optimizer = make_optimizer(delta.parameters(), self.config)
        rewards: list[Tensor | None] = []
        for step in range(self.config.steps):
            optimizer.zero_grad()
            work = query_step(
                self.model,
                self._tokens(),
                self._positions(scores, step),
                self.config,
                delta=delta,
                end_state=self.adapter.state,
                seeds=[self.seed] * len(self.questions),
                step=step,
                entropy_T=self.adapter.entropy_T,
                similarity=self._similarity,
            )
            result = yield from self.usage.run(work, step, self.config.steps)
            clip_grads_per_delta(delta, self.config.grad_clip)
            optimizer.step()
            rewards.append(_reward_Q(result))
            yield Quantum(
                phase="step",
                num_tokens=0,
                step=step + 1,
                steps=self.config.steps,
                event=_event(step, self.config.steps, result),
            )
        yield from self._judge(start.detach(), delta.detach(), probe_QN, before, rewards)

    def _tokens(self) -> Tensor:
        return self.adapter.tokens_T.to(self.model.device)

    def _start(self) -> LoraDelta:
        """Where the questions' deltas begin: as nothing, also where the document was studied.

        Only a document that was read with its delta is asked with it.
        """
        fresh = init_delta(self.model, self.config, seed=self.seed, num=len(self.questions))
        own = self.adapter.delta
        if own is None or self.adapter.read_by_base:
            return fresh
        return LoraDelta.stack([own] * len(self.questions)).joined(fresh.detach())

    def _unlearnt(self, i: int) -> LoraDelta | None:
        """A question's delta where nothing was learnt for it."""
        alone = bool(self.passages[i]) and self.adapter.read_by_base
        return None if alone else self.adapter.delta

    def _relevant(self, question: list[int]) -> tuple[Tensor, list[int]]:
        """How relevant every place of the document is: [T]; and the tokens to read again."""
        config = self.config
        tokens, size = self.adapter.tokens_T.tolist(), config.focus_passage_tokens
        relevance = Relevance(self.adapter.tokens_T, question, window=config.focus_window)
        starts = relevance.passages(config.focus_passages, size, repeat=config.focus_repeat)
        passages = [
            token
            for start in starts
            for token in (*self._line_break, *tokens[start : start + size])
        ]
        return relevance.score_T, passages

    def _positions(self, scores: list[Tensor], step: int) -> Tensor:
        rows = [
            focus_positions(self.adapter.entropy_T, score_T, self.config, seed=self.seed, step=step)
            for score_T in scores
        ]
        return torch.stack(rows)

    def _probe(self, places_QN: Tensor, delta: LoraDelta, step: int) -> Study[list[ProbeResult]]:
        """Each question's own places with its own delta, as many questions a quantum as fit."""
        # a shorter cue than the steps train with: what counts is the memory, not the cue
        config = self.config.replace(cue_tokens=max(self.config.cue_tokens // 2, 1))
        num = places_QN.shape[1]
        results: list[ProbeResult] = []
        for part_QN in torch.split(places_QN, max(1, config.branches_at_once // num)):
            own = delta.detach().slice(len(results), len(results) + len(part_QN))
            call = probe_call(
                self.model,
                self._tokens(),
                part_QN.flatten(),
                self.adapter.state,
                config,
                delta=own,
            )
            probe = yield from self.usage.run(ask(call), step, self.config.steps)
            results += [ProbeResult(nll_P) for nll_P in torch.split(probe.nll_P, num)]
        return results

    def _judge(
        self,
        start: LoraDelta,
        trained: LoraDelta,
        places_QN: Tensor,
        before: list[ProbeResult],
        rewards: list[Tensor | None],
    ) -> Study[None]:
        """Keep of each question's delta the first blend that its gate accepts, or its start."""
        kept = [self._unlearnt(i) for i in range(start.num)]
        results: dict[int, FocusResult] = {}
        for alpha in self.config.blend_factors:
            open_Q = [i for i in range(start.num) if i not in results or not results[i].adapted]
            if not open_Q:
                break
            blends = [start.slice(i, i + 1).toward(trained.slice(i, i + 1), alpha) for i in open_Q]
            stacked = LoraDelta.stack(blends)
            after = yield from self._probe(places_QN[open_Q], stacked, self.config.steps)
            for i, blend, probe in zip(open_Q, blends, after, strict=True):
                verdict = judge(before[i], probe, self.config, neutral_rise_nats=None)
                finite = all(bool(t.isfinite().all()) for t in blend.parameters())
                adapted = verdict.accepted and finite
                if adapted:
                    kept[i] = blend
                results[i] = FocusResult(
                    adapted=adapted,
                    accepted=adapted,
                    steps=self.config.steps,
                    alpha=alpha if adapted else None,
                    probe_before=before[i].mean,
                    probe_after=probe.mean,
                    reward_first=None if rewards[0] is None else float(rewards[0][i]),
                    reward_last=None if rewards[-1] is None else float(rewards[-1][i]),
                    passage_tokens=len(self.passages[i]),
                    way=FOCUS if adapted or self.passages[i] else DOCUMENT,
                    drafts={},
                    reason=verdict.reason if finite else "a gradient was not finite",
                )
        self.results = [results[i] for i in range(start.num)]
        self.deltas = kept

    def _compare(self) -> Study[None]:
        """Answer each question in the way whose draft is the best."""
        ways = [self._ways(i) for i in range(len(self.questions))]
        changed = [i for i, of_question in enumerate(ways) if len(of_question) > 1]
        if not changed:
            return
        grounding = Grounding(self.adapter.tokens_T, self.model.config.vocab_size)
        size = max(1, self.config.branches_at_once // len(WAYS))
        for part in (changed[first : first + size] for first in range(0, len(changed), size)):
            asked = [(i, way) for i in part for way in ways[i]]
            work = write_drafts(
                self.model,
                [self._prompt(i, way) for i, way in asked],
                num_tokens=self.config.focus_draft_tokens,
                ends=self._ends,
            )
            drafts = yield from self.usage.run(work, self.config.steps, self.config.steps)
            scores: dict[int, dict[str, dict[str, float]]] = {}
            for (i, way), draft in zip(asked, drafts, strict=True):
                copied = grounding.count(draft.text_tokens, self.questions[i])
                scores.setdefault(i, {})[way] = {
                    "confidence": draft.confidence,
                    "grounding": copied,
                }
            for i, of_ways in scores.items():
                self._answer_as(i, max(of_ways, key=lambda way: self._worth(of_ways[way])), of_ways)

    def _ways(self, i: int) -> list[str]:
        """Those in which a question can be answered, in the order of `WAYS`."""
        own = self.adapter.delta is not None and self.adapter.read_by_base
        there = {
            FOCUS: self.results[i].way == FOCUS,
            PASSAGES: bool(self.passages[i]),
            DOCUMENT: True,
            BASE: own,
        }
        return [way for way in WAYS if there[way]]

    def _worth(self, draft: dict[str, float]) -> float:
        copied = math.log1p(draft["grounding"])
        return draft["confidence"] + self.config.focus_draft_grounding * copied

    def _prompt(self, i: int, way: str) -> DraftPrompt:
        """To a question's answer in one of `WAYS`."""
        state, share = self.adapter.state, self._share(way, i)
        if share != 1.0:
            state = self.model.faded(state, share)
        passages = [] if way in (DOCUMENT, BASE) else self.passages[i]
        return DraftPrompt([*passages, *self.questions[i]], state, self._delta(i, way))

    def _delta(self, i: int, way: str) -> LoraDelta | None:
        return {FOCUS: self.deltas[i], DOCUMENT: self.adapter.delta}.get(way)

    def _answer_as(self, i: int, way: str, drafts: dict[str, dict[str, float]]) -> None:
        result = dataclasses.replace(self.results[i], way=way, drafts=drafts)
        if way != self.results[i].way:
            self.deltas[i] = self._delta(i, way)
            result = dataclasses.replace(result, adapted=False, alpha=None, reason=_REASONS[way])
        if way in (DOCUMENT, BASE):
            self.passages[i] = []
            result = dataclasses.replace(result, passage_tokens=0)
        self.results[i] = result

    def _unchanged(self, i: int, reason: str) -> FocusResult:
        return FocusResult(
            adapted=False,
            accepted=False,
            steps=0,
            alpha=None,
            probe_before=None,
            probe_after=None,
            reward_first=None,
            reward_last=None,
            passage_tokens=len(self.passages[i]),
            way=FOCUS if self.passages[i] else DOCUMENT,
            drafts={},
            reason=reason,
        )


def _reward_Q(result: StepResult) -> Tensor | None:
    return None if result.rewards_QNG is None else result.rewards_QNG.flatten(1).mean(1)


def _event(step: int, steps: int, result: StepResult) -> dict[str, Any]:
    event: dict[str, Any] = {"step": step + 1, "steps": steps}
    if result.ntp_loss_Q is not None:
        event["ntp_loss"] = float(result.ntp_loss_Q.mean())
    if result.rewards_QNG is not None:
        event["reward_mean"] = float(result.rewards_QNG.mean())
    return event
