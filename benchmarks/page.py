"""How smoothly the page's heat map scrolls: time between frames of a headless Chromium, and what
the document holds at the end. The time of its main thread is the processor's, which others on the
machine change little.

A real server reads a document; the page shows it, and the text is scrolled through as fast as a
wheel does, to the end and back. `--against FOLDER` does the same with another version of the
page's files, by turns, so that both meet the same machine. Needs Debian's chromium and the `dev`
extra. Limit: one machine, no GPU, no screen; compare within one run only.
"""

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Page, Route, sync_playwright

from imprint.server.client import ImprintClient
from imprint.server.commands.local_server import local_server
from imprint.server.config import Settings

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "server" / "static"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-precise-memory-info"]

SCROLL = """
async ([pixels, longest]) => {
  const box = document.querySelector(".heat-box");
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  const arrived = () => (pixels < 0 ? box.scrollTop <= 0
    : box.scrollTop + box.clientHeight >= box.scrollHeight - 2
      && box.querySelector(".heat-end").textContent.startsWith("End")
      && box.querySelector(".heat-text").lastElementChild.textContent.endsWith("."));
  const deltas = [];
  const began = performance.now();
  let before = await frame();
  while (!arrived() && performance.now() - began < longest) {
    box.scrollTop += pixels;
    const now = await frame();
    deltas.push(now - before);
    before = now;
  }
  return {
    deltas, arrived: arrived(), spans: document.querySelectorAll(".heat-text .t").length,
    heap: performance.memory.usedJSHeapSize,
  };
}
"""


def main() -> int:
    """Print one JSON object: per version and direction, the frames and what is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=30_000, help="of the document, at least")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=120, help="scrolled a frame")
    parser.add_argument("--longest", type=float, default=90, help="seconds of one way")
    parser.add_argument("--against", type=Path, help="folder with other files of the page")
    options = parser.parse_args()
    versions = {"now": STATIC, **({"against": options.against} if options.against else {})}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), log_level="error")
        with local_server(settings) as url, sync_playwright() as playwright:
            id, num_tokens = read_document(url, options.tokens)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
            for _ in range(options.rounds):
                for name, files in versions.items():
                    page = browser.new_page(base_url=url, viewport={"width": 1280, "height": 800})
                    page.route("**/static/*", partial(serve, files))
                    found[name].append(scrolled(page, id, options))
                    page.close()
            browser.close()
    report = {name: summary(rounds) for name, rounds in found.items()}
    head = {"document_tokens": num_tokens, "rounds": options.rounds}
    sys.stdout.write(json.dumps({**head, **report}, indent=1) + "\n")
    return 0


def read_document(url: str, num_tokens: int) -> tuple[str, int]:
    """Id and length of a document that the server has read; it ends with a full stop."""
    example = (ROOT / "deploy/examples/harbor.txt").read_text(encoding="utf-8")
    parts = 1 + num_tokens // 1184  # tokens of the example
    text = "".join(f"{example.strip()}\n\nPart {i} ends.\n\n" for i in range(parts)).strip()
    with ImprintClient(url, timeout_s=600) as client:
        adaptation = client.adapt(text, method={"type": "read"})
        done = client.wait(adaptation.id)
    return done.id, int(done.body["num_tokens"])


def serve(files: Path, route: Route) -> None:
    """A file of the page, of this version."""
    path = files / route.request.url.rpartition("/")[2]
    route.fulfill(body=path.read_bytes(), content_type=TYPES.get(path.suffix, "text/plain"))


def scrolled(page: Page, id: str, options: argparse.Namespace) -> dict[str, Any]:
    """Down to the end, and up again."""
    page.goto(f"/#/{id}")
    page.locator(".heat-text .t").first.wait_for(timeout=60_000)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.setTimeDomain", {"timeDomain": "threadTicks"})
    devtools.send("Performance.enable")
    found = {}
    for way, pixels in (("down", options.pixels), ("up", -options.pixels)):
        before = busy_s(devtools)
        found[way] = page.evaluate(SCROLL, [pixels, 1000 * options.longest])
        found[way]["busy_s"] = busy_s(devtools) - before
    return found


def busy_s(devtools: CDPSession) -> float:
    """Processor seconds of the page's main thread so far, whoever else uses the machine."""
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    return float(next(item["value"] for item in metrics if item["name"] == "TaskDuration"))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Times in milliseconds, over all rounds; what is held, of the last."""
    ways = {}
    for way in ("down", "up"):
        deltas = sorted(delta for found in rounds for delta in found[way]["deltas"])
        ways[way] = {
            "frames": len(deltas),
            "median_ms": round(statistics.median(deltas), 1),
            "p95_ms": round(deltas[int(0.95 * len(deltas))], 1),
            "p99_ms": round(deltas[int(0.99 * len(deltas))], 1),
            "longest_ms": round(deltas[-1], 1),
            "busy_ms_a_frame": round(
                1000 * sum(found[way]["busy_s"] for found in rounds) / len(deltas), 2
            ),
            "over_50_ms": sum(delta > 50 for delta in deltas),
            "arrived": all(found[way]["arrived"] for found in rounds),
            "spans": rounds[-1][way]["spans"],
            "heap_mb": round(rounds[-1][way]["heap"] / 1e6, 1),
        }
    return ways


if __name__ == "__main__":
    sys.exit(main())
