"""Wordings drawn from a small grammar: many ways in which English says that something has a value.

A model that has practised a dozen wordings reads those; what a key and its value have around them
must vary more than a list written by hand does. Words that carry the meaning of the wordings kept
for reports are not used here.
"""

from __future__ import annotations

import random
import re

from imprint.adapters.evaluation.wordings import Wording


def _several(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_WORDS: dict[str, tuple[str, ...]] = {
    "a": _several(
        "number,code,price,size,height,age,score,total,rank,room,page,volume,password,label,"
        "grade,salary,fee,rent,cost,reading,pulse,badge,seat,licence,account,target,sum,length,"
        "depth,speed,pressure,dose,balance,debt,record,extension,postcode,channel,platform,"
        "gate,serial number,file,reference,signal,voltage,case,order,house number,deposit"
    ),
    "unit": _several(
        "pounds,dollars,pages,kilometres,people,books,litres,seconds,trees,bricks,coins,days,"
        "visitors,tons,points,steps,sheep,letters,rooms,acres,watts,copies,votes,barrels"
    ),
    "who": _several(
        "The clerk,The captain,A teacher,The engineers,Her brother,The committee,Two farmers,"
        "The nurse,My uncle,The editor,A visitor,The guard,The council,An old man,The doctor,"
        "The shopkeeper,The judge,Our guide,The inspector,Somebody,The children,A driver"
    ),
    "context": _several(
        "In the register,According to the clerk,On the second page,In the end,That morning,"
        "As the report says,In her diary,At the office,By the last count,On the map,In May,"
        "After the storm,In the annual report,As everybody knows,In the old archive,Last year,"
        "On the screen,In the contract,At the harbour,Under the lamp"
    ),
    "tail": _several(",,,, after the storm, now, at last, that year, today"),
    "the": ("", "", "the ", "our ", "Mr. "),
    "is": ("is", "was", "equals", "remains", "became"),
    "has": ("has", "had", "shows", "received", "got", "keeps"),
    "given": ("was given to", "was assigned to", "went to", "is for", "was kept for", "is held by"),
    "gave": ("gave", "handed", "sent", "assigned", "promised", "lent"),
    "wrote": ("wrote down", "read out", "noted", "remembered", "shouted", "whispered", "typed"),
    "looked": ("looked at", "examined", "visited", "tested", "asked about", "inspected", "weighed"),
    "saw": ("saw", "counted", "reported", "discovered", "estimated", "got"),
    "holds": ("holds", "contains", "lost", "needs", "produced", "saved", "offers", "sold"),
    "made": ("built", "sold", "opened", "painted", "founded", "repaired", "closed", "printed"),
}
"""What may stand for `<name>` in a frame; the same word wherever the name comes again."""

_ATTRIBUTE_FRAMES = (
    "The <a> of <the>{key} <is> {value}<tail>.",
    "<context>, the <a> of <the>{key} <is> {value}.",
    "<the>{key} <has> a <a> of {value}<tail>.",
    "<context>, <a> {value} <given> <the>{key}.",
    "<context>, <the>{key} <has> <a> {value}.",
    "<who> <gave> <a> {value} to <the>{key}<tail>.",
    "<who> <wrote> {value} as the <a> of <the>{key}<tail>.",
    "For <the>{key} the <a> <is> {value}<tail>.",
    "{value} <is> the <a> of <the>{key}<tail>.",
    "<A> {value} <given> <the>{key}<tail>.",
    "<who> <looked> <the>{key} and <saw> the <a> {value}<tail>.",
    "It was <the>{key}, <who> said, that <has> <a> {value}.",
)
_ATTRIBUTE_QUESTIONS = (
    ("What is the <a> of {query}?", "What are the <a>s of {query}?"),
    ("Which <a> does {query} have?", "Which <a>s does {query} have?"),
    ("Which <a> <given> {query}?", "Which <a>s were for {query}?"),
    ("Give the <a> of {query}.", "Give all the <a>s of {query}."),
    ("Tell me the <a> of {query}.", "Tell me every <a> of {query}."),
    ("What <a> does the text give for {query}?", "What <a>s does the text give for {query}?"),
    ("I am looking for the <a> of {query}. What is it?", "List the <a>s of {query}."),
    ("{query}: which <a>?", "{query}: which <a>s?"),
)
_ATTRIBUTE_PREFIXES = (
    (" The <a> of {query} <is>", " The <a>s of {query} are"),
    (" The <a> for {query} in the text is", " The <a>s for {query} in the text are"),
    (" {query} has the <a>", " {query} has the <a>s"),
    (" Answer: <a>", " Answer: <a>s"),
    (" <A>", " <A>s"),
    (" Answer:", " Answer:"),
    (" It <is>", " They are"),
    ("", ""),
)
_AMOUNT_FRAMES = (
    "<who> <looked> <the>{key} and <saw> {value} <unit><tail>.",
    "<who> <looked> <the>{key}, and there were {value} <unit> in it.",
    "There are {value} <unit> in <the>{key}<tail>.",
    "<the>{key} <holds> {value} <unit><tail>.",
    "<context>, <the>{key} <holds> {value} <unit>.",
    "<context>, {value} <unit> <given> <the>{key}.",
    "<who> <gave> {value} <unit> to <the>{key}<tail>.",
    "It takes {value} <unit> to reach <the>{key}<tail>.",
    "With {value} <unit>, <the>{key} was ahead of all others<tail>.",
)
_AMOUNT_QUESTIONS = (
    ("How many <unit> are there for {query}?", "How many <unit> are there for {query}? Name all."),
    ("How many <unit> does the text give for {query}?", "Which numbers of <unit> has {query}?"),
    ("What number of <unit> goes with {query}?", "What numbers of <unit> go with {query}?"),
    ("How many <unit> did <who> report about {query}?", "How many <unit> each for {query}?"),
    ("{query}: how many <unit>?", "{query}: how many <unit>?"),
)
_AMOUNT_PREFIXES = (
    (" The number of <unit> for {query} is", " The numbers of <unit> for {query} are"),
    (" {query}, in <unit>:", " {query}, in <unit>:"),
    (" For {query} there are", " For {query} there are"),
    (" The text says", " The text says"),
    (" Answer:", " Answer:"),
    ("", ""),
)
_YEAR_FRAMES = (
    "<the>{key} was <made> in {value}<tail>.",
    "<who> <made> <the>{key} in {value}.",
    "In {value}, <the>{key} was <made><tail>.",
    "{value} was the year in which <who> <made> <the>{key}.",
)
_YEAR_QUESTIONS = (
    ("When was {query} <made>?", "When were {query} <made>?"),
    ("In which year was {query} <made>?", "In which years was {query} <made>?"),
    ("What year does the text give for {query}?", "What years does the text give for {query}?"),
)
_YEAR_PREFIXES = (
    (" {query} was <made> in", " {query} was <made> in"),
    (" The year of {query} is", " The years of {query} are"),
    (" Answer: in", " Answer: in"),
    (" In", " In"),
)
_FAMILIES = (
    (_ATTRIBUTE_FRAMES, _ATTRIBUTE_QUESTIONS, _ATTRIBUTE_PREFIXES),
    (_AMOUNT_FRAMES, _AMOUNT_QUESTIONS, _AMOUNT_PREFIXES),
    (_YEAR_FRAMES, _YEAR_QUESTIONS, _YEAR_PREFIXES),
)
_SHARES = (0.6, 0.3, 0.1)


def phrase(rng: random.Random) -> Wording:
    """A wording whose statement, question and start of the answer are drawn apart."""
    frames, questions, prefixes = rng.choices(_FAMILIES, _SHARES)[0]
    words = {name: rng.choice(choices) for name, choices in _WORDS.items()}
    words["A"] = words["a"].capitalize()
    asked = dict(words)
    if rng.random() < 0.25:  # asked for by another name
        asked["a"], asked["A"] = "number", "Number"
    needle = _filled(rng.choice(frames), words)
    question, question_many = (_filled(text, asked) for text in rng.choice(questions))
    prefix, prefix_many = (_filled(text, asked) for text in rng.choice(prefixes))
    return Wording(
        name="phrase",
        needle=needle[0].upper() + needle[1:] if needle[0] != "{" else needle,
        question=question,
        question_many=question_many,
        prefix=prefix,
        prefix_many=prefix_many,
    )


def _filled(text: str, words: dict[str, str]) -> str:
    """`<name>` replaced; `<who>` within a sentence starts small."""
    text = re.sub(r"<(\w+)>", lambda match: words[match[1]], text)
    return re.sub(r"(?<=[a-z,] )(The|A|An|Her|My|Two|Our)(?= )", lambda m: m[1].lower(), text)
