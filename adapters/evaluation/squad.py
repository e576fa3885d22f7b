"""SQuAD's exact match and F1: how short answers in words are scored. Pure functions of text.

After the official script of SQuAD 1.1 (arXiv 1606.05250), which LongBench's question answering
uses as well: lower case, ASCII punctuation and articles deleted, then words are compared.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and superfluous spaces."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def exact_answer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals one of the normalised answers."""
    given = normalize_answer(prediction)
    return float(any(given == normalize_answer(answer) for answer in answers))


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, as multisets; the best over the answers.

    0 where no word is shared, so two texts that are empty after normalising score 0 as in the
    script of SQuAD 1.1.
    """
    given = normalize_answer(prediction).split()
    return max((_f1(given, normalize_answer(answer).split()) for answer in answers), default=0.0)


def _f1(given: list[str], wanted: list[str]) -> float:
    num_common = sum((Counter(given) & Counter(wanted)).values())
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(given), num_common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words_found(prediction: str, answers: Sequence[str]) -> float:
    """1 if one of the answers stands in the prediction on word boundaries, both normalised."""
    given = f" {normalize_answer(prediction)} "
    wanted = [normalize_answer(answer) for answer in answers]
    return float(any(answer and f" {answer} " in given for answer in wanted))
