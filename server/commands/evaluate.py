"""`imprint eval`: does adapting help? Base and adapted answers compared, document by document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imprint.adapters.evaluation.arm_names import ARMS
from imprint.server.commands import ablate
from imprint.server.commands.common import UsageError, add_model
from imprint.server.commands.descriptions import Commands, add_command, add_group
from imprint.server.commands.evaluation_run import Material, run_benchmark
from imprint.server.config import BUNDLED_MODEL

if TYPE_CHECKING:
    from imprint.models.tokenizer import Tokenizer

_HELD_OUT = BUNDLED_MODEL / "heldout.txt"
_COMMON = (
    "The model reads each document before it knows a question. Greedy decoding, every document "
    "scored, the same documents, questions and seeds for every arm."
)
_NUM_RULER_DOCUMENTS = 200


def add_parser(commands: Commands) -> None:
    """Describe the command and its benchmarks."""
    benchmarks = add_group(
        commands,
        "eval",
        "measure whether adapting helps, against baselines",
        "imprint eval ruler --num-documents 20\nimprint eval documents my-documents",
        parts="benchmarks",
    )
    _add_benchmarks(benchmarks, compares=True)
    ablate.add_parser(benchmarks, _parse_benchmark)


def _parse_benchmark(words: Sequence[str]) -> argparse.Namespace:
    """What a grid asks, from the words that `imprint eval` takes for it."""
    parser = argparse.ArgumentParser(prog="benchmark")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    _add_benchmarks(benchmarks, compares=False)
    return parser.parse_args(words)


def _add_benchmarks(benchmarks: Commands, *, compares: bool) -> None:
    """`compares`: with the flags that say which ways of answering are compared, and reported."""
    _add_ruler(benchmarks, compares=compares)
    qa = add_command(
        benchmarks,
        "qa",
        "questions with their contexts, from a file",
        "imprint eval qa questions.jsonl --num-documents 100\n"
        "imprint eval qa questions.jsonl --metric f1 --output runs/qa --json",
        run=run_benchmark,
        description="A line of FILE holds context, question and answers, a list. " + _COMMON,
    )
    qa.add_argument("file", type=Path, metavar="FILE", help=".jsonl or .jsonl.zst")
    longbench = add_command(
        benchmarks,
        "longbench",
        "LongBench tasks, from a folder of files",
        "imprint eval longbench longbench-files --tasks narrativeqa,hotpotqa\n"
        "imprint eval longbench longbench-files --output runs/longbench --plot longbench.png",
        run=run_benchmark,
        description=(
            "DIR holds a .parquet or .jsonl file a task, as the published REFINE evaluation has "
            "them, with the columns prompt, answers, task and max_gen_tokens. " + _COMMON
        ),
    )
    longbench.add_argument("folder", type=Path, metavar="DIR", help="folder of the files")
    longbench.add_argument("--tasks", type=names, default=(), metavar="LIST", help="only these")
    documents = add_command(
        benchmarks,
        "documents",
        "your own documents, with questions or recall probes",
        "imprint eval documents my-documents\n"
        "imprint eval documents my-documents --preset paper --output runs/mine --json",
        run=run_benchmark,
        description=(
            "DIR holds .txt and .md files. NAME.txt is asked what NAME.questions.jsonl beside it "
            "holds, lines of question and answers; without that, what follows a few of its own "
            "words. " + _COMMON
        ),
    )
    documents.add_argument("folder", type=Path, metavar="DIR", help="folder of the documents")
    qa.set_defaults(benchmark="qa", source=_qa)
    longbench.set_defaults(benchmark="longbench", source=_longbench)
    documents.set_defaults(benchmark="documents", source=_documents)
    for benchmark in (qa, longbench, documents):
        _add_how(benchmark, num_documents=None, compares=compares)


def _add_ruler(benchmarks: Commands, *, compares: bool) -> None:
    ruler = add_command(
        benchmarks,
        "ruler",
        "needles in prose, variable tracking and questions among distractors, after RULER",
        "imprint eval ruler --num-documents 20\n"
        "imprint eval ruler --tasks vt --lengths 1024,4096 --output runs/vt --plot vt.png",
        run=run_benchmark,
        description="RULER's tasks, made from prose and questions of yours. " + _COMMON,
    )
    add = ruler.add_argument
    add(
        "--haystack",
        type=Path,
        metavar="FILE",
        help="prose to hide needles in: .txt, or .jsonl[.zst] with a field `text`; default: "
        "heldout.txt, which the bundled model was not trained on",
    )
    add(
        "--questions",
        type=Path,
        metavar="FILE",
        help="for qa: .jsonl[.zst] with context, question and answers; none is bundled",
    )
    add(
        "--tasks",
        type=names,
        default=("niah_single", "niah_multikey"),
        metavar="LIST",
        help="niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, qa; with commas",
    )
    add("--lengths", type=integers, default=(1024, 2048), metavar="LIST", help="tokens; 1024,2048")
    add(
        "--wordings",
        type=names,
        default=("ruler",),
        metavar="LIST",
        help="of needles: names, or the groups training and heldout; default: ruler",
    )
    add(
        "--prompt",
        choices=("ruler", "question"),
        default="ruler",
        help="ruler: question and start of the answer; question: as the server asks it",
    )
    ruler.set_defaults(benchmark="ruler", source=_ruler)
    _add_how(ruler, num_documents=_NUM_RULER_DOCUMENTS, compares=compares)


def _add_how(parser: argparse.ArgumentParser, *, num_documents: int | None, compares: bool) -> None:
    """What all benchmarks share."""
    add_model(parser)
    if compares:
        _add_comparison(parser)
    add = parser.add_argument
    add(
        "--num-documents",
        type=int,
        default=num_documents,
        metavar="N",
        help=f"documents of each kind; default: {num_documents or 'all'}",
    )
    add("--metric", type=names, default=(), metavar="LIST", help="compare by these, if a task can")
    add("--passages", type=int, default=4, metavar="N", help="of arms retrieval_top and _after")
    add("--passage-tokens", type=int, default=64, metavar="N", help="length of a passage")
    add("--seed", type=int, default=0, metavar="N", help="chooses documents and random numbers")
    add("--max-tokens", type=int, metavar="N", help="longest answer; default: the task's")
    add("--question-template", type=Path, metavar="FILE", help="default: the checkpoint's")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda or cuda:N")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--reward-encoder", default="", metavar="MODULE:FUNCTION", help="of the reward semantic")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--arms",
        type=names,
        default=tuple(ARMS),
        metavar="LIST",
        help=f"ways to answer; default: all of {','.join(ARMS)}",
    )
    for prefix, knows, default in (("", "without", "default"), ("focus-", "with", "focus")):
        add(
            f"--{prefix}preset",
            default=default,
            help=f"preset of studies {knows} the questions; default: {default}",
        )
        add(
            f"--{prefix}set",
            action="append",
            default=[],
            dest=f"{prefix}overrides".replace("-", "_"),
            metavar="FIELD=VALUE",
            help="override one field of that preset; may be given several times",
        )
    add("--output", type=Path, metavar="FOLDER", help="keep what is done; go on from it")
    add("--plot", type=Path, metavar="FILE", help="draw a PNG; needs the extra eval")
    add("--json", action="store_true", help="print the report as JSON")


def names(text: str) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def integers(text: str) -> tuple[int, ...]:
    """`1,2` as a tuple of numbers; `ValueError` for anything else."""
    return tuple(int(name) for name in names(text))


def _ruler(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Material:
    from dataclasses import asdict

    from imprint.adapters.evaluation.haystack import Haystack
    from imprint.adapters.evaluation.question_files import read_questions
    from imprint.adapters.evaluation.results import file_hash
    from imprint.adapters.evaluation.ruler_suite import RulerConfig, RulerSuite
    from imprint.adapters.evaluation.wordings import HELD_OUT, TRAINING

    groups = {"training": TRAINING, "heldout": HELD_OUT}
    config = RulerConfig(
        tasks=arguments.tasks,
        lengths=arguments.lengths,
        wordings=tuple(
            name
            for given in arguments.wordings
            for name in ([w.name for w in groups[given]] if given in groups else [given])
        ),
        num_documents=arguments.num_documents,
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    _check_ruler(arguments, has_needles=bool(config.needles))
    inputs: dict[str, str] = {}
    haystack, questions = None, []
    if config.needles:
        path = arguments.haystack or _HELD_OUT
        haystack, inputs["haystack"] = Haystack.from_file(path), file_hash(path)
    if arguments.questions is not None:
        questions = read_questions(arguments.questions)
        inputs["questions"] = file_hash(arguments.questions)
    suite = RulerSuite(config, tokenizer, haystack=haystack, questions=questions)
    return Material(cells=suite.cells(), config={"ruler": asdict(config)}, inputs=inputs)


def _check_ruler(arguments: argparse.Namespace, *, has_needles: bool) -> None:
    """What is given must be of use. Raises `UsageError`."""
    if "qa" in arguments.tasks and arguments.questions is None:
        raise UsageError(
            "task qa needs --questions FILE, lines of context, question and answers: no questions "
            "are bundled"
        )
    if "qa" not in arguments.tasks and arguments.questions is not None:
        raise UsageError("--questions goes with task qa")
    if not has_needles and arguments.haystack is not None:
        raise UsageError("--haystack goes with a task that hides needles")
    if arguments.prompt != "question" and arguments.question_template is not None:
        raise UsageError("--question-template goes with --prompt question")


def _qa(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Material:
    from imprint.adapters.evaluation.question_files import question_cell, read_questions
    from imprint.adapters.evaluation.results import file_hash

    cell = question_cell(
        read_questions(arguments.file),
        tokenizer.format_question,
        num_documents=arguments.num_documents,
        seed=arguments.seed,
    )
    inputs = {"questions": file_hash(arguments.file)}
    return Material(cells=[cell], config={"num_documents": arguments.num_documents}, inputs=inputs)


def _longbench(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Material:
    from imprint.adapters.evaluation.longbench import longbench_cells, longbench_files

    if arguments.question_template is not None:
        raise UsageError("--question-template: LongBench's prompts hold their own questions")
    cells = longbench_cells(
        arguments.folder,
        tasks=arguments.tasks,
        num_documents=arguments.num_documents,
        seed=arguments.seed,
    )
    config = {"num_documents": arguments.num_documents, "tasks": list(arguments.tasks)}
    inputs = _hashes(longbench_files(arguments.folder))
    return Material(cells=cells, config=config, inputs=inputs)


def _documents(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Material:
    from imprint.adapters.evaluation.own_documents import document_cells, document_files

    cells = document_cells(
        arguments.folder,
        tokenizer.format_question,
        num_documents=arguments.num_documents,
        seed=arguments.seed,
    )
    config = {"num_documents": arguments.num_documents}
    inputs = _hashes(document_files(arguments.folder))
    return Material(cells=cells, config=config, inputs=inputs)


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    from imprint.adapters.evaluation.results import file_hash

    return {str(path): file_hash(path) for path in files}
