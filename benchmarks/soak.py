"""A server under mixed load while its workers are killed: nothing lost or leaked, flat memory.

Every document holds a secret of its own. Clients keep studying, asking, deleting and completing on
a server with two workers, few slots and almost no memory for adapters; one worker is killed again
and again. The result is one JSON object; the exit status is 1 where a promise was broken. Run it
through `make soak`; the tests run it for some seconds.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from imprint.adapters.evaluation.wordings import RULER

PROSE = (
    "The harbor was quiet that morning. Gulls sat on the wall and watched the boats. "
    "An old man mended a net beside the steps. The ferry was late again. "
)
KEYS = ("lantern", "anchor", "ledger", "violin", "compass", "kettle", "saddle", "mirror")
METHODS: tuple[dict[str, Any], ...] = (
    {"type": "read"},
    {"type": "refine", "preset": "fast", "steps": 1, "positions": 2, "group_size": 2},
)
FLAGS = ("--workers", "2", "--num-slots", "4", "--segment-tokens", "64")
TINY_CACHE_BYTES = 3_000_000
BASE = {
    "model": "imprint-tiny",
    "prompt": "The harbor",
    "max_tokens": 8,
    "temperature": 0,
    "logprobs": 1,
}
GIVE_UP_S = 120.0


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


class Soak:
    """The load on one server."""

    def __init__(self, url: str, num_documents: int, seed: int) -> None:
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
            response = self._http.post(path, json=body)
            if response.status_code < 400:
                reply: dict[str, Any] = response.json()
                return reply
            code = response.json()["error"]["code"]
            self.tally.add(f"refused_{code}")
            if response.status_code != 503 or time.monotonic() > deadline:
                raise RuntimeError(f"{path}: {response.status_code} {code}")
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
            job = self._http.get(f"/v1/adaptations/{id}").json()
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
        response = self._http.delete(f"/v1/adaptations/{canary.id}")
        if response.status_code != 200:
            self.tally.broke(f"{canary.id} is not deleted: {response.json()['error']['code']}")
        self.tally.add("deleted")
        if self._http.get(f"/v1/adaptations/{canary.id}").status_code != 404:
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

    def _one(self, work: Any) -> bool:
        try:
            work()
        except (RuntimeError, httpx.HTTPError) as error:
            self.tally.broke(str(error) or type(error).__name__)
        return True

    @staticmethod
    def _run(num_threads: int, step: Any) -> None:
        def loop() -> None:
            while step():
                pass

        threads = [threading.Thread(target=loop) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Server:
    """The server, its workers, and what they are put through."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        command = [sys.executable, "-m", "imprint.server.cli", "serve", "--port", str(port)]
        command += ["--data-dir", str(folder / "data"), *FLAGS]
        command += ["--adapter-host-bytes", str(TINY_CACHE_BYTES)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.memory: dict[str, list[tuple[float, float]]] = {"api": [], "worker-1": []}
        self.num_crashes = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def wait(self) -> None:
        """Until both workers stand."""
        deadline = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            try:
                workers = httpx.get(f"{self.url}/health").json()["workers"]
            except httpx.TransportError:
                workers = []
            if sum(worker["up"] for worker in workers) == 2:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the server does not stand:\n{self.log.read_text()}")

    def torment(self, crash_every_s: float) -> None:
        """Kill worker 0 again and again, and watch the memory of those that live."""
        for work, every_s in ((self._crash, crash_every_s), (self._measure, 1.0)):
            thread = threading.Thread(target=self._repeat, args=(work, every_s))
            thread.start()
            self._threads.append(thread)

    def _repeat(self, work: Any, every_s: float) -> None:
        while not self._ended.wait(every_s):
            work()

    def _workers(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                command = " ".join(child.cmdline())
            except psutil.NoSuchProcess:  # it has just died
                continue
            if match := re.search(r'"identity":"(worker-\d)\.', command):
                found[match[1]] = child
        return found

    def _crash(self) -> None:
        if (victim := self._workers().get("worker-0")) is not None:
            os.kill(victim.pid, signal.SIGKILL)
            self.num_crashes += 1

    def _measure(self) -> None:
        processes = {"api": psutil.Process(self.process.pid), **self._workers()}
        for name, samples in self.memory.items():
            if name in processes:
                mib = processes[name].memory_info().rss / 2**20
                samples.append((time.monotonic() / 60, mib))

    def release(self) -> None:
        """No crash and no measurement from now on."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        self.release()
        self.process.terminate()
        return self.process.wait(60)


def slope(samples: list[tuple[float, float]]) -> float | None:
    """MiB a minute by least squares, over the second half: the first one fills caches."""
    late = samples[len(samples) // 2 :]
    if len(late) < 2:
        return None
    mean_t = sum(t for t, _ in late) / len(late)
    mean_m = sum(m for _, m in late) / len(late)
    spread = sum((t - mean_t) ** 2 for t, _ in late)
    return sum((t - mean_t) * (m - mean_m) for t, m in late) / spread


def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it; the result."""
    server = Server(folder)
    try:
        server.wait()
        load = Soak(server.url, arguments.documents, arguments.seed)
        before = load.base()
        server.torment(arguments.crash_every)
        load.fill(arguments.clients)
        load.ask_all(arguments.clients)
        load.mix(arguments.clients, arguments.seconds)
        server.release()
        load.ask_all(arguments.clients)
        same = load.base() == before
        status = server.stop()
    finally:
        server.process.kill()
        server.process.wait()
    counts = load.tally.counts
    return {
        "seconds": arguments.seconds,
        "documents": len(load.canaries),
        "crashes": server.num_crashes,
        "counts": dict(sorted(counts.items())),
        "recall": round(counts["recalled"] / max(counts["answers"], 1), 4),
        "base_model_unchanged": same,
        "exit_status": status,
        "memory_mib": {name: round(s[-1][1], 1) for name, s in server.memory.items() if s},
        "memory_slope_mib_per_minute": {
            name: None if (found := slope(s)) is None else round(found, 3)
            for name, s in server.memory.items()
        },
        "broken": load.tally.broken,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of mixed load")
    parser.add_argument("--documents", type=int, default=50, help="that are there at any time")
    parser.add_argument("--crash-every", type=float, default=60.0, help="seconds between crashes")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-soak-") as folder:
        result = soak(arguments, Path(folder))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if result["broken"] or not result["base_model_unchanged"] else 0


if __name__ == "__main__":
    sys.exit(main())
