"""`imprint bench`: what kernels, a step, an answer and many documents cost on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imprint.server.commands import bench_serve
from imprint.server.commands.common import (
    CommandError,
    UsageError,
    add_model,
    check_device,
    error_console,
    model_folder,
    write_json,
)
from imprint.server.commands.descriptions import Commands, add_command, add_group

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Commands) -> None:
    """Describe the command and its benchmarks."""
    benchmarks = add_group(
        commands,
        "bench",
        "measure time and memory on this machine",
        "imprint bench serve --quick\nimprint bench kernels --json",
        parts="benchmarks",
    )
    step = add_command(
        benchmarks,
        "step",
        "an optimisation step against one reading and against the published loop",
        "imprint bench step\nimprint bench step --num-tokens 16384 --repeats 3 --json\n"
        "imprint bench step --device cuda --model /tmp/noise --num-tokens 16384 --no-loop",
        run=run_step,
        description=(
            "Time an optimisation step against one reading of the document and against the "
            "published loop, compare their gradients, and measure peak memory; and time a whole "
            "study of four steps. Needs a clone: the published loop lives in tests/."
        ),
    )
    _add_common(step)
    _add_device(step)
    step.add_argument("--num-tokens", type=int, default=4096, metavar="N", help="document length")
    step.add_argument("--positions", type=int, default=8, metavar="N", help="positions per step")
    step.add_argument("--rollout-length", type=int, default=5, metavar="N", help="rollout tokens")
    step.add_argument("--repeats", type=int, default=7, metavar="N", help="timed pairs")
    step.add_argument(
        "--no-loop", action="store_true", help="leave the published loop out: it is slow and large"
    )
    _add_kernels(benchmarks)
    answer = add_command(
        benchmarks,
        "answer",
        "time to first token, idle and while a long document is adapted",
        "imprint bench answer\nimprint bench answer --num-questions 20 --json",
        run=run_answer,
        description=(
            "Put questions to a studied document, on a server of its own: the time to the first "
            "token, idle and while a long document is adapted, and the longest quantum."
        ),
    )
    _add_common(answer)
    add = answer.add_argument
    add("--num-questions", type=int, default=50, metavar="N", help="questions, idle and under load")
    add("--document-tokens", type=int, default=1024, metavar="N", help="length of the document")
    add("--background-tokens", type=int, default=16384, metavar="N", help="length of the other one")
    add("--background-documents", type=int, default=1, metavar="N", help="adapted at a time")
    _add_adapt(benchmarks)
    bench_serve.add_parser(benchmarks)


def _add_kernels(benchmarks: Commands) -> None:
    kernels = add_command(
        benchmarks,
        "kernels",
        "the delta rules against the matmul rate; reading and decoding with the model",
        "imprint bench kernels\nimprint bench kernels --device cuda --batch-sizes 1,64 --json",
        run=run_kernels,
        description=(
            "Time the chunkwise delta rules against the rate of a matmul in the same run, reading "
            "in tokens per second, and a decoding step of several sequences against one."
        ),
    )
    _add_common(kernels)
    add = kernels.add_argument
    _add_device(kernels)
    add("--num-tokens", type=int, default=4096, metavar="N", help="tokens that are read")
    add("--segment-tokens", type=int, default=2048, metavar="N", help="tokens read at a time")
    add("--heads", type=int, default=8, metavar="N", help="heads of the delta rules")
    add(
        "--batch-sizes",
        metavar="N,N",
        help="sequences that decode together; default: 1,32 on a CPU, 1,16,64,256 on a GPU",
    )
    add("--repeats", type=int, default=7, metavar="N", help="timed calls of each")


def _add_adapt(benchmarks: Commands) -> None:
    adapt = add_command(
        benchmarks,
        "adapt",
        "several documents adapted at a time, against one after another",
        "imprint bench adapt --workers 2 --json\nimprint bench adapt --quick --documents 4",
        run=run_adapt,
        description=(
            "Hand documents in at a time and one after another, alternately, to a server of its "
            "own, and compare time and adapters. Other settings of the server are taken from "
            "their variables."
        ),
    )
    _add_common(adapt)
    add = adapt.add_argument
    add("--documents", type=int, default=8, metavar="N", help="documents that are adapted")
    add("--tokens", type=int, metavar="N", help="length of each; default: 4096, or 1024 if quick")
    add("--preset", choices=("default", "fast", "paper"), default="default", help="of the method")
    add("--workers", type=int, default=1, metavar="N", help="worker processes of the server")
    add("--rounds", type=int, metavar="N", help="timed pairs; default: 5, or 2 if quick")
    add("--quick", action="store_true", help="fewer rounds and shorter documents")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add("--threads", type=int, default=1, metavar="N", help="threads of torch")
    add("--json", action="store_true", help="print all numbers as JSON")


def _add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")


def run_step(arguments: argparse.Namespace) -> int:
    """Run `imprint.adapters.step_benchmark`."""
    _check(arguments, "threads", "num_tokens", "positions", "rollout_length", "repeats")
    import torch

    from imprint.adapters.step_benchmark import run_step_benchmark

    check_device(arguments.device)
    try:
        numbers = run_step_benchmark(
            model=_model(arguments),
            device=arguments.device,
            dtype=getattr(torch, _dtype(arguments)),
            num_tokens=arguments.num_tokens,
            positions=arguments.positions,
            rollout_length=arguments.rollout_length,
            repeats=arguments.repeats,
            threads=arguments.threads,
            with_loop=not arguments.no_loop,
            progress=_say,
        )
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error
    _write(numbers, as_json=arguments.json)
    return 0


def run_kernels(arguments: argparse.Namespace) -> int:
    """Run `imprint.models.kernel_benchmark`."""
    _check(arguments, "threads", "num_tokens", "segment_tokens", "heads", "repeats")
    on_gpu = arguments.device != "cpu"
    sizes = arguments.batch_sizes or ("1,16,64,256" if on_gpu else "1,32")
    try:
        batch_sizes = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        batch_sizes = ()
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError(f"--batch-sizes needs numbers of at least 1, as 1,32; got {sizes!r}")
    import torch

    from imprint.models.host_memory import keep_freed_memory
    from imprint.models.kernel_benchmark import KernelBenchmark, run_kernel_benchmark

    check_device(arguments.device)
    keep_freed_memory()  # as a worker does
    config = KernelBenchmark(
        model=_model(arguments),
        device=arguments.device,
        dtype=getattr(torch, _dtype(arguments)),
        threads=arguments.threads,
        num_tokens=arguments.num_tokens,
        segment_tokens=arguments.segment_tokens,
        heads=arguments.heads,
        batch_sizes=batch_sizes,
        repeats=arguments.repeats,
    )
    _write(run_kernel_benchmark(config, _say), as_json=arguments.json)
    return 0


def run_adapt(arguments: argparse.Namespace) -> int:
    """Run `imprint.server.load.adapting`; exit code 0 whether the target is met or not."""
    for name, quick, full in (("tokens", 1024, 4096), ("rounds", 2, 5)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    _check(arguments, "threads", "workers", "documents", "tokens", "rounds")
    from imprint.server.load.adapting import AdaptationBenchmark, run_adaptation_benchmark

    config = AdaptationBenchmark(
        model=_model(arguments),
        num_documents=arguments.documents,
        num_tokens=arguments.tokens,
        preset=arguments.preset,
        rounds=arguments.rounds,
        workers=arguments.workers,
        threads=arguments.threads,
    )
    _write(run_adaptation_benchmark(config, _say), as_json=arguments.json)
    return 0


def run_answer(arguments: argparse.Namespace) -> int:
    """Run `imprint.server.answer_benchmark`."""
    lengths = ("document_tokens", "background_tokens", "background_documents")
    _check(arguments, "num_questions", *lengths, "threads")
    from imprint.server.answer_benchmark import run_answer_benchmark

    numbers = run_answer_benchmark(
        model=_model(arguments),
        num_questions=arguments.num_questions,
        document_tokens=arguments.document_tokens,
        background_tokens=arguments.background_tokens,
        background_documents=arguments.background_documents,
        threads=arguments.threads,
        progress=_say,
    )
    _write(numbers, as_json=arguments.json)
    return 0


def _dtype(arguments: argparse.Namespace) -> str:
    name: str = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    return name


def _model(arguments: argparse.Namespace) -> Path:
    return model_folder(arguments.model, arguments.revision).folder


def _check(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be at least 1, got {getattr(arguments, name)}")


def _say(what: str) -> None:
    error_console().print(what, markup=False)


def _write(numbers: dict[str, Any], *, as_json: bool) -> None:
    """Everything as JSON, or one number a line."""
    if as_json:
        write_json({"command": sys.argv[1:], **numbers})
        return
    for name, value in _flat(numbers):
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        sys.stdout.write(f"{name:36} {shown}\n")


def _flat(numbers: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Numbers and words with dotted names; lists of single measurements are left to JSON."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{name}", value
