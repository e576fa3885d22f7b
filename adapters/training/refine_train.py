"""Mid-training and post-training with REFINE, on any checkpoint: rounds of updates, resumable.

What a round sees and rolls out is a function of (seed, round), so a run that is taken up goes on
with the losses it would have had. Limit: knows no files (`run_folder.py`) and no command line.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from imprint.adapters.calls import run_calls
from imprint.adapters.training.examples import Example, Examples
from imprint.adapters.training.parallel import (
    World,
    restore_optimizer,
    whole,
    whole_optimizer,
    whole_weights,
)
from imprint.adapters.training.refine_config import RefineTrainingConfig
from imprint.adapters.training.rounds import Numbers
from imprint.adapters.training.run_folder import RunFolder
from imprint.adapters.training.supervised import supervised_step
from imprint.adapters.trunk import trunk_step
from imprint.models.architecture import FastWeightModel

Said = Callable[[Numbers], None]

_RANK_STRIDE = 1 << 20  # keeps the seeds of an update's documents apart


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not finite; the folder holds the weights of the last save."""


class RefineTraining:
    """One run in one folder; every process of it makes one of these."""

    def __init__(
        self,
        config: RefineTrainingConfig,
        model: FastWeightModel,
        examples: Examples,
        folder: RunFolder,
        world: World,
        *,
        init: Path,
    ) -> None:
        """`model`: with the weights of the folder's checkpoint, if there is one, else of `init`."""
        self.config, self.model, self.examples = config, model, examples
        self.folder, self.world, self._init = folder, world, init
        self.model.train().requires_grad_(True)
        world.shard(model, list(model.model.layers))
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.step = self.num_tokens = 0
        self.seconds = 0.0
        if (saved := folder.checkpoints.progress()) is not None:
            self.step, self.num_tokens = saved["step"], saved["num_tokens"]
            self.seconds = saved["seconds"]
            restore_optimizer(model, self.optimizer, folder.checkpoints.optimizer_state())
        if world.leads:
            folder.rounds.forget_from(self.step)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def run(
        self, *, seconds: float | None = None, save_every_s: float = 300, said: Said | None = None
    ) -> None:
        """Train to the last round, or for so many seconds; the folder is saved at the end."""
        began = saved_at = time.monotonic()
        while not self.finished:
            numbers = self.take_step()
            if self.world.leads:
                self.folder.rounds.append(numbers)
                if said is not None:
                    said(numbers)
            now = time.monotonic()
            if self.world.any(seconds is not None and now - began >= seconds):
                break
            if self.world.any(now - saved_at >= save_every_s):
                self.save()
                saved_at = time.monotonic()
        self.save()

    def take_step(self) -> Numbers:
        """One round; returns its numbers, which are means over all documents of all processes."""
        began = time.monotonic()
        numbers: Numbers = {"step": self.step}
        for part in range(self.config.updates_per_step):
            update = self.step * self.config.updates_per_step + part
            responds = self.config.phase == "post" and part == self.config.prompt_steps
            numbers |= self._update(update, part, responds=responds)
        self.step += 1
        self.seconds += time.monotonic() - began
        return {**numbers, "num_tokens": self.num_tokens, "seconds": round(self.seconds, 3)}

    def save(self) -> None:
        """Write the folder; all processes must call it."""
        weights = whole_weights(self.model)
        optimizer = whole_optimizer(self.model, self.optimizer)
        if self.world.leads:
            progress = {"step": self.step, "num_tokens": self.num_tokens, "seconds": self.seconds}
            self.folder.checkpoints.save(
                self.model.config, weights, optimizer, progress, init=self._init
            )
        self.world.wait()

    # ---- one update ------------------------------------------------------------------------------

    def _update(self, update: int, part: int, *, responds: bool) -> Numbers:
        refine_numbers = _REFINE_NUMBERS if self.config.method.lambda_rl > 0 else _NTP_NUMBERS
        names = _RESPONSE_NUMBERS if responds else refine_numbers
        sums: Numbers = dict.fromkeys((*names, "tokens"), 0.0)
        with self.world.gathering(self.model, self._touch):
            for place, example in self._mine():
                if responds:
                    found = self._respond(example)
                else:
                    found = self._refine(example, seed=self._seed(place), step=part)
                sums = {name: value + found[name] for name, value in sums.items()}
        sums = self.world.total(sums)
        self.num_tokens += int(sums.pop("tokens"))
        means = {name: value / self.config.documents for name, value in sums.items()}
        means["learning_rate"] = self.config.rate_at(update)
        means["response_grad_norm" if responds else "grad_norm"] = self._move(update)
        if not all(map(math.isfinite, means.values())):
            raise NonFiniteError(f"round {self.step} has {means}")
        return means

    def _mine(self) -> Iterator[tuple[int, Example]]:
        """This process's share of the round's documents, with their places among all."""
        for place in range(self.world.rank, self.config.documents, self.world.size):
            rng = random.Random(f"{self.config.seed}:{self.step}:{place}")
            yield place, self.examples.draw(rng)

    def _seed(self, place: int) -> int:
        return (self.config.seed * _RANK_STRIDE + place) * _RANK_STRIDE + self.step

    def _refine(self, example: Example, *, seed: int, step: int) -> Numbers:
        result = run_calls(
            trunk_step(
                self.model,
                self._tensor(example.document),
                self.config.method,
                delta=None,
                seed=seed,
                step=step,
            )
        )
        rewards = result.rewards_QNG  # None for a document too short for a place
        return {
            "ntp_loss": float(result.ntp_loss_Q),
            "policy_loss": float(result.policy_loss_Q),
            "reward_mean": 0.0 if rewards is None else float(rewards.mean()),
            "tokens": len(example.document),
        }

    def _respond(self, example: Example) -> Numbers:
        loss = supervised_step(
            self.model,
            self._tensor(example.document),
            self._tensor(example.response),
            segment_tokens=self.config.method.segment_tokens,
        )
        tokens = len(example.document) + len(example.response)
        return {"response_loss": loss, "tokens": tokens}

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self.world.device)

    def _touch(self) -> Tensor:
        hidden_BTD, _ = self.model(self._tensor([0, 0]).unsqueeze(0))
        return self.model.logits(hidden_BTD).sum()

    def _move(self, update: int) -> float:
        """From summed gradients to new weights; returns the norm of their mean."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.div_(self.config.documents)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate_at(update)
        found = float(whole(norm))
        if math.isfinite(found):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found


_NTP_NUMBERS = ("ntp_loss",)
_REFINE_NUMBERS = (*_NTP_NUMBERS, "policy_loss", "reward_mean")
_RESPONSE_NUMBERS = ("response_loss",)
