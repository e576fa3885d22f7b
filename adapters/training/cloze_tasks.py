"""Practice in reading as it is: prose, then questions made of its own sentences."""

from __future__ import annotations

import random
from itertools import accumulate

from imprint.adapters.training.clozes import cloze
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.rereading import NUM_PASSAGES, reread
from imprint.adapters.training.samples import PROSE_WEIGHT, Sample
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.tokenizer import Tokenizer

_SHORTEST = 128
"""Tokens of a text with its questions, at least."""
_PASSAGE_TOKENS = (48, 64, 64, 96)


class ClozeTasks:
    """Draws samples; `rng` and the arguments decide everything."""

    def __init__(self, prose: Prose, tokenizer: Tokenizer) -> None:
        self.prose = prose
        self.tokenizer = tokenizer

    def clozes(self, rng: random.Random, length: int) -> Sample:
        """Texts, each followed by questions about it; for one text of four, passages are read
        again before each question."""
        sample = Sample()
        while (room := length - len(sample.tokens)) >= _SHORTEST:
            size = room if rng.random() < 0.6 else rng.randint(_SHORTEST, room)
            self._text(rng, sample, size, again=rng.random() < 0.25)
        return sample

    def _text(self, rng: random.Random, sample: Sample, size: int, *, again: bool) -> None:
        """About `size` tokens of prose and questions."""
        room = int(size * rng.uniform(0.35, 0.75))
        left = size - room
        sentences = self.prose.run(rng, room * 5)
        # a sentence that starts with a space is tokenised the same alone and in company
        pieces = self.tokenizer.encode_batch([" " + sentence for sentence in sentences])
        ends = list(accumulate(map(len, pieces)))
        num = max(sum(end <= room for end in ends), 1)
        document = [token for piece in pieces[:num] for token in piece][: max(room, 1)]
        sample.add(document, PROSE_WEIGHT)
        line_break = self.tokenizer.encode("\n")
        passage_tokens = rng.choice(_PASSAGE_TOKENS) if len(document) > 512 else 32
        for i in [*rng.sample(range(num), num), *rng.sample(range(num), num)]:
            asked = cloze(rng, sentences[i])
            if asked is None:
                continue
            question, answer = asked
            prompt = DEFAULT_QUESTION_TEMPLATE.format(question=question)
            tokens, target = self.tokenizer.encode_batch([prompt, f" {answer}\n"])
            left -= len(tokens) + len(target)
            left -= NUM_PASSAGES * (passage_tokens + 1) if again else 0
            if left < 0:
                break
            if again:
                start = ends[i] - len(pieces[i])
                sample.add(reread(rng, document, [start], passage_tokens, line_break), 0.0)
            sample.add(tokens, 0.0)
            sample.add_answer([target])
        sample.add(line_break, 0.0)
