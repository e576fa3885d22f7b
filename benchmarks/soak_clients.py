"""The load of the soak: clients that study, ask, delete and complete, and what they were promised.

Every document holds a secret of its own. Knows HTTP and the server's outages; knows no processes.
"""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from soak_server import GIVE_UP_S, Outages

from imprint.adapters.evaluation.wordings import RULER

PROSE = (
    "The harbor was quiet that morning. Gulls sat on the wall and watched the boats. "
    "An old man mended a net beside the steps. The ferry was late again. "
)
KEYS = ("lantern", "anchor", "ledger", "violin", "compass", "kettle", "saddle", "mirror")
METHODS: tuple[dict[str, Any], ...] = (
    {"type": "read"},
    {"type": "refine", "preset": "fast", "steps": 1, "positions": 2},
)
BASE = {
    "model": "imprint-tiny",
    "prompt": "The harbor",
    "max_tokens": 8,
    "temperature": 0,
    "logprobs": 1,
}


@dataclass(slots=True)
class Canary:
    """A document with its secret, and what was answered at first."""

    id: str
    secret: str
    question: str
    first_answer: str | None = None


@dataclass(slots=True)
class Tally:
    """What happened. Counted under one lock."""

    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        """One more of it."""
        with self.lock:
            self.counts[what] += 1

    def broke(self, promise: str) -> None:
        """A promise was not kept."""
        with self.lock:
            self.broken.append(promise)


class Clients:
    """The load on one server."""

    def __init__(self, url: str, outages: Outages, num_documents: int, seed: int) -> None:
        self._outages = outages
        self.tally = Tally()
        self.canaries: list[Canary] = []
        self.secrets: set[str] = set()
        self._http = httpx.Client(base_url=url, timeout=GIVE_UP_S)
        self._num_documents = num_documents
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()

    # ---- one thing that a client does ----------------------------------------------------------

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As clients do: where the server says that it may be tried again, it is."""
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            response = self.send("POST", path, json=body)
            if response.status_code < 400:
                reply: dict[str, Any] = response.json()
                return reply
            code = response.json()["error"]["code"]
            self.tally.add(f"refused_{code}")
            if response.status_code != 503 or time.monotonic() > deadline:
                raise RuntimeError(f"{path}: {response.status_code} {code}")
            time.sleep(0.2)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request; sent again where the server has gone away meanwhile: all may be done twice."""
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            count = self._outages.count
            try:
                return self._http.request(method, path, **options)
            except httpx.TransportError:
                if not self._outages.since(count) or time.monotonic() > deadline:
                    raise
            self.tally.add("cut_off")
            time.sleep(0.2)

    def study(self) -> None:
        """A new document, until it can be asked."""
        with self._lock:
            number = self._random.randrange(10**6, 10**7)
            key = self._random.choice(KEYS)
            method = self._random.choice(METHODS)
            num_before = self._random.randrange(1, 5)
        secret = str(number)
        needle = RULER.needle.format(key=key, value=secret)
        document = f"{PROSE * num_before}{needle} {PROSE * 2}"
        self.secrets.add(secret)
        id = self.post("/v1/adaptations", {"document": document, "method": method})["id"]
        self.tally.add("accepted")
        status = self._outcome(id)
        if status not in ("succeeded", "rejected"):
            self.tally.broke(f"{id} was accepted and is {status}")
            return
        self.tally.add(status)
        canary = Canary(id, secret, RULER.question.format(query=key))
        with self._lock:
            self.canaries.append(canary)

    def _outcome(self, id: str) -> str:
        deadline = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            job = self.send("GET", f"/v1/adaptations/{id}").json()
            if job.get("status") not in ("queued", "running"):
                return str(job.get("status", job))
            time.sleep(0.05)
        return "still on its way"

    def ask(self, canary: Canary) -> None:
        """Its own secret, at best; the secret of another document, never."""
        body = {"adaptation": canary.id, "questions": [canary.question], "focus": False}
        reply = self.post("/v1/answers", {**body, "max_tokens": 16})
        answer = str(reply["answers"][0]["answer"])
        self.tally.add("answers")
        self.tally.add("recalled" if canary.secret in answer else "not_recalled")
        others = set(re.findall(r"\d{7}", answer)) & self.secrets - {canary.secret}
        if others:
            self.tally.broke(f"{canary.id} told another document's secret: {answer!r}")
        if canary.first_answer is None:
            canary.first_answer = answer
        elif answer != canary.first_answer:
            self.tally.broke(f"{canary.id} answered {canary.first_answer!r}, then {answer!r}")

    def delete(self) -> None:
        """Some document, and a new one in its place."""
        with self._lock:
            canary = self.canaries.pop(self._random.randrange(len(self.canaries)))
        count = self._outages.count
        response = self.send("DELETE", f"/v1/adaptations/{canary.id}")
        # after an outage the first one may have gone on by itself
        gone = response.status_code == 404 and self._outages.since(count)
        if response.status_code != 200 and not gone:
            self.tally.broke(f"{canary.id} is not deleted: {response.json()['error']['code']}")
        self.tally.add("deleted")
        if self.send("GET", f"/v1/adaptations/{canary.id}").status_code != 404:
            self.tally.broke(f"{canary.id} is deleted and still there")
        self.study()

    def base(self) -> dict[str, Any]:
        """What the base model says, with its log-probabilities."""
        self.tally.add("completions")
        choice: dict[str, Any] = self.post("/v1/completions", BASE)["choices"][0]
        return choice

    # ---- all of it -----------------------------------------------------------------------------

    def fill(self, num_threads: int) -> None:
        """Study all documents, many at once."""
        numbers = iter(range(self._num_documents))
        self._run(num_threads, lambda: next(numbers, None) is not None and self._one(self.study))

    def mix(self, num_threads: int, seconds: float) -> None:
        """Everything at once, for a while."""
        end = time.monotonic() + seconds
        self._run(num_threads, lambda: time.monotonic() < end and self._one(self._something))

    def ask_all(self, num_threads: int) -> None:
        """Each document that is there."""
        left = iter(list(self.canaries))

        def one() -> bool:
            canary = next(left, None)
            return canary is not None and self._one(lambda: self.ask(canary))

        self._run(num_threads, one)

    def _something(self) -> None:
        with self._lock:
            dice = self._random.random()
            canary = self._random.choice(self.canaries)
        if dice < 0.05:
            self.delete()
        elif dice < 0.15:
            self.base()
        else:
            try:
                self.ask(canary)
            except RuntimeError as error:
                if canary in self.canaries:  # else somebody has deleted it meanwhile
                    self.tally.broke(str(error))

    def _one(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except (RuntimeError, httpx.HTTPError) as error:
            self.tally.broke(str(error) or type(error).__name__)
        return True

    @staticmethod
    def _run(num_threads: int, step: Callable[[], bool]) -> None:
        def loop() -> None:
            while step():
                pass

        threads = [threading.Thread(target=loop) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
