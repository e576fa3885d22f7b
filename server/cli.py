"""The `imprint` command: parses, calls one command, and turns errors into one line and a code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Imports no torch.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from imprint.adapters.errors import ConfigError
from imprint.models.errors import ModelError
from imprint.server.client_errors import ClientError
from imprint.server.commands import (
    adapt,
    adaptations,
    answer,
    bench,
    completion,
    documents,
    evaluate,
    models,
    serve,
    train,
)
from imprint.server.commands.common import CommandError, error_console, printable
from imprint.server.commands.descriptions import HelpFormat

_COMMANDS = (
    *(serve, answer, adapt, documents, adaptations),
    *(models, evaluate, bench, train, completion),
)

_EPILOG = """\
examples:
  imprint answer report.txt -q "Who signed it?"      on a server of its own
  imprint serve                                      a server for many documents
  imprint documents add report.pdf                   store a file on it
  imprint adaptations list --json                    what it has studied

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="imprint",
        description="A fast-weight model studies your document, then answers from memory.",
        epilog=_EPILOG,
        formatter_class=HelpFormat,
    )
    parser.add_argument("--version", action="version", version=f"imprint {version('imprint')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    parser.set_defaults(parser=parser)  # completion reads it
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # answers hold any character
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except CommandError as error:
        return _fail(error, error.exit_code)
    except (ClientError, ModelError) as error:
        return _fail(error, 1)
    except ConfigError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # whoever read our output is gone; keep the interpreter's last flush from failing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _fail(message: object, exit_code: int) -> int:
    text = printable(f"imprint: {message}")
    error_console().print(text, style="red", markup=False, soft_wrap=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
