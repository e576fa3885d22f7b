"""Practice in recall: keys with values, in prose or in lists, then questions about them.

Where several values are asked for, the order of the answer is one that can be known: that of the
keys in the question, and for the values of one key that of the document. A model that is shown
both orders learns to mix them, digit by digit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from imprint.adapters.evaluation.wordings import RULER, TRAINING, Wording, join_words
from imprint.adapters.evaluation.words import ADJECTIVES, NOUNS
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.phrases import phrase
from imprint.adapters.training.rereading import NUM_PASSAGES, reread
from imprint.adapters.training.samples import PROSE_WEIGHT, Sample
from imprint.adapters.training.sentence_wordings import cut
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.tokenizer import Tokenizer

_NUM_ASKED = (1, 2, 3, 4, 4, 4, 4, 4)
"""How many keys a question asks for at once, where it may ask for several."""
_NUM_VALUES = (2, 3, 4, 4, 4, 4)
"""How many values a key has, where it has several."""

Held = tuple[Wording, str, list[str]]
"""A wording, a key (or several, joined), and its values in the order in which they are asked."""


class NeedleTasks:
    """Draws samples; `rng` and the arguments decide everything."""

    def __init__(self, prose: Prose, tokenizer: Tokenizer) -> None:
        self.prose = prose
        self.tokenizer = tokenizer

    # ---- what is hidden

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

    def _words(self, rng: random.Random, low: int, high: int) -> str:
        return " ".join(rng.choice(self.prose.words) for _ in range(rng.randint(low, high)))

    def _wording(self, rng: random.Random) -> Wording:
        """One of the training wordings, one of a grammar, or one of random words: what a key and
        its value have around them is not to be learnt by heart."""
        draw = rng.random()
        if draw < 0.25:
            return rng.choice(TRAINING)
        if draw < 0.7:
            return phrase(rng)
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

    # ---- needles in prose

    def ruler(self, rng: random.Random, length: int) -> Sample:
        """Needles in RULER's wording."""
        return self._needles(rng, length, [RULER])

    def queries(self, rng: random.Random, length: int) -> Sample:
        """Needles in RULER's wording; some questions ask for several keys, or for all values."""
        return self._needles(rng, length, [RULER], several=0.7)

    def needles(self, rng: random.Random, length: int) -> Sample:
        """Needles in one to three wordings; of one wording, some are asked for together."""
        wordings = [self._wording(rng) for _ in range(rng.randint(1, 3))]
        return self._needles(rng, length, wordings, several=0.4 if len(wordings) == 1 else 0.0)

    def rereads(self, rng: random.Random, length: int) -> Sample:
        """Needles in prose, where passages around what a question asks for are read again before
        it; others beside them, and now and then not all that it asks for."""
        wordings = [RULER if rng.random() < 0.5 else self._wording(rng)]
        return self._needles(rng, length, wordings, several=0.7, again=True)

    def sentences(self, rng: random.Random, length: int) -> Sample:
        """Needles in one to three wordings cut from sentences of the corpus, one value each; for
        two samples of five passages are read again before a question."""
        again = rng.random() < 0.4
        cuts = (cut(rng, rng.choice(self.prose.documents)) for _ in range(rng.randint(1, 3)))
        wordings = [wording or self._wording(rng) for wording in cuts]
        return self._needles(rng, length, wordings, single=True, again=again)

    def _needles(
        self,
        rng: random.Random,
        length: int,
        wordings: list[Wording],
        *,
        several: float = 0.0,
        single: bool = False,
        again: bool = False,
    ) -> Sample:
        """Up to 16 needles in prose, then questions about all of them; about some where passages
        are read `again` before each.

        The share `several` has more values a key, or more keys a question; with `single` every key
        has one value.
        """
        held = self._held(rng, length, wordings, several, single=single)
        encode = self.tokenizer.encode_batch
        groups = self._groups(rng, held, several)
        passage_tokens = 0
        if again:
            groups = rng.sample(groups, min(len(groups), max(length // 768, 1)))
            passage_tokens = rng.choice((48, 64, 64, 96)) if length > 512 else 48
        asked = [self._ask(rng, *item) for item in groups]
        hidden = _merged(rng, [(w, key, value) for w, key, values in held for value in values])
        needles = encode([" " + w.needle.format(key=key, value=v) for w, key, v in hidden])
        intro = wordings[0].intro_many if len(needles) > 1 else wordings[0].intro
        head = self.tokenizer.encode(intro + "\n") if intro and rng.random() < 0.7 else []
        spent = len(head) + sum(map(len, needles))
        spent += sum(len(prompt) + sum(map(len, parts)) for prompt, parts in asked)
        spent += len(groups) * NUM_PASSAGES * (passage_tokens + 1) if again else 0
        pieces = self._pieces(rng, length - spent)
        places = sorted(rng.randint(0, len(pieces)) for _ in needles)
        for place, needle in reversed(list(zip(places, needles, strict=True))):
            pieces.insert(place, needle)
        document = head + [token for piece in pieces for token in piece]
        offsets = list(accumulate(map(len, pieces), initial=len(head)))
        starts = [offsets[place + i] for i, place in enumerate(places)]
        line_break = self.tokenizer.encode("\n")
        sample = Sample()
        sample.add(document, PROSE_WEIGHT)
        for (prompt, parts), (_, _, values) in zip(asked, groups, strict=True):
            if again:
                wanted = [s for s, row in zip(starts, hidden, strict=True) if row[2] in values]
                sample.add(reread(rng, document, wanted, passage_tokens, line_break), 0.0)
            sample.add(prompt, 0.0)
            sample.add_answer(parts)
        return sample

    def _held(
        self,
        rng: random.Random,
        length: int,
        wordings: list[Wording],
        several: float,
        *,
        single: bool,
    ) -> list[Held]:
        many_values = rng.random() >= 0.85 - 0.4 * several and not single
        num_values = rng.choice(_NUM_VALUES) if many_values else 1
        largest = max(min(length // (64 * num_values), 16 // num_values), 1)
        num_keys = rng.randint(1, rng.randint(1, largest))
        if num_values == 1 and rng.random() < several:  # whole questions of four
            num_keys = 4 * rng.randint(1, max(largest // 4, 1))
        keys = {self.key(rng) for _ in range(num_keys)}
        held = [
            (rng.choice(wordings), key, [self.value(rng) for _ in range(num_values)])
            for key in sorted(keys)
        ]
        rng.shuffle(held)
        return held

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

    # ---- questions

    def _groups(self, rng: random.Random, held: list[Held], several: float) -> list[Held]:
        """The keys as they are asked for: alone, or some of one wording together."""
        if len(held) < 2 or rng.random() >= several or len({w.needle for w, _, _ in held}) > 1:
            return held
        return _grouped(rng, held)

    def _ask(
        self, rng: random.Random, wording: Wording, key: str, values: list[str]
    ) -> tuple[list[int], list[list[int]]]:
        """The prompt, and the values of its right continuation."""
        many = len(values) > 1
        question = (wording.question_many if many else wording.question).format(query=key)
        prefix = (wording.prefix_many if many else wording.prefix).format(query=key)
        draw, end = rng.random(), ".\n"
        if draw < 0.4:
            prompt = f"\n{question}{prefix}"
        elif draw < 0.7 and key in prefix:  # the start of the answer says it all, in fewer tokens
            prompt = f"\n{prefix.strip()}"
        else:
            prompt, end = DEFAULT_QUESTION_TEMPLATE.format(question=question), "\n"
        tokens, *parts = self.tokenizer.encode_batch([prompt, *_parts(values, end)])
        return tokens, parts

    # ---- little prose, or none

    def dense(self, rng: random.Random, length: int) -> Sample:
        """Needles of one wording with little between them, then a question about each: what is
        practised is to tell keys apart."""
        return self._dense(rng, length, several=0.0)

    def dense_lists(self, rng: random.Random, length: int) -> Sample:
        """The same, where most questions ask for several keys, or a key has several values: what is
        practised is to go on to the next one."""
        return self._dense(rng, length, several=0.9)

    def _dense(self, rng: random.Random, length: int, several: float) -> Sample:
        sample = Sample()
        while (room := length - len(sample.tokens)) > 0:
            wording = RULER if rng.random() < 0.35 else self._wording(rng)
            num_values = rng.choice(_NUM_VALUES) if rng.random() < several / 2 else 1
            num_keys = rng.randint(2, max(min(room // (56 * num_values), 12 // num_values), 2))
            keys = list(dict.fromkeys(self.key(rng) for _ in range(num_keys)))
            held = [(wording, key, [self.value(rng) for _ in range(num_values)]) for key in keys]
            rows = _merged(rng, [(w, key, value) for w, key, values in held for value in values])
            pieces = [wording.needle.format(key=key, value=value) for _, key, value in rows]
            for _ in range(rng.randint(0, 2)):
                pieces.insert(rng.randint(0, len(pieces)), self.prose.run(rng, 1)[0])
            sample.add(self.tokenizer.encode(" ".join(pieces)), PROSE_WEIGHT)
            asked = rng.sample(held, len(held))
            for item in _grouped(rng, asked) if rng.random() < several else asked:
                prompt, parts = self._ask(rng, *item)
                sample.add(prompt, 0.0)
                sample.add_answer(parts)
            sample.add(self.tokenizer.encode("\n"), 0.0)
        return sample

    def associations(self, rng: random.Random, length: int) -> Sample:
        """Short keys with short values, in random words that a list shares, then every key again.

        The less there is around keys and values, the easier it is to find out that the key decides:
        lists of every difficulty are drawn. Without these no binding was learnt in 28 million
        tokens, with them in four million.
        """
        return self._associations(rng, length, several=0.0)

    def lists(self, rng: random.Random, length: int) -> Sample:
        """The same, where keys are asked for together, and some have several values."""
        return self._associations(rng, length, several=0.9)

    def _associations(self, rng: random.Random, length: int, several: float) -> Sample:
        sample = Sample()
        encode = self.tokenizer.encode
        while len(sample.tokens) < length:
            difficulty = rng.choice([0.0, 0.3, 0.6, 1.0])
            words = [self._words(rng, 0, int(most * difficulty)) for most in (4, 3, 3, 4, 6)]
            start, link, end, other_start, other_link = words
            asked_start = start if rng.random() < 0.5 else other_start
            asked_link = link if rng.random() < 0.5 else other_link
            long_key, many_digits, is_word = 0.8 * difficulty, 0.5 * difficulty, rng.random() < 0.4
            num_values = rng.choice(_NUM_VALUES) if rng.random() < several / 2 else 1
            held: dict[str, list[str]] = {}
            for _ in range(rng.choice([2, 3, 4, 6, 8]) if num_values == 1 else rng.randint(1, 3)):
                key = self.key(rng) if rng.random() < long_key else rng.choice(self.prose.words)
                held[key] = []
                for _ in range(num_values):
                    digits = rng.randint(1, 7) if rng.random() < many_digits else 1
                    number = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
                    held[key].append(rng.choice(self.prose.words) if is_word else number)
            mark = rng.choice([". ", "\n", "; ", ", "])
            rows = _merged(rng, [(RULER, key, v) for key, values in held.items() for v in values])
            lines = [_join(start, key, link, value, end) for _, key, value in rows]
            sample.add(encode(mark.join(lines) + "\n"), PROSE_WEIGHT)
            asked: list[Held] = [
                (RULER, key, held[key]) for key in rng.sample(list(held), len(held))
            ]
            for _, key, values in _grouped(rng, asked) if rng.random() < several else asked:
                sample.add(encode(_join(asked_start, key, asked_link)), 0.0)
                sample.add_answer(self.tokenizer.encode_batch(_parts(values, "")))
                sample.add(encode("\n"), 0.0)
        return sample

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
                sample.add_answer([target])
        return sample


def _merged(
    rng: random.Random, rows: list[tuple[Wording, str, str]]
) -> list[tuple[Wording, str, str]]:
    """The rows shuffled, where those of one key keep their order."""
    keys = [key for _, key, _ in rows]
    rng.shuffle(keys)
    left = {key: iter([row for row in rows if row[1] == key]) for key in keys}
    return [next(left[key]) for key in keys]


def _grouped(rng: random.Random, held: list[Held]) -> list[Held]:
    """Neighbours together in one question."""
    groups, start = [], 0
    while start < len(held):
        part = held[start : start + rng.choice(_NUM_ASKED)]
        values = [value for _, _, values in part for value in values]
        groups.append((part[0][0], join_words([key for _, key, _ in part]), values))
        start += len(part)
    return groups


def _parts(values: Sequence[str], end: str) -> list[str]:
    """The values joined as keys are, cut before each value's comma."""
    last = len(values) - 1
    texts = [f" {values[0]}"]
    texts += [f", {'and ' if i == last else ''}{values[i]}" for i in range(1, last + 1)]
    texts[-1] += end
    return texts


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
