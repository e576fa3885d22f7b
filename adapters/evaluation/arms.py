"""The arms of a comparison: how a document's questions are answered without and with adaptation.

Every arm gets the same document, prompts and seed, and decodes greedily. The document is read
before a question is known, as the server does. Limit: one case at a time; knows no scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Generic, TypeVar

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.document import DocumentReader
from imprint.adapters.drafts import LineEnd
from imprint.adapters.evaluation.answering import Answers, GreedyAnswerer
from imprint.adapters.evaluation.arm_names import ARMS
from imprint.adapters.evaluation.compute import next_token_config, token_passes
from imprint.adapters.evaluation.retrieval import PassageIndex, RetrievalConfig
from imprint.adapters.focus import Focus
from imprint.adapters.gate import num_probe_places
from imprint.adapters.progress import Candidate
from imprint.adapters.quantum import Usage, quanta_alone
from imprint.adapters.reading import read_segments
from imprint.adapters.refine import Refiner
from imprint.adapters.similarity import Similarity
from imprint.models.architecture import FastWeightModel
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState
from imprint.models.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSetup:
    """What all cases of a run share."""

    model: FastWeightModel
    tokenizer: Tokenizer
    refine: RefineConfig
    """Studying without the questions."""
    focus: RefineConfig
    """Studying with them."""
    retrieval: RetrievalConfig
    neutral: Sequence[int] | None = None
    """Text by which the gate sees whether a delta harms; None where the checkpoint has none."""
    similarity: Similarity | None = None
    """For the reward `semantic`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmAnswers:
    """A case's answers in one arm, and what they cost."""

    texts: tuple[str, ...]
    num_adapted: int = 0
    """Questions that were answered with what a study has changed."""
    seconds: float
    """Reading, adapting and answering; what arms share is counted in each of them."""
    token_passes: int
    detail: dict[str, Any] = field(default_factory=dict)
    """What the adaptation says of itself."""


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    """Something arms share, with what it cost."""

    value: T
    seconds: float
    token_passes: int


class CaseArms:
    """The arms of one case: token ids of a document, of its prompts, and a seed."""

    def __init__(
        self,
        setup: ArmSetup,
        answerer: GreedyAnswerer,
        document: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
    ) -> None:
        self.setup, self.answerer, self.seed = setup, answerer, seed
        self.document = list(document)
        self.prompts = [list(prompt) for prompt in prompts]

    def run(self, arm: str) -> ArmAnswers:
        """Answer in one arm of `ARMS`. Raises AdaptationError for an empty document."""
        return _RUN[arm](self)

    # ---- what arms share -------------------------------------------------------------------------

    @cached_property
    def _reading(self) -> _Done[Adapter]:
        begin = time.perf_counter()
        size = self.setup.refine.segment_tokens
        reader = DocumentReader(self.setup.model, self.document, segment_tokens=size)
        _finish(reader.run())
        assert reader.adapter is not None
        return _Done(reader.adapter, time.perf_counter() - begin, token_passes(reader.usage))

    @cached_property
    def _study(self) -> _Done[Refiner]:
        return self._studied(self.setup.refine)

    def _studied(self, config: RefineConfig) -> _Done[Refiner]:
        begin = time.perf_counter()
        refiner = Refiner(
            self.setup.model,
            self.document,
            config,
            seed=self.seed,
            neutral=self.setup.neutral,
            similarity=self.setup.similarity,
        )
        _finish(refiner.run())
        return _Done(refiner, time.perf_counter() - begin, token_passes(refiner.usage))

    # ---- the arms --------------------------------------------------------------------------------

    def base(self) -> ArmAnswers:
        """From the state at the document's end."""
        return self._answer(self._reading, self.prompts, self._reading.value.state)

    def adapted(self) -> ArmAnswers:
        """From what the gate accepted, or from the base."""
        return self._answer_studied(self._study)

    def ungated(self) -> ArmAnswers:
        """With the delta of the best step, whatever the gate said of it."""
        candidate = self._study.value.candidate
        if candidate is None:
            return self._answer(self._study, self.prompts, self._reading.value.state)
        return self._answer_candidate(self._study, candidate)

    def focus(self) -> ArmAnswers:
        """Read once, then a delta and passages read again for each question."""
        return self._answer_focused(self._reading, self.setup.model)

    def adapted_focus(self) -> ArmAnswers:
        """As `adapted`, then as `focus`: how a server answers on a studied document."""
        study = self._study
        adapter, chosen = study.value.adapter, study.value.chosen
        assert adapter is not None
        model = self.setup.model if chosen is None else chosen.trained.view.model
        return self._answer_focused(_Done(adapter, study.seconds, study.token_passes), model)

    def ntp_only(self) -> ArmAnswers:
        """A study without rollouts that costs what `adapted` does, gate on."""
        refine = self.setup.refine
        config = next_token_config(
            refine,
            num_tokens=len(self.document),
            num_places=num_probe_places(len(self.document), refine),
            num_neutral=len(self.setup.neutral or ()),
            budget=self._study.token_passes,
        )
        return self._answer_studied(self._studied(config), steps=config.steps)

    def reread(self) -> ArmAnswers:
        """The document is read twice."""
        model, size = self.setup.model, self.setup.refine.segment_tokens
        begin = time.perf_counter()
        tokens_T = self._reading.value.tokens_T.repeat(2)
        usage = Usage()
        work = read_segments(model, tokens_T, segment_tokens=size, entropy=False, keep_states=False)
        reading = _finish(quanta_alone(usage.run(work, 0, 0)))
        done = _Done(None, time.perf_counter() - begin, token_passes(usage))
        return self._answer(done, self.prompts, reading.end.state)

    def retrieval(self) -> ArmAnswers:
        """The best passage alone."""
        return self._answer_passages(1, after=False)

    def retrieval_top(self) -> ArmAnswers:
        """The best passages alone."""
        return self._answer_passages(self.setup.retrieval.num_passages, after=False)

    def retrieval_after(self) -> ArmAnswers:
        """The best passages, read from the state at the document's end."""
        return self._answer_passages(self.setup.retrieval.num_passages, after=True)

    # ---- answering -------------------------------------------------------------------------------

    def _answer_studied(self, study: _Done[Refiner], **detail: Any) -> ArmAnswers:
        adapter, chosen = study.value.adapter, study.value.chosen
        assert adapter is not None
        detail = {**detail, **adapter.manifest.get("result", {})}
        if chosen is None:
            return self._answer(study, self.prompts, adapter.state, detail=detail)
        return self._answer_candidate(study, chosen, detail=detail)

    def _answer_candidate(
        self, study: _Done[Refiner], candidate: Candidate, *, detail: dict[str, Any] | None = None
    ) -> ArmAnswers:
        view = candidate.trained.view
        return self._answer(
            study,
            self.prompts,
            candidate.end_state,
            view.ask_delta,
            model=view.model,
            num_adapted=len(self.prompts),
            detail=detail,
        )

    def _answer_focused(self, done: _Done[Adapter], model: FastWeightModel) -> ArmAnswers:
        begin = time.perf_counter()
        focus = Focus(
            model,
            done.value,
            self.prompts,
            self.setup.focus,
            seed=self.seed,
            similarity=self.setup.similarity,
            line_break=self._line_break,
            ends=LineEnd(self.setup.tokenizer),
        )
        _finish(focus.run())
        seconds = done.seconds + time.perf_counter() - begin
        passes = done.token_passes + token_passes(focus.usage)
        states = [model.faded(done.value.state, share) for share in focus.memory_shares]
        return self._answer(
            _Done(focus, seconds, passes),
            [[*read, *prompt] for read, prompt in zip(focus.passages, self.prompts, strict=True)],
            RecurrentState.stack(states),
            LoraDelta.padded(focus.deltas),
            model=model,
            num_adapted=sum(focus.adapted),
            detail={"questions": [result.to_dict() for result in focus.results]},
        )

    @property
    def _line_break(self) -> list[int]:
        return self.setup.tokenizer.encode("\n", continues=True)

    def _answer_passages(self, num: int, *, after: bool) -> ArmAnswers:
        begin = time.perf_counter()
        tokenizer = self.setup.tokenizer
        index = PassageIndex(self.document, tokenizer.decode, self.setup.retrieval)
        line_break = self._line_break
        prompts = []
        for prompt in self.prompts:
            passages = index.best(tokenizer.decode(prompt), num)
            read = [token for passage in passages for token in (*passage, *line_break)]
            prompts.append([*(line_break if after else []), *read[: -len(line_break)], *prompt])
        reading = self._reading
        state = reading.value.state if after else self.setup.model.init_state(1)
        seconds = time.perf_counter() - begin + after * reading.seconds
        return self._answer(_Done(None, seconds, after * reading.token_passes), prompts, state)

    def _answer(
        self,
        done: _Done[Any],
        prompts: Sequence[Sequence[int]],
        state: RecurrentState,
        delta: LoraDelta | None = None,
        *,
        model: FastWeightModel | None = None,
        num_adapted: int = 0,
        detail: dict[str, Any] | None = None,
    ) -> ArmAnswers:
        begin = time.perf_counter()
        answers: Answers = self.answerer.answer(prompts, state, delta=delta, model=model)
        return ArmAnswers(
            texts=answers.texts,
            num_adapted=num_adapted,
            seconds=done.seconds + time.perf_counter() - begin,
            token_passes=done.token_passes + answers.token_passes,
            detail=detail or {},
        )


_RUN: Final[dict[str, Callable[[CaseArms], ArmAnswers]]] = {
    name: getattr(CaseArms, name) for name in ARMS
}


def _finish(work: Iterator[Any]) -> Any:
    """Run a generator of quanta to its end; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value
