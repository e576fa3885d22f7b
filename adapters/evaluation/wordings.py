"""How a needle is written and asked for: RULER's wording, others to train on, and some never
trained on.

A model trained on one template learns the template. `TRAINING` and `RULER` may be trained on;
`HELD_OUT` is for reports only and must not be used in training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """One way to hide values under keys and to ask for them; `_many` texts serve several answers.

    Placeholders: `{key}` and `{value}` in `needle`, `{query}` (the asked keys, joined) everywhere
    else.
    """

    name: str
    """Short unique name, shown in reports."""
    needle: str
    """One sentence inserted into the document."""
    question: str
    """The question when one value is the answer."""
    question_many: str
    """The question when several values are."""
    prefix: str
    """The start of the answer, after the question; begins with a space, ends without one."""
    prefix_many: str
    """The same for several values."""
    intro: str = ""
    """First line of the document, or nothing."""
    intro_many: str = ""
    """The same for several values."""


def join_words(words: Sequence[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: RULER's way of joining keys."""
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + ", and " + words[-1]


RULER = Wording(
    name="ruler",
    intro=(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    ),
    intro_many=(
        "Some special magic numbers are hidden within the following text. "
        "Make sure to memorize it. I will quiz you about the numbers afterwards."
    ),
    needle="One of the special magic numbers for {key} is: {value}.",
    question="What is the special magic number for {query} mentioned in the provided text?",
    question_many=(
        "What are all the special magic numbers for {query} mentioned in the provided text?"
    ),
    prefix=" The special magic number for {query} mentioned in the provided text is",
    prefix_many=" The special magic numbers for {query} mentioned in the provided text are",
)
"""Texts of NVIDIA/RULER at c3f5e3b (Apache-2.0), `numbers`, after its singular replacements."""

TRAINING: tuple[Wording, ...] = (
    Wording(
        name="access_code",
        needle="The access code of the {key} is {value}.",
        question="What is the access code of the {query}?",
        question_many="What are all the access codes of the {query}?",
        prefix=" The access code of the {query} is",
        prefix_many=" The access codes of the {query} are",
    ),
    Wording(
        name="telephone",
        needle="Anyone who wishes to reach the {key} must dial {value}.",
        question="Which telephone number reaches the {query}?",
        question_many="Which telephone numbers reach the {query}?",
        prefix=" To reach the {query}, dial",
        prefix_many=" To reach the {query}, dial",
        intro="The text below contains a telephone number. Remember it.",
        intro_many="The text below contains telephone numbers. Remember them.",
    ),
    Wording(
        name="ledger",
        needle="In the ledger, the entry for {key} reads {value}.",
        question="What does the ledger entry for {query} read?",
        question_many="What do the ledger entries for {query} read?",
        prefix=" Answer:",
        prefix_many=" Answer:",
    ),
    Wording(
        name="key_value",
        needle="{key}: {value}.",
        question="{query}:",
        question_many="All values of {query}:",
        prefix="",
        prefix_many="",
    ),
    Wording(
        name="locker",
        needle="Remember that {value} opens the locker marked {key}.",
        question="Which number opens the locker marked {query}?",
        question_many="Which numbers open the lockers marked {query}?",
        prefix=" The locker marked {query} is opened by",
        prefix_many=" The lockers marked {query} are opened by",
    ),
    Wording(
        name="serial",
        needle="A small plate gave {value} as the serial number of the {key}.",
        question="Give the serial number of the {query}.",
        question_many="Give every serial number of the {query}.",
        prefix=" The serial number of the {query} is",
        prefix_many=" The serial numbers of the {query} are",
    ),
    Wording(
        name="catalogue",
        needle="The museum lists its {key} under catalogue number {value}.",
        question="Under which catalogue number is the {query} listed?",
        question_many="Under which catalogue numbers is the {query} listed?",
        prefix=" Answer: number",
        prefix_many=" Answer: numbers",
        intro="Read the text and keep the catalogue number in mind.",
        intro_many="Read the text and keep the catalogue numbers in mind.",
    ),
    Wording(
        name="population",
        needle='"Exactly {value} people live in {key} today," the mayor said.',
        question="How many people live in {query}, according to the mayor?",
        question_many="How many people live in {query}, according to the mayor? Name every figure.",
        prefix=" According to the mayor, the number for {query} is",
        prefix_many=" According to the mayor, the numbers for {query} are",
    ),
    Wording(
        name="magic_short",
        needle="The magic number for {key} is {value}.",
        question="What is the magic number for {query}?",
        question_many="What are the magic numbers for {query}?",
        prefix=" Answer:",
        prefix_many=" Answer:",
    ),
    Wording(
        name="weight",
        needle="When they put the {key} on the scale, it showed {value} grams.",
        question="What did the scale show for the {query}?",
        question_many="What did the scale show for the {query}? Give all readings.",
        prefix=" The scale showed",
        prefix_many=" The scale showed",
    ),
)
"""Wordings to train on, besides `RULER`."""

HELD_OUT: tuple[Wording, ...] = (
    Wording(
        name="vault",
        needle="The combination for the vault called {key} was set to {value}.",
        question="What was the combination for the vault called {query} set to?",
        question_many="What were the combinations for the vaults called {query} set to?",
        prefix=" The combination for the vault called {query} was set to",
        prefix_many=" The combinations for the vaults called {query} were set to",
        intro="Somewhere in this text a combination is given. You will be asked for it.",
        intro_many="Somewhere in this text combinations are given. You will be asked for them.",
    ),
    Wording(
        name="passenger",
        needle="On the passenger list, ticket {value} belonged to {key}.",
        question="Which ticket belonged to {query} on the passenger list?",
        question_many="Which tickets belonged to {query} on the passenger list?",
        prefix=" Answer: ticket",
        prefix_many=" Answer: tickets",
    ),
    Wording(
        name="distance",
        needle="Astronomers measured the star {key} and found it {value} miles away.",
        question="How many miles away did astronomers find the star {query}?",
        question_many=(
            "How many miles away did astronomers find the stars {query}? Give all distances."
        ),
        prefix=" The distance to {query} in miles is",
        prefix_many=" The distances to {query} in miles are",
    ),
)
"""Wordings for reports only."""

WORDINGS: dict[str, Wording] = {wording.name: wording for wording in (RULER, *TRAINING, *HELD_OUT)}
"""Every wording by name."""
