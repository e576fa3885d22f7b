"""How commands describe themselves: what they do in a sentence, and examples that can be typed.

Knows argparse; runs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]


class HelpFormat(argparse.HelpFormatter):
    """Wraps sentences to the terminal's width, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_command(
    commands: Commands,
    name: str,
    about: str,
    examples: str,
    *,
    description: str | None = None,
    run: Run | None = None,
) -> argparse.ArgumentParser:
    """Add one command, or one action of a command.

    `about` is its line in the list of commands, `description` says more of it; `examples` has a
    command line in each line, and perhaps, behind an empty line, what else is to be known.
    """
    parser = commands.add_parser(
        name,
        help=about,
        description=description or about[0].upper() + about[1:] + ".",
        epilog="examples:\n" + "".join(f"  {line}".rstrip() + "\n" for line in _lines(examples)),
        formatter_class=HelpFormat,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_group(
    commands: Commands, name: str, about: str, examples: str, *, parts: str = "actions"
) -> Commands:
    """Add a command with actions of its own; returns where they go."""
    parser = add_command(commands, name, about, examples)
    return parser.add_subparsers(title=parts, required=True, metavar=parts[:-1].upper())


def _lines(examples: str) -> list[str]:
    return examples.strip().splitlines()
