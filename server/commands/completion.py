"""`imprint completion`: a script that completes commands and flags in a shell. Reads the parser."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator

from imprint.server.commands.descriptions import Commands, add_command

_BASH = """\
_imprint() {{
  local place=imprint word options=
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$place $word" in
      {places}) place="$place $word" ;;
    esac
  done
  case "$place" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$options" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _imprint imprint
"""


def add_parser(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "completion",
        "print a completion script for a shell",
        "imprint completion bash > ~/.local/share/bash-completion/completions/imprint\n"
        "imprint completion fish > ~/.config/fish/completions/imprint.fish\n\n"
        "In a running bash: source <(imprint completion bash)",
        description="Print a script that completes commands and flags.",
        run=run,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    places = dict(_places(arguments.parser, ("imprint",)))
    script = _fish(places) if arguments.shell == "fish" else _bash(places)
    if arguments.shell == "zsh":
        script = f"autoload -U +X bashcompinit && bashcompinit\n{script}"
    sys.stdout.write(script)
    return 0


Places = dict[tuple[str, ...], tuple[list[str], list[str]]]


def _places(
    parser: argparse.ArgumentParser, place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[list[str], list[str]]]]:
    """Each command with its subcommands and its flags."""
    flags = sorted(flag for action in parser._actions for flag in action.option_strings)
    children: dict[str, argparse.ArgumentParser] = {}
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            children |= action.choices
        elif not action.option_strings and action.choices is not None:
            words += [str(choice) for choice in action.choices]
    yield place, ([*children, *words], flags)
    for name, child in children.items():
        yield from _places(child, (*place, name))


def _bash(places: Places) -> str:
    known = "|".join(shlex.quote(" ".join(place)) for place in places if len(place) > 1)
    cases = [
        f"    {shlex.quote(' '.join(place))}) options={shlex.quote(' '.join((*words, *flags)))} ;;"
        for place, (words, flags) in places.items()
    ]
    return _BASH.format(places=known, cases="\n".join(cases))


def _fish(places: Places) -> str:
    lines = []
    for place, (words, flags) in places.items():
        seen = [f"__fish_seen_subcommand_from {name}" for name in place[1:]]
        seen += [f"not __fish_seen_subcommand_from {' '.join(words)}"] if words else []
        condition = f" -n {shlex.quote('; and '.join(seen))}" if seen else ""
        if words:
            lines.append(f"complete -c imprint -f{condition} -a {shlex.quote(' '.join(words))}")
        where = [f"__fish_seen_subcommand_from {name}" for name in place[1:]]
        under = f" -n {shlex.quote('; and '.join(where))}" if where else ""
        for flag in flags:
            kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            lines.append(f"complete -c imprint{under} {kind}")
    return "\n".join(lines) + "\n"
