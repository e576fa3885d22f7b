"""`imprint answer`: questions about a file, answered by a running server or by one of our own."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import Any

from imprint.server.client import AnswerRequest, BadReplyError, ImprintClient
from imprint.server.commands.common import UsageError, printable, read_document, write_json
from imprint.server.commands.connection import add_connection, connect
from imprint.server.commands.descriptions import Commands, add_command
from imprint.server.commands.progress import StudyDisplay


def add_parser(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "answer",
        "study a file and answer questions about it",
        'imprint answer report.txt -q "Who signed it?" -q "When?"\n'
        'imprint answer report.txt -q "Who signed it?" --url http://127.0.0.1:8765 --json\n'
        'imprint answer - -q "Who signed it?" --max-tokens 24',
        description="Study a file and answer questions about it, each question on its own.",
        run=run,
    )
    parser.add_argument("file", metavar="FILE", help="text file, UTF-8; - is standard input")
    parser.add_argument(
        "-q",
        "--question",
        action="append",
        required=True,
        dest="questions",
        metavar="TEXT",
        help="a question; may be given several times",
    )
    parser.add_argument(
        "--no-focus",
        dest="focus",
        action="store_false",
        help="adapt without looking at the questions",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the adaptation")
    parser.add_argument("--json", action="store_true", help="print the server's reply as JSON")
    add_connection(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask, show progress on standard error, print the answers."""
    if any(not question.strip() for question in arguments.questions):
        raise UsageError("a question is empty")
    request = AnswerRequest(
        questions=tuple(arguments.questions),
        document=read_document(arguments.file),
        focus=arguments.focus,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    with ExitStack() as stack:
        display = stack.enter_context(StudyDisplay())
        client = stack.enter_context(connect(arguments, display, keep=False))
        reply = _ask(client, request, display)
    if arguments.json:
        write_json(reply)
    else:
        _write_answers(reply)
    return 0


def _ask(client: ImprintClient, request: AnswerRequest, display: StudyDisplay) -> dict[str, Any]:
    reply: dict[str, Any] | None = None
    for record in client.stream_answer(request):
        kind = record.get("object")
        if kind == "answer.progress":
            display.update(record)
        elif kind == "answer.delta":
            display.say("answering")
        elif kind == "answers":
            reply = record
    if reply is None or not isinstance(reply.get("answers"), list):
        raise BadReplyError("the server's stream held no answers")
    return reply


def _write_answers(reply: dict[str, Any]) -> None:
    for answer in reply["answers"]:
        text = str(answer.get("answer", "")).strip()
        how = "adapted" if answer.get("adapted") else "not adapted"
        focus = answer.get("focus")
        if isinstance(focus, dict) and focus.get("way") == "passages":
            how += ", from passages read again"
        sys.stdout.write(printable(f"{answer.get('question', '')}\n  {text}  [{how}]\n"))
