"""Events of an adaptation, live: none missed, none twice. Knows journal and jobs; knows no HTTP.

Every event is read from the journal; memory only says when to look again. So there is no seam
between a page of old events and the new ones.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from imprint.server.errors import WorkFailedError
from imprint.server.jobs import Jobs
from imprint.server.journal import Journal
from imprint.server.journal_thread import JournalThread
from imprint.server.places import Places
from imprint.server.records import EventRow

PAGE = 100


class EventFeed:
    """Follows jobs for many clients at once."""

    def __init__(self, journal: JournalThread, jobs: Jobs, places: Places) -> None:
        self._journal = journal
        self._jobs = jobs
        self._places = places

    @property
    def num_streams(self) -> int:
        """Streams that are open now."""
        return self._places.num_taken

    async def follow(
        self, id: str, owner: str, *, after: int
    ) -> AsyncGenerator[EventRow | dict[str, Any], None]:
        """Events behind number `after` until the job has ended, and progress (a dict) in between.

        Raises NotFoundError, also when the adaptation is deleted meanwhile; ShareError or
        OverloadedError where too many streams are open; and OverloadedError when the server stops:
        a client then comes back with the last number it has seen.
        """
        with self._places.take(owner):
            shown: dict[str, Any] = {}
            while True:
                job = self._jobs.active(id)
                news = None if job is None else job.news()
                row = await self._jobs.get(id, owner)
                events = await self._journal(Journal.events, id, after=after, limit=PAGE)
                for event in events:
                    yield event
                    after = event.sequence
                    shown = {} if job is None else job.progress  # an event says it better
                if len(events) == PAGE:
                    continue
                if not row.active:
                    return
                self._jobs.refuse_when_draining()
                if job is None or news is None:
                    raise WorkFailedError("internal_error", "nothing runs this adaptation")
                if job.progress != shown:
                    shown = job.progress
                    yield dict(shown)
                await asyncio.wait({news})
