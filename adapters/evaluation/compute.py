"""What an adaptation costs in token passes, and next-token training at the cost of another one.

A token that the model reads, samples or goes back through counts one pass each time. Knows numbers
only.
"""

from __future__ import annotations

from imprint.adapters.config import RefineConfig
from imprint.adapters.quantum import Usage

_MAX_STEPS = 1000


def token_passes(usage: Usage) -> int:
    """All passes of a study or of a focus run."""
    return usage.tokens_forward + usage.tokens_backward + usage.rollout_tokens


def next_token_step(config: RefineConfig, num_tokens: int) -> int:
    """Passes of one step without rollouts, its probe left out.

    Where the scope reads again, a document of `num_tokens` is read twice and gone back through
    once; else the cues and continuations of the positions are.
    """
    if config.reads_again:
        return 3 * num_tokens
    return config.positions * 2 * (config.cue_tokens + config.rollout_length)


def next_token_config(
    config: RefineConfig, *, num_tokens: int, num_places: int, budget: int, num_neutral: int = 0
) -> RefineConfig:
    """The method without its policy loss, with as many steps as cost `budget` passes in all.

    `budget` holds the first reading of `num_tokens`, the probes of `num_places`, the trial of what
    was held out at its first factor, and two readings of the neutral text as well. Nothing stops
    such a study early but that trial, so the budget is used, as far as 1000 steps can.
    """
    plain = config.replace(
        lambda_rl=0.0, lambda_ntp=config.lambda_ntp or 1.0, steps=1, patience=_MAX_STEPS
    )
    probe = num_places * (plain.probe_cue_tokens + plain.rollout_length)
    last_reading = num_tokens if plain.reads_again else 0
    step = next_token_step(plain, num_tokens)
    trials = len(plain.learning_rates) * (plain.trial_steps * step + last_reading + probe)
    holds_out = plain.selection == "write" and plain.held_steps > 0
    trials += holds_out * (last_reading + probe)
    left = budget - num_tokens - probe - last_reading - trials - 2 * num_neutral
    steps = round(left / (step + probe))
    return plain.replace(steps=min(max(steps, 1), _MAX_STEPS))
