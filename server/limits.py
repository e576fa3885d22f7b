"""How much each owner may ask for: token buckets of requests and of tokens, its share of queues.
Knows no HTTP, no keys.

A bucket holds a minute's worth and fills steadily. Tokens are counted when they are known: those of
documents and prompts at the door, those of completions when they are made. So a bucket may go below
zero, by one request at most per request that was let in; until it is above zero again nothing more
is let in.
"""

import time
from collections.abc import Callable

from imprint.server.errors import RateLimitedError
from imprint.server.metrics import Metrics
from imprint.server.places import Share


class Bucket:
    """Fills with `per_minute` a minute, up to a minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until it holds `amount`; 0 when it does."""
        now = self._clock()
        grown = (now - self._filled_at) * self._per_minute / 60
        self._level, self._filled_at = min(self._per_minute, self._level + grown), now
        return max(0.0, (amount - self._level) * 60 / self._per_minute)

    def take(self, amount: float) -> None:
        """Take out `amount`, also below zero."""
        self._level -= amount


class Limits:
    """The buckets of every owner; 0 a minute means no limit. `share` holds for every queue."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        requests_per_minute: int,
        tokens_per_minute: int,
        share: Share,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.share = share
        self._metrics = metrics
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute
        self._clock = clock
        # As many as there are names of keys.
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def admit_request(self, owner: str) -> None:
        """Count a request; raises RateLimitedError for one too many."""
        if self._requests_per_minute:
            bucket = self._bucket(self._requests, owner, self._requests_per_minute)
            if wait_s := bucket.wait_s(1):
                raise self._error("requests", self._requests_per_minute, wait_s)
            bucket.take(1)

    def admit_tokens(self, owner: str, num_tokens: int) -> None:
        """Count tokens that are sent; raises RateLimitedError while those before are too many."""
        if self._tokens_per_minute:
            bucket = self._bucket(self._tokens, owner, self._tokens_per_minute)
            if wait_s := bucket.wait_s(1):
                raise self._error("tokens", self._tokens_per_minute, wait_s)
            bucket.take(num_tokens)

    def spend_tokens(self, owner: str, num_tokens: int) -> None:
        """Count tokens that were made."""
        if self._tokens_per_minute:
            self._bucket(self._tokens, owner, self._tokens_per_minute).take(num_tokens)

    def _bucket(self, buckets: dict[str, Bucket], owner: str, per_minute: int) -> Bucket:
        if owner not in buckets:
            buckets[owner] = Bucket(per_minute, self._clock)
        return buckets[owner]

    def _error(self, what: str, per_minute: int, wait_s: float) -> RateLimitedError:
        self._metrics.rejections.labels(reason=f"{what}_per_minute").inc()
        return RateLimitedError(
            f"over the limit of {per_minute} {what} per minute; try again later",
            retry_after_s=wait_s,
        )
