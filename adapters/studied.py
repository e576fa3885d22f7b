"""A document as it was read, and what a study's steps and probes ask the model about it.

Limit: gives calls; optimizes nothing, counts nothing, and does not know how far the study is.
"""

# T = tokens of the document, P = places of the probe

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imprint.adapters.branches import query_step
from imprint.adapters.calls import Calls, ask
from imprint.adapters.config import RefineConfig
from imprint.adapters.gate import ProbeResult, probe_call
from imprint.adapters.policy import StepResult
from imprint.adapters.reading import Reading, read_segments
from imprint.adapters.scopes import Trained, View
from imprint.adapters.selection import allowed_positions, select_positions
from imprint.adapters.similarity import Similarity
from imprint.adapters.trunk import trunk_step
from imprint.models.state import RecurrentState


@dataclass(frozen=True, slots=True, kw_only=True)
class Studied:
    """One document, the settings of its study, and the places that are held out of it."""

    tokens_T: Tensor
    config: RefineConfig
    seed: int
    reading: Reading
    """With the base weights."""
    entropy_T: Tensor
    places_P: Tensor
    excluded_T: Tensor
    """Tokens that are held out, of all steps or of `held_steps`."""
    similarity: Similarity | None = None

    @property
    def held_steps(self) -> int:
        """The first steps that leave out what the later ones study; 0 where none do, and where a
        document is too short to leave anything out."""
        config = self.config
        if config.selection != "write" or not bool(self.excluded_T.any()):
            return 0
        room = allowed_positions(len(self.tokens_T), config, self.excluded_T)
        return min(config.held_steps, config.steps) if len(room) else 0

    def excluded_at(self, step: int) -> Tensor | None:
        """The tokens that step `step` (from 0) leaves out."""
        later = self.config.selection == "write" and step >= self.held_steps
        return None if later else self.excluded_T

    def step(self, trained: Trained, step: int) -> Calls[StepResult]:
        """Add the gradient of a step to what is trained; the same one whenever it is asked for."""
        view = trained.view
        if self.config.reads_again:
            return trunk_step(
                view.model,
                self.tokens_T,
                self.config,
                delta=view.read_delta,
                seed=self.seed,
                step=step,
                excluded_T=self.excluded_at(step),
                start=view.start,
                similarity=self.similarity,
            )
        assert view.ask_delta is not None
        positions_N = select_positions(
            self.entropy_T,
            self.config,
            seed=self.seed,
            step=step,
            excluded_T=self.excluded_at(step),
            write_T=self.reading.write_T,
        )
        return query_step(
            view.model,
            self.tokens_T,
            positions_N.unsqueeze(0),
            self.config,
            delta=view.ask_delta,
            end_state=self.reading.end.state,
            seeds=[self.seed],
            step=step,
            reading=self.reading if self.config.branches != "recall" else None,
            entropy_T=self.entropy_T,
            similarity=self.similarity,
        )

    def end_state(self, trained: Trained) -> Calls[RecurrentState]:
        """The state at the document's end, which is read again where that changes it."""
        if not self.config.reads_again:
            return self.reading.end.state
        view = trained.view
        reading = yield from read_segments(
            view.model,
            self.tokens_T,
            segment_tokens=self.config.segment_tokens,
            delta=view.read_delta,
            entropy=False,
            keep_states=False,
            state=view.start,
        )
        return reading.end.state

    def probe(self, view: View, end_state: RecurrentState) -> Calls[ProbeResult]:
        """What recalling the places that judge costs."""
        cue = self.config.probe_cue_tokens
        args = (view.model, self.tokens_T, self.places_P, end_state, self.config)
        return ask(probe_call(*args, delta=view.ask_delta, cue_tokens=cue))
