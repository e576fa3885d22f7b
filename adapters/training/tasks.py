"""What the bundled model practises: repetition, needles with questions, prose.

A sample is a token sequence of exactly the asked length and a weight per token for the loss of
predicting it: one or more for answers and repeats, `PROSE_WEIGHT` for what surrounds them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from imprint.adapters.evaluation.wordings import RULER, TRAINING, Wording, join_words
from imprint.adapters.evaluation.words import ADJECTIVES, NOUNS
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.reading_tasks import Passages, chain, short_chain
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.tokenizer import Tokenizer

PROSE_WEIGHT = 0.04
"""Mean loss weight of a token that is neither an answer nor a repeat."""
PROSE_SHARE = 0.25
"""Share of these tokens that are predicted at all; the rest would cost as much and teach little."""
FIRST_WEIGHT = 4.0
"""Loss weight of the first characters of an answer."""

_SHORTEST_TRACKING = 512


@dataclass(slots=True)
class Sample:
    """Token ids and their loss weights, the same number of each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: list[int], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)

    def add_answer(self, tokens: list[int]) -> None:
        """A space, the value, an end. Its first characters tell whose value it is: the later ones
        follow from them."""
        self.add(tokens[:3], FIRST_WEIGHT)
        self.add(tokens[3:], 1.0)

    def cut(self, length: int) -> Sample:
        return Sample(self.tokens[:length], self.weights[:length])


class Tasks:
    """Draws samples; `rng` and the arguments decide everything."""

    def __init__(
        self, prose: Prose, tokenizer: Tokenizer, passages: Passages | None = None
    ) -> None:
        """The kind `questions` needs passages."""
        self.prose = prose
        self.tokenizer = tokenizer
        self.passages = passages
        self.kinds: dict[str, Callable[[random.Random, int], Sample]] = {
            "repeat": self.repeat,
            "needles": self.needles,
            "ruler": self.ruler,
            "dense": self.dense,
            "pairs": self.pairs,
            "associations": self.associations,
            "queries": self.queries,
            "tracking": self.tracking,
            "chains": self.chains,
            "questions": self.questions,
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

    def key(self, rng: random.Random) -> str:
        """Mostly `adjective-noun`; else words of the corpus, so that keys of any form are read."""
        draw = rng.random()
        if draw < 0.5:
            return f"{rng.choice(ADJECTIVES['train'])}-{rng.choice(NOUNS['train'])}"
        if draw < 0.7:
            return f"{rng.choice(self.prose.words).lower()}-{rng.choice(self.prose.words).lower()}"
        if draw < 0.85:
            return f"{rng.choice(self.prose.words)} {rng.choice(self.prose.words)}"
        return rng.choice(self.prose.words)

    def value(self, rng: random.Random) -> str:
        """Mostly seven digits; else other numbers, now and then words."""
        draw = rng.random()
        if draw < 0.65:
            return str(rng.randrange(10**6, 10**7))
        if draw < 0.85:
            digits = rng.randint(3, 9)
            return str(rng.randrange(10 ** (digits - 1), 10**digits))
        return " ".join(rng.choice(self.prose.words) for _ in range(rng.randint(1, 2)))

    def ruler(self, rng: random.Random, length: int) -> Sample:
        """Needles in RULER's wording."""
        return self._needles(rng, length, [RULER])

    def queries(self, rng: random.Random, length: int) -> Sample:
        """Needles in RULER's wording; some questions ask for several keys, or for all values."""
        return self._needles(rng, length, [RULER], several=0.7)

    def needles(self, rng: random.Random, length: int) -> Sample:
        """Needles in one to three wordings: the training ones and some of random words."""
        return self._needles(rng, length, [self._wording(rng) for _ in range(rng.randint(1, 3))])

    def _words(self, rng: random.Random, low: int, high: int) -> str:
        return " ".join(rng.choice(self.prose.words) for _ in range(rng.randint(low, high)))

    def _wording(self, rng: random.Random) -> Wording:
        """One of the training wordings or, as often, one of random words: what a key and its value
        have around them is not to be learnt by heart."""
        if rng.random() < 0.5:
            return rng.choice(TRAINING)
        start, end = self._words(rng, 0, 6), self._words(rng, 0, 4)
        link = rng.choice([" is", ":", " =", " " + self._words(rng, 1, 4)])
        other_start, other_link = self._words(rng, 0, 6), " " + self._words(rng, 1, 6)
        asked_start = start if rng.random() < 0.6 else other_start
        asked_link = link if rng.random() < 0.5 else other_link + rng.choice(["", link])
        question = f"{self._words(rng, 1, 5)} {{query}} {self._words(rng, 0, 4)}?"
        prefix = f" {asked_start} {{query}}{asked_link}".replace("  ", " ")
        needle = f"{start} {{key}}{link} {{value}} {end}"
        if rng.random() < 0.2:  # the value first
            needle = f"{start} {{value}}{link} {{key}} {end}"
        return Wording(
            name="random",
            needle=needle.strip() + ".",
            question=question,
            question_many=question,
            prefix=prefix,
            prefix_many=prefix,
        )

    def _needles(
        self, rng: random.Random, length: int, wordings: list[Wording], *, several: float = 0.0
    ) -> Sample:
        """Up to 16 needles in prose, then questions about all of them.

        The share `several` has more values a key, or more keys a question.
        """
        num_values = 1 if rng.random() < 0.85 - 0.4 * several else rng.randint(2, 4)
        largest = max(min(length // (64 * num_values), 16 // num_values), 1)
        keys = {self.key(rng) for _ in range(rng.randint(1, rng.randint(1, largest)))}
        held = [
            (rng.choice(wordings), key, [self.value(rng) for _ in range(num_values)])
            for key in sorted(keys)
        ]
        rng.shuffle(held)
        encode = self.tokenizer.encode_batch
        asked = [encode(self._question(rng, *item)) for item in self._groups(rng, held, several)]
        needles = encode(
            [" " + w.needle.format(key=key, value=v) for w, key, vs in held for v in vs]
        )
        rng.shuffle(needles)
        many = len(needles) > 1
        intro = wordings[0].intro_many if many else wordings[0].intro
        head = self.tokenizer.encode(intro + "\n") if intro and rng.random() < 0.7 else []
        spent = len(head) + sum(map(len, needles)) + sum(len(p) + len(t) for p, t in asked)
        pieces = self._pieces(rng, length - spent)
        for needle in needles:
            pieces.insert(rng.randint(0, len(pieces)), needle)
        sample = Sample()
        sample.add(head + [token for piece in pieces for token in piece], PROSE_WEIGHT)
        for prompt, target in asked:
            sample.add(prompt, 0.0)
            sample.add_answer(target)
        return sample

    def _groups(
        self, rng: random.Random, held: list[tuple[Wording, str, list[str]]], several: float
    ) -> list[tuple[Wording, str, list[str]]]:
        """The keys as they are asked for: alone, or some of one wording together."""
        if len(held) < 2 or rng.random() >= several or len({w.name for w, _, _ in held}) > 1:
            return held
        groups, start = [], 0
        while start < len(held):
            part = held[start : start + rng.randint(1, 4)]
            values = [value for _, _, values in part for value in values]
            groups.append((part[0][0], join_words([key for _, key, _ in part]), values))
            start += len(part)
        return groups

    def dense(self, rng: random.Random, length: int) -> Sample:
        """Needles of one wording with little between them, then a question about each: what is
        practised is to tell keys apart."""
        sample = Sample()
        while len(sample.tokens) < length:
            wording = RULER if rng.random() < 0.35 else self._wording(rng)
            num_keys = rng.randint(2, max(min((length - len(sample.tokens)) // 56, 12), 2))
            held = {self.key(rng): self.value(rng) for _ in range(num_keys)}
            pieces = [wording.needle.format(key=key, value=value) for key, value in held.items()]
            for _ in range(rng.randint(0, 2)):
                pieces.insert(rng.randint(0, len(pieces)), self.prose.run(rng, 1)[0])
            sample.add(self.tokenizer.encode(" ".join(pieces)), PROSE_WEIGHT)
            for key in rng.sample(list(held), len(held)):
                texts = self._question(rng, wording, key, [held[key]])
                prompt, target = self.tokenizer.encode_batch(texts)
                sample.add(prompt, 0.0)
                sample.add_answer(target)
            sample.add(self.tokenizer.encode("\n"), 0.0)
        return sample

    def associations(self, rng: random.Random, length: int) -> Sample:
        """Short keys with short values, in random words that a list shares, then every key again.

        The less there is around keys and values, the easier it is to find out that the key decides:
        lists of every difficulty are drawn. Without these no binding was learnt in 28 million
        tokens, with them in four million.
        """
        sample = Sample()
        encode = self.tokenizer.encode
        while len(sample.tokens) < length:
            difficulty = rng.choice([0.0, 0.3, 0.6, 1.0])
            words = [self._words(rng, 0, int(most * difficulty)) for most in (4, 3, 3, 4, 6)]
            start, link, end, other_start, other_link = words
            asked_start = start if rng.random() < 0.5 else other_start
            asked_link = link if rng.random() < 0.5 else other_link
            long_key, many_digits, is_word = 0.8 * difficulty, 0.5 * difficulty, rng.random() < 0.4
            num_keys = rng.choice([2, 3, 4, 6, 8])
            held: dict[str, str] = {}
            for _ in range(num_keys):
                key = self.key(rng) if rng.random() < long_key else rng.choice(self.prose.words)
                digits = rng.randint(1, 7) if rng.random() < many_digits else 1
                number = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
                held[key] = rng.choice(self.prose.words) if is_word else number
            mark = rng.choice([". ", "\n", "; ", ", "])
            lines = [_join(start, key, link, value, end) for key, value in held.items()]
            sample.add(encode(mark.join(lines) + "\n"), PROSE_WEIGHT)
            for key in rng.sample(list(held), len(held)):
                sample.add(encode(_join(asked_start, key, asked_link)), 0.0)
                sample.add_answer(encode(f" {held[key]}"))
                sample.add(encode("\n"), 0.0)
        return sample

    def _pieces(self, rng: random.Random, room: int) -> list[list[int]]:
        """Sentences as tokens, as many as fit into `room` tokens."""
        if room <= 0:
            return []
        # a sentence that starts with a space is tokenised the same alone and in company
        texts = [" " + sentence for sentence in self.prose.run(rng, room * 5)]
        pieces = []
        for piece in self.tokenizer.encode_batch(texts):
            room -= len(piece)
            if room < 0:
                break
            pieces.append(piece)
        return pieces

    def _question(
        self, rng: random.Random, wording: Wording, key: str, values: list[str]
    ) -> list[str]:
        """The prompt and its right continuation."""
        many = len(values) > 1
        question = (wording.question_many if many else wording.question).format(query=key)
        answers = list(values)
        if many and len(values) <= 4 and ", and " not in key:  # else in the order of the keys
            rng.shuffle(answers)
        prefix = (wording.prefix_many if many else wording.prefix).format(query=key)
        draw = rng.random()
        if draw < 0.4:
            return [f"\n{question}{prefix}", f" {join_words(answers)}.\n"]
        if draw < 0.7 and key in prefix:  # the start of the answer says it all, in fewer tokens
            return [f"\n{prefix.strip()}", f" {join_words(answers)}.\n"]
        prompt = DEFAULT_QUESTION_TEMPLATE.format(question=question)
        return [prompt, f" {join_words(answers)}\n"]

    def pairs(self, rng: random.Random, length: int) -> Sample:
        """A dense list of keys and values, then keys whose values are asked."""
        sample = Sample()
        while len(sample.tokens) < length:
            num_pairs = rng.randint(2, max(min(length // 24, 24), 2))
            keys = list(dict.fromkeys(self.key(rng) for _ in range(num_pairs)))
            values = {key: self.value(rng) for key in keys}
            mark = rng.choice([" is ", ": ", " = ", " -> "])
            lines = [f"{key}{mark}{value}" for key, value in values.items()]
            gap = self.prose.run(rng, rng.randint(0, max(length - num_pairs * 30, 0)) * 2)
            sample.add(self.tokenizer.encode("\n".join(lines) + "\n" + " ".join(gap)), PROSE_WEIGHT)
            for key in rng.sample(keys, rng.randint(1, len(keys))):
                prompt, target = self.tokenizer.encode_batch(
                    [f"\n{key}{mark}".rstrip(" "), f" {values[key]}\n"]
                )
                sample.add(prompt, 0.0)
                sample.add_answer(target)
        return sample

    def _num_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _ask(self, sample: Sample, question: str, answer: str) -> None:
        prompt = DEFAULT_QUESTION_TEMPLATE.format(question=question)
        tokens, target = self.tokenizer.encode_batch([prompt, f" {answer}\n"])
        sample.add(tokens, 0.0)
        sample.add_answer(target)

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


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
