"""A server under mixed load while its processes are killed: nothing lost or leaked, flat memory.

Clients keep studying, asking, deleting and completing on a server with two workers, few slots and
almost no memory for adapters. One worker is killed again and again and, in turn with it, a few
times the API process, which is started again. At the end the workers that live say whether they
still hold the base weights as they were loaded. The result is one JSON object; the exit status is 1
where a promise was broken. Run it through `make soak`; the tests run it for some seconds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from soak_clients import Clients
from soak_server import Server


def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it; the result."""
    server = Server(folder)
    try:
        server.wait()
        load = Clients(server.url, server.outages, arguments.documents, arguments.seed)
        before = load.base()
        server.torment(arguments.crash_every, arguments.crashes, arguments.api_crashes)
        load.fill(arguments.clients)
        load.ask_all(arguments.clients)
        load.mix(arguments.clients, arguments.seconds)
        server.release()
        server.wait()
        load.ask_all(arguments.clients)
        same = load.base() == before
        status = server.stop()
    finally:
        server.release()
        server.kill()
    counts = load.tally.counts
    return {
        "seconds": arguments.seconds,
        "documents": len(load.canaries),
        "crashes": server.num_crashes,
        "counts": dict(sorted(counts.items())),
        "recall": round(counts["recalled"] / max(counts["answers"], 1), 4),
        "base_model_unchanged": same,
        "workers_whose_weights_are_kept": server.num_weights_kept(),
        "exit_status": status,
        "memory_mib": {name: round(s[-1][1], 1) for name, s in server.memory.items() if s},
        "memory_slope_mib_per_minute": server.slopes(),
        "broken": load.tally.broken,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of mixed load")
    parser.add_argument("--documents", type=int, default=50, help="that are there at any time")
    parser.add_argument("--crash-every", type=float, default=60.0, help="seconds between crashes")
    parser.add_argument("--crashes", type=int, help="at most; default: no bound")
    parser.add_argument("--api-crashes", type=int, default=3, help="of the API process among them")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-soak-") as folder:
        result = soak(arguments, Path(folder))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    kept = result["base_model_unchanged"] and result["workers_whose_weights_are_kept"] == 2
    return 0 if kept and not result["broken"] else 1


if __name__ == "__main__":
    sys.exit(main())
