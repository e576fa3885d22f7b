"""Needle-in-a-haystack documents after RULER (arXiv 2404.06654): one sample from prose, keys and
values.

Written from the task's description; the prose is the caller's, so numbers compare with published
ones in kind, not digit by digit. Knows nothing of models: lengths come from a callable. Unlike
RULER, keys and values of a sample are distinct, and a document starts anywhere in the prose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from imprint.adapters.evaluation.haystack import Haystack
from imprint.adapters.evaluation.wordings import RULER, Wording, join_words
from imprint.adapters.evaluation.words import ADJECTIVES, NOUNS, Split

_NUM_DEPTHS = 40
_VALUES = range(10**6, 10**7)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleTask:
    """What is hidden and what is asked: `num_keys` keys with `num_values` values each,
    `num_queries` asked.
    """

    name: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __post_init__(self) -> None:
        for field in ("num_keys", "num_values", "num_queries"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_queries > self.num_keys:
            raise ValueError(f"num_queries is {self.num_queries} but num_keys is {self.num_keys}")
        if self.num_needles > _NUM_DEPTHS:
            raise ValueError(f"at most {_NUM_DEPTHS} needles, got {self.num_needles}")

    @property
    def num_needles(self) -> int:
        """Sentences that are hidden."""
        return self.num_keys * self.num_values

    @property
    def num_answers(self) -> int:
        """Values that a complete answer names."""
        return self.num_queries * self.num_values


TASKS: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask(name="niah_single"),
        NeedleTask(name="niah_multikey", num_keys=4),
        NeedleTask(name="niah_multivalue", num_values=4),
        NeedleTask(name="niah_multiquery", num_keys=4, num_queries=4),
    )
}
"""RULER's niah_single_2, niah_multikey_1, niah_multivalue and niah_multiquery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleSample:
    """One document with its question; `document + query` is the prompt, `target` continues it."""

    kind: str
    """Name of the task."""
    wording: str
    """Name of the wording."""
    document: str
    """What is read before the question is known."""
    question: str
    """The question alone, without the start of the answer."""
    answer_prefix: str
    """Start of the answer that the prompt gives away; may be empty."""
    answers: tuple[str, ...]
    """Every value asked for, in the order of the asked keys."""
    keys: tuple[str, ...]
    """The asked keys."""

    @property
    def query(self) -> str:
        """What follows the document in the prompt."""
        return f"\n{self.question}{self.answer_prefix}"

    @property
    def target(self) -> str:
        """A right continuation of the prompt, to train on."""
        return f" {join_words(self.answers)}."


def draw_keys(rng: random.Random, count: int, split: Split) -> list[str]:
    """`count` distinct `adjective-noun` keys from one half of the word lists."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"{rng.choice(ADJECTIVES[split])}-{rng.choice(NOUNS[split])}"] = None
    return list(keys)


def insert_needles(sentences: list[str], needles: list[str], depths: list[int]) -> str:
    """Put needle i between sentences at `depths[i]` percent of them; all joined by spaces."""
    places = sorted(
        (len(sentences) * depth // 100, needle)
        for depth, needle in zip(depths, needles, strict=True)
    )
    pieces: list[str] = []
    start = 0
    for place, needle in places:
        pieces += [*sentences[start:place], needle]
        start = place
    return " ".join(pieces + sentences[start:])


def _fill(
    head: str,
    needles: list[str],
    depths: list[int],
    haystack: Haystack,
    *,
    start: int,
    length: int,
    num_tokens: Callable[[str], int],
) -> str:
    """The longest document of at most `length` tokens, with prose from sentence `start` on."""
    fixed_tokens = num_tokens(head) + sum(num_tokens(f" {needle}") for needle in needles)
    sentences = haystack.run(start, length - fixed_tokens, num_tokens)
    while True:
        document = head + insert_needles(sentences, needles, depths)
        excess_tokens = num_tokens(document) - length
        if excess_tokens <= 0:
            return document
        if not sentences:
            raise ValueError(f"needles and question are {excess_tokens} tokens too long")
        sentences.pop()


def build_sample(
    task: NeedleTask,
    haystack: Haystack,
    *,
    length: int,
    num_tokens: Callable[[str], int],
    seed: int,
    wording: Wording = RULER,
    split: Split = "heldout",
    num_answer_tokens: int = 48,
) -> NeedleSample:
    """One sample whose document, query and `num_answer_tokens` just fit into `length` tokens.

    The same arguments give the same sample. Raises `ValueError` when the needles and the question
    alone are longer.
    """
    rng = random.Random(f"{task.name}:{wording.name}:{split}:{length}:{seed}")
    keys = draw_keys(rng, task.num_keys, split)
    values = [str(value) for value in rng.sample(_VALUES, task.num_needles)]
    per_key = task.num_values
    held = {key: values[i * per_key : (i + 1) * per_key] for i, key in enumerate(keys)}
    asked = rng.sample(keys, task.num_queries)
    needles = [wording.needle.format(key=key, value=value) for key in keys for value in held[key]]
    depths = [
        round(100 * i / (_NUM_DEPTHS - 1)) for i in rng.sample(range(_NUM_DEPTHS), len(needles))
    ]
    many = task.num_answers > 1
    query = join_words(asked)
    question = (wording.question_many if many else wording.question).format(query=query)
    prefix = (wording.prefix_many if many else wording.prefix).format(query=query)
    intro = wording.intro_many if many else wording.intro
    document = _fill(
        f"{intro}\n" if intro else "",
        needles,
        depths,
        haystack,
        start=rng.randrange(len(haystack)),
        length=length - num_answer_tokens - num_tokens(f"\n{question}{prefix}"),
        num_tokens=num_tokens,
    )
    return NeedleSample(
        kind=task.name,
        wording=wording.name,
        document=document,
        question=question,
        answer_prefix=prefix,
        answers=tuple(value for key in asked for value in held[key]),
        keys=tuple(asked),
    )
