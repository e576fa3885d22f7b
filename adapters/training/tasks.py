"""What the bundled model practises: repetition, needles with questions, prose.

A sample is a token sequence of exactly the asked length and a weight per token for the loss of
predicting it: one or more for answers and repeats, `PROSE_WEIGHT` for what surrounds them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from imprint.adapters.training.cloze_tasks import ClozeTasks
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.needle_tasks import NeedleTasks
from imprint.adapters.training.reading_tasks import Excerpts, Passages, chain, short_chain
from imprint.adapters.training.samples import PROSE_WEIGHT, Sample
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.tokenizer import Tokenizer

PROSE_SHARE = 0.25
"""Share of the prose that is predicted at all; the rest would cost as much and teach little."""

_SHORTEST_TRACKING = 512
_SHORTEST_EXCERPT = 192


class Tasks:
    """Draws samples; `rng` and the arguments decide everything."""

    def __init__(
        self,
        prose: Prose,
        tokenizer: Tokenizer,
        passages: Passages | None = None,
        excerpts: Excerpts | None = None,
    ) -> None:
        """The kind `questions` needs passages, the kind `excerpts` needs excerpts."""
        self.prose = prose
        self.tokenizer = tokenizer
        self.passages = passages
        self.excerpted = excerpts
        needles = NeedleTasks(prose, tokenizer)
        self.kinds: dict[str, Callable[[random.Random, int], Sample]] = {
            "repeat": self.repeat,
            "needles": needles.needles,
            "ruler": needles.ruler,
            "dense": needles.dense,
            "pairs": needles.pairs,
            "associations": needles.associations,
            "dense_lists": needles.dense_lists,
            "lists": needles.lists,
            "queries": needles.queries,
            "rereads": needles.rereads,
            "sentences": needles.sentences,
            "tracking": self.tracking,
            "chains": self.chains,
            "clozes": ClozeTasks(prose, tokenizer).clozes,
            "questions": self.questions,
            "excerpts": self.excerpts,
            "prose": self.plain_prose,
        }

    def draw(self, kind: str, rng: random.Random, length: int) -> Sample:
        """A sample of exactly `length` tokens."""
        sample = self.kinds[kind](rng, length)
        while len(sample.tokens) < length:
            self._fill(sample, rng, length)
        sample = sample.cut(length)
        for i, weight in enumerate(sample.weights):
            if weight == PROSE_WEIGHT:
                sample.weights[i] = weight / PROSE_SHARE if rng.random() < PROSE_SHARE else 0.0
        return sample

    def _fill(self, sample: Sample, rng: random.Random, length: int) -> None:
        missing = length - len(sample.tokens)
        text = "\n" + " ".join(self.prose.run(rng, missing * 4))
        sample.add(self.tokenizer.encode(text)[: max(missing, 1)], PROSE_WEIGHT)

    def _prose_tokens(self, rng: random.Random, num_tokens: int) -> list[int]:
        return self.tokenizer.encode(" ".join(self.prose.run(rng, num_tokens * 5)))[:num_tokens]

    def plain_prose(self, rng: random.Random, length: int) -> Sample:
        sample = Sample()
        sample.add(self._prose_tokens(rng, length), PROSE_WEIGHT)
        return sample

    def repeat(self, rng: random.Random, length: int) -> Sample:
        """Spans of random or natural tokens that come again, from a random start, after a gap."""
        sample = Sample()
        vocab = self.tokenizer.vocab_size
        natural = rng.random() < 0.5
        while len(sample.tokens) < length:
            size = rng.randint(8, 64)
            span = (
                self._prose_tokens(rng, size)
                if natural
                else [rng.randrange(1, vocab) for _ in range(size)]
            )
            gap = int(rng.random() ** 2 * max(length - len(sample.tokens) - 2 * size, 0))
            start = rng.randrange(0, max(size // 2, 1))
            sample.add(span, 0.0 if not natural else PROSE_WEIGHT)
            if gap:
                sample.add(self._prose_tokens(rng, gap), PROSE_WEIGHT)
            # the first token cannot be known; the second may be ambiguous
            sample.add(span[start : start + 1], 0.0)
            sample.add(span[start + 1 :], 1.0)
        return sample

    def _num_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _ask(self, sample: Sample, question: str, answer: str) -> None:
        prompt = DEFAULT_QUESTION_TEMPLATE.format(question=question)
        tokens, target = self.tokenizer.encode_batch([prompt, f" {answer}\n"])
        sample.add(tokens, 0.0)
        sample.add_answer([target])

    def tracking(self, rng: random.Random, length: int) -> Sample:
        """A chain of variables in noise, as RULER hides it; short ones where that does not fit."""
        if length < _SHORTEST_TRACKING:
            return self.chains(rng, length)
        sample = Sample()
        prompt, answer = chain(rng, self._num_tokens, length)
        tokens, target = self.tokenizer.encode_batch([prompt, answer])
        sample.add(tokens, PROSE_WEIGHT / 4)
        sample.add(target, 1.0)
        return sample

    def chains(self, rng: random.Random, length: int) -> Sample:
        """Short chains of variables, and which names hold a value."""
        sample = Sample()
        while len(sample.tokens) < length:
            sentences = self.prose.run(rng, 300) if rng.random() < 0.5 else []
            document, questions = short_chain(rng, sentences)
            sample.add(self.tokenizer.encode(document), PROSE_WEIGHT)
            for question, answer in questions:
                self._ask(sample, question, answer)
            sample.add(self.tokenizer.encode("\n"), 0.0)
        return sample

    def questions(self, rng: random.Random, length: int) -> Sample:
        """Passages, then all the questions about them. Raises ValueError without a file of them."""
        if self.passages is None:
            raise ValueError("the kind 'questions' needs a file of questions")
        sample = Sample()
        while (room := length - len(sample.tokens)) > 64:
            asked = self.passages.draw(rng, self._num_tokens, room)
            if asked is None:
                break
            sample.add(self.tokenizer.encode(asked.document), PROSE_WEIGHT)
            for question, answer in asked.questions:
                self._ask(sample, question, answer)
            sample.add(self.tokenizer.encode("\n"), 0.0)
        return sample

    def excerpts(self, rng: random.Random, length: int) -> Sample:
        """Parts of long passages, then the questions that they answer. Raises ValueError without a
        file that has such."""
        if not self.excerpted:
            raise ValueError(
                "the kind 'excerpts' needs questions about passages of 3000 characters"
            )
        sample = Sample()
        while (room := length - len(sample.tokens)) > _SHORTEST_EXCERPT:
            share = 1.0 if rng.random() < 0.5 else rng.uniform(0.3, 1.0)
            asked = self.excerpted.draw(rng, int(max(room * share, _SHORTEST_EXCERPT) * 2.5))
            sample.add(self.tokenizer.encode(asked.document), PROSE_WEIGHT)
            for question, answer in asked.questions:
                self._ask(sample, question, answer)
            sample.add(self.tokenizer.encode("\n"), 0.0)
        return sample
