"""Question answering among distractors after RULER (arXiv 2404.06654): its task `qa`.

The passage that holds the answer stands among other passages. Unlike RULER's files, which shuffle
with one seed and so hide it at one place, every sample is shuffled with its own. Knows texts;
lengths come from a callable.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imprint.adapters.evaluation.question_files import FileQuestion

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\n"
)
_HEAD = f"{_INSTRUCTION}The following are given documents.\n\n"
_PREFIX = " Answer:"
_MISSES = 20  # passages too long for what is left before a document counts as full


@dataclass(frozen=True, slots=True, kw_only=True)
class DistractorSample:
    """One document with its question."""

    document: str
    question: str
    answers: tuple[str, ...]

    @property
    def query(self) -> str:
        """What follows the document in the prompt."""
        return f"\n\n{_INSTRUCTION}Question: {self.question}{_PREFIX}"


class DistractorTask:
    """Samples from one file of questions, whose contexts are each other's distractors."""

    def __init__(
        self,
        questions: Sequence[FileQuestion],
        num_tokens: Callable[[str], int],
        *,
        shortest: int,
        num_answer_tokens: int,
        seed: int,
    ) -> None:
        """Asked are the questions with an answer that stands in their context, where question and
        context fit into `shortest` tokens: the same ones at every length, in an order that the
        seed gives.
        """
        self._num_tokens, self._num_answer_tokens, self._seed = num_tokens, num_answer_tokens, seed
        contexts = list(dict.fromkeys(question.context for question in questions))
        self._sizes = {text: num_tokens(_numbered(len(contexts), text)) for text in contexts}
        self._pool = contexts
        self.questions = [
            question
            for question in questions
            if any(a.lower() in question.context.lower() for a in question.answers)
            and self._room(question, shortest) >= self._sizes[question.context]
        ]
        random.Random(f"qa:{seed}").shuffle(self.questions)

    def _room(self, question: FileQuestion, length: int) -> int:
        sample = DistractorSample(document="", question=question.question, answers=question.answers)
        used = self._num_tokens(_HEAD) + self._num_tokens(sample.query)
        return length - used - self._num_answer_tokens

    def sample(self, index: int, length: int) -> DistractorSample:
        """Question `index` among as many distractors as fit into `length` tokens."""
        question = self.questions[index]
        rng = random.Random(f"qa:{length}:{self._seed}:{index}")
        room = self._room(question, length)
        chosen = [question.context]
        left, misses = room - self._sizes[question.context], 0
        for text in rng.sample(self._pool, len(self._pool)):
            if text == question.context:
                continue
            if self._sizes[text] <= left:
                chosen.append(text)
                left -= self._sizes[text]
            else:
                misses += 1
            if misses >= _MISSES:
                break
        while self._num_tokens(_document(chosen)) > room + self._num_tokens(_HEAD):
            chosen.pop()  # the last distractor: together they may have a few tokens more
        rng.shuffle(chosen)
        return DistractorSample(
            document=_document(chosen), question=question.question, answers=question.answers
        )


def _document(passages: Sequence[str]) -> str:
    return _HEAD + "".join(_numbered(i, text) for i, text in enumerate(passages, 1))[:-2]


def _numbered(number: int, text: str) -> str:
    return f"Document {number}:\n{text}\n\n"
