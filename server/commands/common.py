"""What the commands share: errors with exit codes, reading files, settings, output. No torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from imprint.models.errors import CheckpointError, HubError
from imprint.models.hub import Checkpoint, find_checkpoint
from imprint.models.registry import load_config
from imprint.server.config import BUNDLED_MODEL, SECRETS, Option, Settings, options

MAX_SHOWN_ERRORS = 5
DEFAULT_CONFIG = Path("imprint.toml")


class CommandError(Exception):
    """The command could not do its work; the message is for people. Exit code 1."""

    exit_code = 1


class UsageError(CommandError):
    """The command was asked for something impossible: a missing file, a bad value. Exit code 2."""

    exit_code = 2


def error_console() -> Console:
    """Where progress and messages go, so that standard output holds results only."""
    return Console(stderr=True, highlight=False)


def printable(text: str) -> str:
    """`text` without control characters: what a model or server says must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def write_json(value: Any) -> None:
    """One indented JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_document(name: str) -> str:
    """The text of a file, or of standard input for `-`. Raises `UsageError` that names it."""
    shown = "standard input" if name == "-" else name
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {shown}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UsageError(f"{shown} is empty")
    return text


def add_settings(parser: argparse._ActionsContainer, names: tuple[str, ...] | None = None) -> None:
    """Add the server's settings (all, or those named) as flags; what is not given stays unset."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file of settings, by name; else {DEFAULT_CONFIG} in the working folder, if any",
    )
    for option in options():
        if names is None or option.name in names:
            parser.add_argument(
                option.flag,
                dest=option.name,
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=_help(option),
            )


def file_settings(path: Path, *, needed: bool) -> dict[str, Any]:
    """Settings of a TOML file, without those that a variable sets; without a file, none.

    Raises `UsageError` for a file that is `needed` and missing, for one that is no TOML, and for
    a name that is no setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            raise UsageError(f"--config: there is no {path}") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be used: {error}") from None
    known = {option.name: option.env for option in options()}
    for name in values:
        if name not in known:
            raise UsageError(f"--config: {path}: no setting is called {name}")
    variables = {name.upper() for name in os.environ}
    return {name: value for name, value in values.items() if known[name] not in variables}


def load_settings(arguments: argparse.Namespace, **fixed: Any) -> Settings:
    """Settings from flags, then environment, then the file, then defaults; `fixed` wins over all.

    Raises `UsageError` that names each flag and variable whose value cannot be used.
    """
    given = vars(arguments)
    path = given.get("config")
    from_file = file_settings(path or DEFAULT_CONFIG, needed=path is not None)
    flags = {option.name: given[option.name] for option in options() if option.name in given}
    try:
        return Settings(**{**from_file, **flags, **fixed})
    except ValidationError as error:
        lines = [_problem(problem) for problem in error.errors()[:MAX_SHOWN_ERRORS]]
        raise UsageError("\n".join(lines)) from None


def add_model(parser: argparse._ActionsContainer) -> None:
    """Add `--model` and `--revision` for a command that runs the model in its own process."""
    parser.add_argument(
        "--model",
        type=Path,
        default=BUNDLED_MODEL,
        metavar="PATH_OR_HUB_ID",
        help="checkpoint folder, or id of the Hugging Face Hub",
    )
    parser.add_argument("--revision", default="", help="commit, tag or branch of a hub model")


def with_checkpoint(settings: Settings) -> Settings:
    """The same settings with the folder of their model, which a hub id is fetched into.

    Raises `UsageError` for a model that is not found or whose config.json cannot be used.
    """
    found = model_folder(settings.model, settings.revision)
    name = settings.model_name or found.name
    return settings.model_copy(
        update={"model": found.folder, "revision": "", "model_name": name},
    )


def model_folder(model: Path, revision: str) -> Checkpoint:
    """The folder and name of a checkpoint given as `--model`.

    Raises `UsageError` for what cannot be one, HubError where the hub does not give it.
    """
    try:
        found = find_checkpoint(model, revision=revision or None)
        load_config(found.folder)
    except HubError:
        raise
    except CheckpointError as error:
        raise UsageError(f"--model: {error}") from None
    return found


def _problem(problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    flag = "--" + name.replace("_", "-")
    shown = "" if name in SECRETS else f", got {problem.get('input')!r}"
    return f"{flag} (IMPRINT_{name.upper()}): {problem['msg']}{shown}"


def _help(option: Option) -> str:
    default = "" if option.default in (None, "") else f" Default: {option.default}."
    return f"{option.description}{default} [{option.env}]".replace("%", "%%")


def read_fields(preset: str | None, overrides: list[str], *, flag: str = "--set") -> dict[str, Any]:
    """Fields of a `RefineConfig` from a preset's name and FIELD=VALUE texts, values as JSON.

    Raises `UsageError` for a text that is not FIELD=VALUE; the fields themselves are not checked.
    """
    fields: dict[str, Any] = {} if preset is None else {"preset": preset}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} needs FIELD=VALUE, got {override!r}")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def check_device(name: str) -> None:
    """Load torch and raise `UsageError` for a device that there is not."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f"--device {name}: there are {found} CUDA devices here")
