"""The server that the soak torments: its processes, their deaths, their memory and last words.

Knows processes; knows nothing of what clients ask. Limit: the port is taken and let go before the
server binds it, so another program could take it in between.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

FLAGS = ("--workers", "2", "--num-slots", "4", "--segment-tokens", "64")
TINY_CACHE_BYTES = 3_000_000
GIVE_UP_S = 120.0
WEIGHTS_KEPT = "the base weights are as they were loaded"
"""What a worker says that leaves in order."""


class Outages:
    """Times at which nobody may have been there to answer."""

    def __init__(self) -> None:
        self.count = 0
        """How many have begun."""
        self.now = False

    def begin(self) -> None:
        """The server is about to die."""
        self.count += 1
        self.now = True

    def end(self) -> None:
        """The next one stands."""
        self.now = False

    def since(self, count: int) -> bool:
        """Whether the server may have been away since there were `count` outages."""
        return self.now or self.count != count


class Server:
    """The server, its workers, and what they are put through."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        self._command = [sys.executable, "-m", "imprint.server.cli", "serve", "--port", str(port)]
        self._command += ["--data-dir", str(folder / "data"), *FLAGS]
        self._command += ["--adapter-host-bytes", str(TINY_CACHE_BYTES)]
        self.process = self._start()
        self.outages = Outages()
        self.memory: dict[str, list[tuple[float, float]]] = {"api": [], "worker-1": []}
        """Minutes and MiB, since the last start of the API process."""
        self.num_crashes = {"api": 0, "worker": 0}
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def _start(self) -> "subprocess.Popen[bytes]":
        with self.log.open("a") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

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

    # ---- what it is put through ----------------------------------------------------------------

    def torment(self, crash_every_s: float, num_crashes: int | None, num_api_crashes: int) -> None:
        """Kill the API process and worker 0 in turn, until the former was killed so often, then
        worker 0 again and again; `num_crashes` times, or to the end. Watch the memory of those that
        live."""

        def crash() -> None:
            api, worker = self.num_crashes["api"], self.num_crashes["worker"]
            if api + worker == num_crashes:
                return
            if api < num_api_crashes and api <= worker:
                self._crash_api()
            else:
                self._crash_worker()

        for work, every_s in ((crash, crash_every_s), (self._measure, 1.0)):
            thread = threading.Thread(target=self._repeat, args=(work, every_s))
            thread.start()
            self._threads.append(thread)

    def _repeat(self, work: Callable[[], None], every_s: float) -> None:
        while not self._ended.wait(every_s):
            work()

    def _crash_worker(self) -> None:
        if (victim := self._workers().get("worker-0")) is not None:
            os.kill(victim.pid, signal.SIGKILL)
            self.num_crashes["worker"] += 1

    def _crash_api(self) -> None:
        """Its workers die with it; the next one takes up what was accepted."""
        self.outages.begin()
        self.process.kill()
        self.process.wait()
        self.num_crashes["api"] += 1
        self.process = self._start()
        self.wait()
        for samples in self.memory.values():
            samples.clear()
        self.outages.end()

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

    def _measure(self) -> None:
        try:
            processes = {"api": psutil.Process(self.process.pid), **self._workers()}
            for name, samples in self.memory.items():
                if name in processes:
                    mib = processes[name].memory_info().rss / 2**20
                    samples.append((time.monotonic() / 60, mib))
        except psutil.NoSuchProcess:  # it is being killed
            return

    # ---- the end -------------------------------------------------------------------------------

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

    def kill(self) -> None:
        """Whatever it is at."""
        self.process.kill()
        self.process.wait()

    def num_weights_kept(self) -> int:
        """Workers that, leaving in order, still held the base weights as they were loaded."""
        return self.log.read_text().count(WEIGHTS_KEPT)

    def slopes(self) -> dict[str, float | None]:
        """MiB a minute by process; None where it was watched for too short a time."""
        return {
            name: None if (found := slope(samples)) is None else round(found, 3)
            for name, samples in self.memory.items()
        }


def slope(samples: list[tuple[float, float]]) -> float | None:
    """MiB a minute by least squares, over the second half: the first one fills caches."""
    late = samples[len(samples) // 2 :]
    if len(late) < 2:
        return None
    mean_t = sum(t for t, _ in late) / len(late)
    mean_m = sum(m for _, m in late) / len(late)
    spread = sum((t - mean_t) ** 2 for t, _ in late)
    return sum((t - mean_t) * (m - mean_m) for t, m in late) / spread
