"""Places in the server's bounded queues, and how many of them one owner may hold. Counts only;
knows neither what waits there nor HTTP."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from imprint.server.errors import OverloadedError, RateLimitedError
from imprint.server.metrics import Metrics

OUT_OF_REACH = 1 << 62


class ShareError(RateLimitedError):
    """The owner holds as much of a queue as one may; others would find room."""

    code = "share_exceeded"


@dataclass(frozen=True, slots=True)
class Share:
    """The part of each queue that is one owner's at most; 1 where there is only one owner."""

    part: float

    def of(self, whole: int) -> int:
        """How many of so many; out of reach where no other bound holds than the queue's own."""
        most = max(1, int(self.part * whole))
        return most if most < whole else OUT_OF_REACH


class Places:
    """One queue's places, each taken for as long as a context lasts."""

    def __init__(self, what: str, most: int, share: Share, metrics: Metrics) -> None:
        """At most `most` of `what` (a plural) at a time."""
        self._what = what
        self._most = most
        self._most_of_one = share.of(most)
        self._metrics = metrics
        self._taken: Counter[str] = Counter()

    @property
    def num_taken(self) -> int:
        """Places that are taken now."""
        return self._taken.total()

    @contextmanager
    def take(self, owner: str) -> Iterator[None]:
        """A place of this owner; raises ShareError or OverloadedError where there is none."""
        self.refuse_without_room(owner)
        self._taken[owner] += 1
        try:
            yield
        finally:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]

    def refuse_without_room(self, owner: str) -> None:
        """Raises what `take` would."""
        own = self._taken[owner]
        if own >= self._most_of_one:
            raise share_error(self._metrics, f"of yours, {own} {self._what} are open")
        if self.num_taken >= self._most:
            self._metrics.rejections.labels(reason="queue_full").inc()
            raise OverloadedError(f"{self.num_taken} {self._what} are open; try again later")


def share_error(metrics: Metrics, reason: str, retry_after_s: float = 1.0) -> ShareError:
    """What an owner hears who holds its share, and its count."""
    metrics.rejections.labels(reason="key_share").inc()
    message = f"{reason}, as many as one key's name may have here; try again later"
    return ShareError(message, retry_after_s=retry_after_s)
