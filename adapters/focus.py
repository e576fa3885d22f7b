"""Studies a document for known questions: they choose the positions, each has a delta of its own.
They also choose passages, which are read once more before the question is. A question keeps both
only if the model is not surer of its answer without them.

Works from the document-end state alone, with recall branches in scope `query_lora`: a step costs
some hundred tokens per question whatever the document's length, and so do the passages.
Shapes: Q = questions, N = positions of a question, T = document tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
from imprint.adapters.loss import clip_grads_per_delta
from imprint.adapters.policy import StepResult
from imprint.adapters.quantum import Quanta, Quantum, Study, Usage, quanta_alone
from imprint.adapters.relevance import Relevance
from imprint.adapters.selection import focus_positions
from imprint.adapters.similarity import Similarity, check_reward
from imprint.models.architecture import FastWeightModel
from imprint.models.lora import LoraDelta

_PROBE_STEP = (1 << 19) - 1  # a step no run reaches
_SURER_WITHOUT = "the model is surer of its answer without it"


@dataclass(frozen=True, slots=True, kw_only=True)
class FocusResult:
    """What focusing did for one question. Probes are in nats per token at relevant places."""

    adapted: bool
    steps: int
    alpha: float | None
    """How far towards what was learnt the delta went; None where nothing was kept."""
    probe_before: float | None
    probe_after: float | None
    reward_first: float | None
    reward_last: float | None
    passage_tokens: int
    """Document tokens that are read again before the question, whatever the gate says; none where
    the model is surer without them."""
    confidence: float | None
    """How sure the model is of a draft of the answer with what was done for the question: mean
    log-probability of its tokens in nats. None where no draft was written."""
    confidence_without: float | None
    """The same without it; where this is more, the question is answered without it."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As it stands in an answer's `focus`."""
        values = dataclasses.asdict(self)
        del values["adapted"]
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
        return [self.config.focus_memory if passages else 1.0 for passages in self.passages]

    @property
    def adapted(self) -> list[bool]:
        """Whether each question is answered with what a study has changed: its own or the
        document's."""
        document = self.adapter.adapted
        return [
            result.adapted or (document and not (self.adapter.read_by_base and delta is None))
            for result, delta in zip(self.results, self.deltas, strict=True)
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
        if probe_QN.shape[1] == 0:
            self.deltas = [self._unlearnt(i) for i in range(len(self.questions))]
            self.results = [self._unchanged(passages) for passages in self.passages]
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
                    steps=self.config.steps,
                    alpha=alpha if adapted else None,
                    probe_before=before[i].mean,
                    probe_after=probe.mean,
                    reward_first=None if rewards[0] is None else float(rewards[0][i]),
                    reward_last=None if rewards[-1] is None else float(rewards[-1][i]),
                    passage_tokens=len(self.passages[i]),
                    confidence=None,
                    confidence_without=None,
                    reason=verdict.reason if finite else "a gradient was not finite",
                )
        self.results = [results[i] for i in range(start.num)]
        self.deltas = kept

    def _compare(self) -> Study[None]:
        """Take back what was done for a question whose answer the model is surer of without it."""
        changed = [i for i, r in enumerate(self.results) if r.adapted or self.passages[i]]
        size = max(1, self.config.branches_at_once // 2)
        for part in (changed[first : first + size] for first in range(0, len(changed), size)):
            prompts = [prompt for i in part for prompt in self._two_ways(i)]
            work = write_drafts(
                self.model, prompts, num_tokens=self.config.focus_draft_tokens, ends=self._ends
            )
            drafts = yield from self.usage.run(work, self.config.steps, self.config.steps)
            for i, focused, plain in zip(part, drafts[::2], drafts[1::2], strict=True):
                result = dataclasses.replace(
                    self.results[i],
                    confidence=focused.confidence,
                    confidence_without=plain.confidence,
                )
                if plain.confidence > focused.confidence:
                    self.deltas[i], self.passages[i] = self.adapter.delta, []
                    result = dataclasses.replace(
                        result, adapted=False, alpha=None, passage_tokens=0, reason=_SURER_WITHOUT
                    )
                self.results[i] = result

    def _two_ways(self, i: int) -> Iterator[DraftPrompt]:
        """To a question's answer: with what was done for it, and without."""
        end, question = self.adapter.state, self.questions[i]
        faded = self.model.faded(end, self.memory_shares[i])
        yield DraftPrompt([*self.passages[i], *question], faded, self.deltas[i])
        yield DraftPrompt(question, end, self.adapter.delta)

    def _unchanged(self, passages: list[int]) -> FocusResult:
        return FocusResult(
            adapted=False,
            steps=0,
            alpha=None,
            probe_before=None,
            probe_after=None,
            reward_first=None,
            reward_last=None,
            passage_tokens=len(passages),
            confidence=None,
            confidence_without=None,
            reason="the document is too short",
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
