"""`imprint bench serve`: a server under load, and the targets that it is held to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from imprint.server.commands.common import UsageError, add_model, error_console, write_json
from imprint.server.commands.descriptions import Commands, add_command
from imprint.server.config import BUNDLED_MODEL

ADAPTER_BYTES = 2**20
"""Of a short document on the bundled model; what the host tier is to hold is counted in these."""
HELD_ROUNDS = 3.5
"""So many arms' adapters fit: those of three arms stay, those of the fourth are read from disk."""
ROUNDS, QUICK_ROUNDS = 21, 3
TARGETS = (
    ("many documents over one", "throughput", "over_one_document", "at least"),
    ("many documents over none studied", "throughput", "over_no_deltas", "at least"),
    (
        "far more documents than that, over none studied",
        "throughput",
        "rare_over_no_deltas",
        "at least",
    ),
    ("p99 to first text beside a study: more, in quanta", "waiting", "more_in_quanta", "at most"),
    ("the engine's own share of decoding", "own_time", "own_share", "at most"),
)


def add_parser(benchmarks: Commands) -> None:
    """Describe the benchmark."""
    parser = add_command(
        benchmarks,
        "serve",
        "a server under load: throughput, waits, memory, and the targets",
        "imprint bench serve --quick\n"
        "imprint bench serve --load-only --question-rate 20 --duration 60 --json",
        run=run,
        description=(
            "Send documents and questions, which arrive by chance, to a server, and measure "
            "throughput, waits, rejections and memory. Then compare, alternately: answers about "
            "many documents, about one, without deltas, and about far more documents, most of "
            "them on disk; the wait beside a study and idle. Starts a server of its own, unless "
            "--url names one; what is made there is deleted again."
        ),
    )
    add = parser.add_argument
    add("--url", help="a running server, instead of one of its own")
    add_model(parser)
    add("--threads", type=int, metavar="N", help="threads of torch of its own server; default: 1")
    add("--json", action="store_true", help="print all numbers as JSON")
    add("--quick", action="store_true", help="fewer rounds, and 320 documents instead of 1000")
    add("--load-only", action="store_true", help="the open loop, without the targets")
    add("--seed", type=int, default=0, metavar="N", help="seed of arrivals and documents")
    add("--question-rate", type=float, default=8.0, metavar="R", help="questions a second")
    add("--document-rate", type=float, default=0.25, metavar="R", help="documents a second")
    add("--duration", type=float, metavar="S", help="seconds of the open loop; default: 30")
    add("--warm-up", type=float, default=3.0, metavar="S", help="seconds before it counts")
    add("--document-tokens", type=int, default=128, metavar="N", help="length of documents, about")
    add("--max-tokens", type=int, default=16, metavar="N", help="longest answer")
    rounds = f"rounds of the compared arms; default: {ROUNDS}, with --quick {QUICK_ROUNDS}"
    add("--rounds", type=int, metavar="N", help=rounds)
    add(
        "--host-bytes",
        type=int,
        metavar="N",
        help="what its own server holds of adapters in memory; default: so little that nine of ten "
        "of the 1000 documents are read from disk",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `imprint.server.load`; exit code 0 whether targets are met or not."""
    _check(arguments)
    from imprint.server.load.benchmark import LoadBenchmark, run_load_benchmark
    from imprint.server.load.open_loop import OpenLoop
    from imprint.server.load.targets import Effort

    quick = arguments.quick
    num_questions = 64
    effort = Effort(
        rounds=arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        questions=num_questions,
        max_tokens=arguments.max_tokens,
        waits=60 if quick else 200,
        wait_rate=6.0,
        background_tokens=4096,
        seed=arguments.seed,
    )
    load = OpenLoop(
        question_rate=arguments.question_rate,
        document_rate=arguments.document_rate,
        duration_s=arguments.duration or (15.0 if quick else 30.0),
        warm_up_s=arguments.warm_up,
        document_tokens=arguments.document_tokens,
        max_tokens=arguments.max_tokens,
        method={"type": "refine", "preset": "fast"},
        seed=arguments.seed,
    )
    config = LoadBenchmark(
        url=arguments.url,
        model=arguments.model,
        revision=arguments.revision,
        threads=arguments.threads or 1,
        host_bytes=_host_bytes(arguments, num_questions),
        num_studied=num_questions,
        num_many=320 if quick else 1000,
        load=load,
        effort=None if arguments.load_only else effort,
    )
    console = error_console()
    numbers = run_load_benchmark(config, lambda what: console.print(what, markup=False))
    if arguments.json:
        write_json({"command": sys.argv[1:], **numbers})
    else:
        sys.stdout.write("".join(f"{line}\n" for line in table(numbers)))
    return 0


def _host_bytes(arguments: argparse.Namespace, num_questions: int) -> int | None:
    named: int | None = arguments.host_bytes
    if named is not None or arguments.load_only:
        return named
    return round(HELD_ROUNDS * num_questions) * ADAPTER_BYTES


def _check(arguments: argparse.Namespace) -> None:
    for name in ("document_tokens", "max_tokens", "rounds", "host_bytes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("question_rate", "document_rate", "warm_up"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be a number of at least 0")
    if arguments.duration is not None and not 0 < arguments.duration < float("inf"):
        raise UsageError("--duration must be above 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError("--threads must be at least 1")
    if arguments.rounds is not None and arguments.load_only:
        raise UsageError("--rounds counts what --load-only leaves out")
    own = (
        arguments.threads is not None,
        arguments.model != BUNDLED_MODEL,
        arguments.revision,
        arguments.host_bytes is not None,
    )
    if arguments.url is not None and any(own):
        raise UsageError(
            "--url names a running server: --model, --revision, --threads, --host-bytes are its own"
        )


def table(numbers: dict[str, Any]) -> Iterator[str]:
    """The numbers for people."""
    loop = numbers["open_loop"]
    yield f"open loop, {loop['seconds']:g} s (sent at most {_ms(loop['sent_late_s'])} late)"
    yield _line("questions", f"{loop['questions']}, {loop['answers_per_s']:.2f} answers/s")
    yield _line("documents", f"{loop['documents']}, {loop['documents_per_s']:.2f} studied/s")
    yield _line("tokens generated", f"{loop['tokens_per_s']:.1f}/s")
    yield _line("refused or failed", _counts(loop["refused_or_failed"]))
    for name in (
        "refusal_s",
        "time_to_first_text_s",
        "between_texts_s",
        "answer_s",
        "adaptation_s",
    ):
        found = ", ".join(f"{key} {_ms(value)}" for key, value in loop[name].items())
        yield _line(name.removesuffix("_s").replace("_", " "), found or "none")
    yield _line("longest quantum", _ms(loop["longest_quantum_s"]))
    before = loop["memory_before_bytes"]
    for name, nbytes in sorted(loop["peak_memory_bytes"].items()):
        grown = (nbytes - before.get(name, 0)) / 2**20
        yield _line(f"memory of {name}", f"{nbytes / 2**20:.0f} MiB at most ({grown:+.0f} MiB)")
    if "throughput" not in numbers:
        return
    yield ""
    yield "answers a second, all questions at once"
    rates = numbers["throughput"]["answers_per_s"]
    for name, rate in rates.items():
        length = numbers["throughput"]["tokens_per_answer"][name]
        yield _line(name.replace("_", " "), f"{rate:.1f} of {length:.1f} tokens")
    yield _line("adapters found in", _counts(numbers["throughput"]["adapters_found"]))
    wait = numbers["waiting"]
    for name, value in wait["first_text_p99_s"].items():
        yield _line(f"p99 to first text, {name}", _ms(value))
    yield _line("longest quantum", _ms(wait["longest_quantum_s"]))
    yield _line("mean batch while decoding", f"{numbers['own_time']['mean_batch_size']:.1f}")
    yield ""
    yield "targets"
    for title, section, name, sense in TARGETS:
        found = numbers[section][name]
        value = found.get("median", found.get("value"))
        range_ = f" ({found['min']:.2f} to {found['max']:.2f})" if "min" in found else ""
        verdict = "met" if found["met"] else "MISSED"
        yield _line(title, f"{value:.3f}{range_}, {sense} {found['target']:g}: {verdict}")


def _line(name: str, value: str) -> str:
    return f"  {name:50} {value}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _counts(counts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sorted(counts.items())) or "none"
