"""Studies one document: reads it, takes REFINE steps, lets the gate judge, leaves an adapter.

`Refiner.study` is a generator that yields every call to the model, and reports of what is done: a
server can run the calls of several documents in one batch, decode answers in between, or stop. With
a `Progress` it goes on where an earlier run was ended. Knows nothing of HTTP or queues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.branch_record import record_branches
from imprint.adapters.calls import ask
from imprint.adapters.config import RefineConfig, check_study
from imprint.adapters.continuing import begins, read_on
from imprint.adapters.delta import make_optimizer
from imprint.adapters.document import document_tokens, tokens_sha256
from imprint.adapters.gate import (
    ProbeResult,
    Verdict,
    judge,
    neutral_call,
    probe_places,
)
from imprint.adapters.held_out import REFUSAL, HeldOut, judge_held_out
from imprint.adapters.optimizer import AdamW
from imprint.adapters.outcome import is_finite, refused, step_event, study_result
from imprint.adapters.progress import Begun, Candidate, Completed, Progress, restore
from imprint.adapters.quantum import Quanta, Quantum, Study, Usage, quanta_alone
from imprint.adapters.rates import try_rates
from imprint.adapters.reading import Reading
from imprint.adapters.rollout import BranchStart
from imprint.adapters.scopes import Trained, View, fresh
from imprint.adapters.selection import select_positions
from imprint.adapters.similarity import Similarity, check_reward
from imprint.adapters.studied import Studied
from imprint.adapters.trials import Trial, best_rate
from imprint.models.architecture import FastWeightModel
from imprint.models.state import RecurrentState


class Refiner:
    """One adaptation of one document; after `run` is exhausted, `adapter` holds what it left."""

    def __init__(
        self,
        model: FastWeightModel,
        tokens: Sequence[int],
        config: RefineConfig,
        *,
        seed: int = 0,
        neutral: Sequence[int] | None = None,
        neutral_base: float | None = None,
        progress: Progress | None = None,
        base: Adapter | None = None,
        similarity: Similarity | None = None,
    ) -> None:
        """`neutral_base`: the base weights' loss on `neutral`; read where it is not given.
        `similarity` is for the reward `semantic`."""
        check_study(config)
        check_reward(config, similarity)
        self._similarity = similarity
        self.model, self.config, self.seed = model, config, seed
        self.tokens_T = document_tokens(model, tokens)
        self._base = base if begins(base, self.tokens_T) else None
        self.neutral = list(neutral) if neutral and len(neutral) > 1 else None
        self._neutral_base = neutral_base
        self.usage = Usage()
        self.adapter: Adapter | None = None
        self.chosen: Candidate | None = None
        """What the gate accepted, already blended; its values are the adapter's."""
        self._sha256 = tokens_sha256(self.tokens_T)
        self._progress = progress
        self._events: list[dict[str, Any]] = []
        self._branches: list[dict[str, Any]] = []
        self._best: Candidate | None = None
        self._since_best = 0
        self._trials: list[Trial] = []
        self.held_out: HeldOut | None = None
        """What the first steps were worth to what they had left out; None where none do."""

    def run(self) -> Quanta:
        """`study`, with each call run alone; yields a quantum for each."""
        return quanta_alone(self.study())

    def study(self) -> Study[None]:
        """Read, step, judge. Raises AdaptationError only for input that cannot be used at all."""
        saved = self._load()
        begun, completed = saved if saved is not None else (None, Completed())
        if begun is None:
            reading = yield from self._read(self.usage)
        else:
            reading = yield from self._take_up(begun, completed)
        assert reading.entropy_T is not None
        entropy_T = reading.entropy_T.float().cpu()
        if begun is None:
            yield Quantum(
                phase="select", num_tokens=0, steps=self.config.steps, entropy_T=entropy_T
            )
        places_P, excluded_T = probe_places(
            entropy_T, self.config, seed=self.seed, write_T=reading.write_T
        )
        room = select_positions(
            entropy_T,
            self.config,
            seed=self.seed,
            step=0,
            excluded_T=None if self.config.selection == "write" else excluded_T,
            write_T=reading.write_T,
        )
        if len(places_P) == 0 or len(room) == 0:
            self._finish(reading, None, refused("the document is too short to adapt and to judge"))
            return
        studied = Studied(
            tokens_T=self.tokens_T,
            config=self.config,
            seed=self.seed,
            reading=reading,
            entropy_T=entropy_T,
            places_P=places_P,
            excluded_T=excluded_T,
            similarity=self._similarity,
        )
        if begun is None:
            base = yield from self._probe(studied, View(model=self.model), reading.end.state, 0)
            self._keep_begun(reading, entropy_T, base)
        else:
            base = ProbeResult(begun.base.nll_P.to(self.model.device))
        failure = yield from self._steps(studied, base, completed)
        if failure is not None:
            self._finish(reading, None, failure, base)
            return
        yield from self._gate(studied, base)

    @property
    def candidate(self) -> Candidate | None:
        """What the gate judges: what the step with the best probe left, before any blending."""
        return self._best

    @property
    def _needs_states(self) -> bool:
        # branches that continue leave from the base model's reading of the document
        return not self.config.reads_again and self.config.branches != "recall"

    @property
    def _harms(self) -> bool:
        """What the first steps learnt does not carry over to what they left out."""
        return self.held_out is not None and not self.held_out.passed

    def _read(self, usage: Usage, *, entropy: bool = True) -> Study[Reading]:
        work = read_on(
            self.model,
            self.tokens_T,
            self._base,
            segment_tokens=self.config.segment_tokens,
            entropy=entropy,
            keep_states=self._needs_states,
            writes=self.config.selection == "write",
        )
        return (yield from usage.run(work, 0, self.config.steps))

    # ---- going on where another process stopped --------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        config = self.config.to_dict()
        del config["segment_tokens"]
        identity = {"document": self._sha256, "method": config, "seed": self.seed}
        if self.config.reward == "semantic" and self._similarity is not None:
            identity["encoder"] = self._similarity.name
        return identity

    def _load(self) -> tuple[Begun, Completed] | None:
        if self._progress is None:
            return None
        most = self.config.segment_tokens
        like = fresh(self.model, self.config, seed=self.seed)
        saved = self._progress.load(self._identity(), segment_tokens=most, like=like)
        if saved is not None:
            self.config = self.config.replace(segment_tokens=saved[0].segment_tokens)
        return saved

    def _take_up(self, begun: Begun, completed: Completed) -> Study[Reading]:
        """Tell how far the study was, and have its reading again: what it cost is counted once."""
        self.usage = Usage(**(completed.usage or begun.usage))
        self._events = list(completed.events)
        self._branches = list(completed.branches)
        self._since_best = completed.since_best
        self._trials = list(completed.trials)
        self.held_out = completed.held_out
        steps = self.config.steps
        yield Quantum(
            phase="resume",
            num_tokens=0,
            step=completed.step,
            steps=steps,
            resumed=self._events[:],
            entropy_T=begun.entropy_T,
            branches=self._branches[:],
        )
        device = self.model.device
        end = BranchStart(begun.end.hidden_ND.to(device), begun.end.state.to(device))
        if not self._needs_states:
            return Reading(
                tokens_T=self.tokens_T,
                segment_tokens=self.config.segment_tokens,
                states=None,
                entropy_T=begun.entropy_T,
                end=end,
                write_T=begun.write_T,
            )
        reading = yield from self._read(Usage(), entropy=False)
        return dataclasses.replace(
            reading, entropy_T=begun.entropy_T, end=end, write_T=begun.write_T
        )

    def _keep_begun(self, reading: Reading, entropy_T: Tensor, base: ProbeResult) -> None:
        if self._progress is not None:
            begun = Begun(
                segment_tokens=self.config.segment_tokens,
                entropy_T=entropy_T,
                write_T=reading.write_T,
                end=reading.end,
                base=base,
                usage=self.usage.to_dict(),
            )
            self._progress.begin(begun, self._identity())

    def _keep_step(self, step: int, trained: Trained, optimizer: AdamW) -> None:
        if self._progress is not None:
            completed = Completed(
                step=step,
                trained=trained,
                optimizer=optimizer.state(),
                best=self._best,
                since_best=self._since_best,
                usage=self.usage.to_dict(),
                events=self._events,
                branches=self._branches,
                trials=self._trials,
                held_out=self.held_out,
            )
            own_state = self.config.reads_again
            self._progress.step(completed, self._identity(), own_state=own_state)

    # ---- steps and judgement ---------------------------------------------------------------------

    def _probe(
        self, studied: Studied, view: View, end_state: RecurrentState, step: int
    ) -> Study[ProbeResult]:
        return self.usage.run(studied.probe(view, end_state), step, self.config.steps)

    def _steps(
        self, studied: Studied, base: ProbeResult, completed: Completed
    ) -> Study[Verdict | None]:
        """Optimise, keeping what has the best probe. A verdict only if the attempt broke."""
        config, steps = self.config, self.config.steps
        if config.learning_rates:
            if completed.step == 0:  # ended before its first step, they are tried again
                self._trials = yield from try_rates(self.model, studied, self.usage)
            rate = best_rate(self._trials)
            if rate is None:
                return refused("a loss or gradient was not finite")
            config = config.replace(learning_rate=rate)
        trained = fresh(self.model, config, seed=self.seed)
        optimizer = make_optimizer(trained.parameters(), config)
        step = completed.step
        if step > 0:
            self._best = restore(completed, trained, optimizer)
        held_steps = studied.held_steps
        while (
            step < steps
            and not self._harms
            and (step < held_steps or self._since_best < config.patience)
        ):
            optimizer.zero_grad()
            result = yield from self.usage.run(studied.step(trained, step), step, steps)
            if config.reads_again and step > 0 and result.end is not None:
                # the trunk's reading was done with what there was before this update
                yield from self._consider(studied, step, trained, result.end.state)
            norm = trained.clip_grads(config.grad_clip)
            if not (math.isfinite(norm) and is_finite(result)):
                return refused("a loss or gradient was not finite")
            optimizer.step()
            if not config.reads_again:
                yield from self._consider(studied, step + 1, trained, studied.reading.end.state)
            event = step_event(step + 1, steps, result, norm, base, self._best)
            step += 1
            self._events.append(event)
            tried = record_branches(step, result)
            self._branches += tried
            if step == held_steps:
                self.held_out = yield from self._hold_out(studied, base, trained)
            self._keep_step(step, trained, optimizer)
            yield Quantum(
                phase="step", num_tokens=0, step=step, steps=steps, event=event, branches=tried
            )
        if self._harms:
            return refused(REFUSAL)
        if config.reads_again and self._since_best < config.patience:
            end = yield from self.usage.run(studied.end_state(trained), steps, steps)
            yield from self._consider(studied, steps, trained, end)
        return None

    def _consider(
        self, studied: Studied, step: int, trained: Trained, end_state: RecurrentState
    ) -> Study[None]:
        probe = yield from self._probe(studied, trained.view, end_state, step)
        if self._best is None or probe.mean < self._best.probe.mean:
            self._best = Candidate(step, trained.copy(), end_state.detach(), probe)
            self._since_best = 0
        else:
            self._since_best += 1

    def _hold_out(self, studied: Studied, base: ProbeResult, trained: Trained) -> Study[HeldOut]:
        """What the first steps are worth to the places that they have left out."""
        held_out = None
        for alpha in self.config.blend_factors:
            blend = trained.scaled(alpha)
            end_state = yield from self.usage.run(
                studied.end_state(blend), studied.held_steps, self.config.steps
            )
            probe = yield from self._probe(studied, blend.view, end_state, studied.held_steps)
            held_out = judge_held_out(base, probe, self.config, alpha)
            if held_out.passed:
                break
        assert held_out is not None
        return held_out

    def _gate(self, studied: Studied, base: ProbeResult) -> Study[None]:
        """Judge the best candidate, whole and blended; the first that passes is kept."""
        best, reading, steps = self._best, studied.reading, self.config.steps
        assert best is not None
        neutral_before = self._neutral_base
        if neutral_before is None:
            neutral_before = yield from self._neutral_loss(View(model=self.model))
        verdict = None
        # no more of it than what was held out has borne
        most = 1.0 if self.held_out is None else self.held_out.alpha
        for alpha in (factor for factor in self.config.blend_factors if factor <= most):
            trained, end_state, probe = best.trained.scaled(alpha), best.end_state, best.probe
            if alpha != 1.0:
                end_state = yield from self.usage.run(studied.end_state(trained), steps, steps)
                probe = yield from self._probe(studied, trained.view, end_state, best.step)
            neutral_after = yield from self._neutral_loss(trained.view)
            rise = None
            if neutral_before is not None and neutral_after is not None:
                rise = neutral_after - neutral_before
            verdict = judge(base, probe, self.config, neutral_rise_nats=rise)
            yield Quantum(phase="gate", num_tokens=0, step=best.step, steps=self.config.steps)
            if verdict.accepted:
                chosen = Candidate(best.step, trained, end_state, probe)
                self._finish(reading, chosen, verdict, base, alpha)
                return
        assert verdict is not None
        self._finish(reading, None, verdict, base)

    def _neutral_loss(self, view: View) -> Study[float | None]:
        if self.neutral is None:
            return None
        call = neutral_call(view.model, self.neutral, view.ask_delta, view.start)
        return (yield from self.usage.run(ask(call), self.config.steps, self.config.steps))

    def _finish(
        self,
        reading: Reading,
        chosen: Candidate | None,
        verdict: Verdict,
        base: ProbeResult | None = None,
        alpha: float | None = None,
    ) -> None:
        assert reading.entropy_T is not None
        result = study_result(chosen, self._best, verdict, base, alpha, self._trials, self.held_out)
        self.chosen = chosen
        self.adapter = Adapter(
            tokens_T=self.tokens_T,
            entropy_T=reading.entropy_T.float(),
            state=chosen.end_state if chosen else reading.end.state,
            **(chosen.trained.adapter_fields() if chosen else {}),
            manifest={
                "method": "refine",
                "config": self.config.to_dict(),
                "seed": self.seed,
                "num_tokens": len(self.tokens_T),
                "document_sha256": self._sha256,
                "outcome": "succeeded" if chosen else "rejected",
                "result": result,
                "usage": self.usage.to_dict(),
            },
        )
