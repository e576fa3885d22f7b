"""Which learning rate suits a document: short trials from the same start, told apart by the probe.

The steps of a trial are the first steps that the study takes with its rate, so a study that has
chosen a rate is the study with that rate; what the trials cost is counted beside. Limit: keeps none
of what it trains.
"""

from __future__ import annotations

import math

from imprint.adapters.calls import Calls
from imprint.adapters.delta import make_optimizer
from imprint.adapters.optimizer import AdamW
from imprint.adapters.outcome import is_finite
from imprint.adapters.quantum import Study, Usage
from imprint.adapters.scopes import Trained, fresh
from imprint.adapters.studied import Studied
from imprint.adapters.trials import Trial
from imprint.models.architecture import FastWeightModel


def try_rates(model: FastWeightModel, studied: Studied, usage: Usage) -> Study[list[Trial]]:
    """One trial for each of the config's `learning_rates`, in order."""
    config, trials = studied.config, []
    for rate in config.learning_rates:
        trained = fresh(model, config, seed=studied.seed)
        optimizer = make_optimizer(trained.parameters(), config.replace(learning_rate=rate))
        nats = yield from usage.run(_trial(studied, trained, optimizer), 0, config.steps)
        trials.append(Trial(rate, nats))
    return trials


def _trial(studied: Studied, trained: Trained, optimizer: AdamW) -> Calls[float | None]:
    for step in range(studied.config.trial_steps):
        optimizer.zero_grad()
        result = yield from studied.step(trained, step)
        norm = trained.clip_grads(studied.config.grad_clip)
        if not (math.isfinite(norm) and is_finite(result)):
            return None
        optimizer.step()
    end_state = yield from studied.end_state(trained)
    probe = yield from studied.probe(trained.view, end_state)
    return probe.mean if math.isfinite(probe.mean) else None
