"""A study as its owner sees it: the text in tokens with their entropies, and what each step tried.

Ids become text here, in the API process, from the document in the journal. Knows no HTTP.
"""

import asyncio
import struct
from math import isfinite
from statistics import fmean
from typing import Any

from imprint.models.tokenizer import Tokenizer
from imprint.server import study_journal
from imprint.server.errors import ConflictError, GoneError
from imprint.server.journal import Journal
from imprint.server.journal_thread import JournalThread
from imprint.server.messages import StepBranches
from imprint.server.records import READY, AdaptationRow
from imprint.server.replies import list_object
from imprint.server.study_journal import StudyRow

PROFILE_PIECES = 240


class StudyView:
    """Reads studies back."""

    def __init__(self, journal: JournalThread, tokenizer: Tokenizer) -> None:
        self._journal = journal
        self._tokenizer = tokenizer

    async def tokens(self, row: AdaptationRow, *, after: int, limit: int) -> dict[str, Any]:
        """Pieces of the text behind token `after`, and how unsure the model was of each.

        Joined, the texts of all pages are the document. The first token has no entropy: nothing
        was read before it. Raises ConflictError before the document is read, GoneError after its
        text was let go.
        """
        study, text = await self._study(row)
        return await asyncio.to_thread(_token_page, row, study, text, after, limit)

    async def steps(self, row: AdaptationRow, *, after: int, limit: int) -> dict[str, Any]:
        """What the steps behind step `after` tried: cue, truth and rollouts as text, rewards.

        Raises as `tokens` does.
        """
        study, text = await self._study(row)
        found = await self._journal(study_journal.steps, row.id, after=after, limit=limit + 1)
        data = await asyncio.to_thread(self._step_objects, row, study, text, found[:limit])
        page = list_object(data, has_more=len(found) > limit, key="step")
        return {"adaptation": row.id, **page, "num_tokens": row.num_tokens}

    async def profile(self, row: AdaptationRow) -> dict[str, Any]:
        """The entropies of the whole document in few numbers. Raises as `tokens` does."""
        study, _ = await self._study(row)
        return await asyncio.to_thread(_profile, row, study)

    async def _study(self, row: AdaptationRow) -> tuple["_Study", str]:
        kept = await self._journal(study_journal.reading, row.id)
        if kept is None:
            if row.active:
                raise ConflictError(
                    f"the document of {row.id} is not read yet; ask again soon",
                    code="study_not_ready",
                    retry_after_s=1.0,
                )
            raise _gone(row)
        parts = await self._journal(Journal.parts, row.id)
        ends = kept.ends
        if ends is None:
            ends = await asyncio.to_thread(self._ends, parts)
            if len(ends) != 2 * len(kept.entropies):
                raise _gone(row)  # studied with another tokenizer
            await self._journal(study_journal.set_ends, row.id, ends)
        return _Study(StudyRow(kept.entropies, ends)), "".join(parts)

    def _ends(self, parts: list[str]) -> bytes:
        ends: list[int] = []
        before = 0
        for part in parts:
            found = self._tokenizer.token_ends(part, continues=bool(ends))
            ends += [before + end for end in found]
            before += len(part)
        ends[-1:] = [before] if ends else []
        return struct.pack(f"<{len(ends)}I", *ends)

    def _step_objects(
        self, row: AdaptationRow, study: "_Study", text: str, steps: list[StepBranches]
    ) -> list[dict[str, Any]]:
        cue = int(row.method.get("cue_tokens", 0))
        length = int(row.method.get("rollout_length", 0))
        return [
            {
                "step": step.step,
                "num_positions": step.num_positions,
                "positions": [
                    {
                        "position": position,
                        "cue": study.text(text, position - cue, position),
                        "truth": study.text(text, position, position + length),
                        "rollouts": self._rollouts(step, index),
                    }
                    for index, position in enumerate(step.positions)
                ],
            }
            for step in steps
        ]

    def _rollouts(self, step: StepBranches, index: int) -> list[dict[str, Any]]:
        if not step.rollouts:
            return []
        pairs = zip(step.rollouts[index], step.rewards[index], strict=True)
        return [{"text": self._tokenizer.decode(ids), "reward": reward} for ids, reward in pairs]


class _Study:
    """Tokens of a document by number: where they stand in its text, and their entropies."""

    def __init__(self, row: StudyRow) -> None:
        assert row.ends is not None
        self._entropies, self._ends = row.entropies, row.ends
        self.num_tokens = len(row.ends) // 4

    def text(self, text: str, first: int, end: int) -> str:
        """The text of tokens `first` to `end`, cut to those that exist."""
        return text[self.start(max(first, 0)) : self.start(min(end, self.num_tokens))]

    def start(self, token: int) -> int:
        """Characters of the text before a token; behind the last one, all of them."""
        return 0 if token == 0 else int(struct.unpack_from("<I", self._ends, 4 * (token - 1))[0])

    def entropies(self) -> tuple[float, ...]:
        """All of them, in nats: of the second token first. Those that are no numbers count as 0."""
        values = struct.unpack(f"<{self.num_tokens}e", self._entropies)[:-1]
        return tuple(value if isfinite(value) else 0.0 for value in values)

    def entropy(self, token: int) -> float | None:
        """How unsure the model was, in nats, of what this token would be."""
        if token == 0:
            return None
        (value,) = struct.unpack_from("<e", self._entropies, 2 * (token - 1))
        return round(float(value), 3) if isfinite(value) else None


def _profile(row: AdaptationRow, study: _Study) -> dict[str, Any]:
    values = study.entropies() or (0.0,)
    ranked = sorted(values)
    pieces = min(PROFILE_PIECES, len(values))
    bounds = [i * len(values) // pieces for i in range(pieces + 1)]
    means = [fmean(values[bounds[i] : bounds[i + 1]]) for i in range(pieces)]
    return {
        "object": "study.profile",
        "adaptation": row.id,
        "num_tokens": study.num_tokens,
        "entropy_mean": round(fmean(values), 3),
        "low": round(ranked[len(ranked) // 20], 3),
        "high": round(ranked[-1 - len(ranked) // 20], 3),
        "entropies": [round(mean, 3) for mean in means],
    }


def _token_page(
    row: AdaptationRow, study: _Study, text: str, after: int, limit: int
) -> dict[str, Any]:
    first = min(after, study.num_tokens)
    end = min(first + limit, study.num_tokens)
    starts = [study.start(token) for token in range(first, end + 1)]
    return {
        "object": "study.tokens",
        "adaptation": row.id,
        "num_tokens": study.num_tokens,
        "first": first,
        "texts": [text[starts[i] : starts[i + 1]] for i in range(len(starts) - 1)],
        "entropies": [study.entropy(token) for token in range(first, end)],
        "has_more": end < study.num_tokens,
    }


def _gone(row: AdaptationRow) -> GoneError:
    why = "was imported or made by another version" if row.status in READY else f"is {row.status}"
    return GoneError(
        f"how {row.id} was studied is not kept: the adaptation {why}", code="study_gone"
    )
