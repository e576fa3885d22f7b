"""From what a user calls a model to a folder: a path, or an id of the Hugging Face Hub.

Of a hub repository only data is fetched: safetensors, JSON, templates, the card. Pickles and code
never are. Imports no torch, and huggingface_hub only for a hub id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from imprint.models.errors import CheckpointError, HubError

NEUTRAL_FILE: Final = "neutral.txt"
"""Text that a checkpoint may bring for the gate, which watches that adapting does not damage it."""
FETCHED: Final = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "question_template.jinja",
    NEUTRAL_FILE,
    "README.md",
)
"""Patterns of the files of a checkpoint; all that is ever downloaded."""

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this machine."""

    folder: Path
    name: str
    """What to call the model: the folder's name, or the hub id."""


def find_checkpoint(name: Path | str, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint called `name`: an existing folder, else a hub id `OWNER/NAME[/SUBFOLDER]`.

    A hub id is brought into huggingface_hub's cache (HF_HOME, HF_HUB_CACHE) unless it is there;
    without a network, or with HF_HUB_OFFLINE=1, what is there is used. `revision` is a commit, tag
    or branch; the default is the branch main. Raises HubError where the hub does not give it, and
    CheckpointError for what is neither a folder nor an id.
    """
    path = Path(name)
    if path.is_dir():
        if revision:
            raise CheckpointError(
                f"revision {revision!r} was given, but {path} is a folder; only models of the hub "
                "have revisions"
            )
        return Checkpoint(path, path.resolve().name)
    match = _HUB_ID.fullmatch(str(name))
    if match is None:
        raise CheckpointError(
            f"{name} is not a checkpoint folder, and not an id of the Hugging Face Hub (OWNER/NAME)"
        )
    repository, inside = match[1], match[2].strip("/")
    folder = Path(_fetch(repository, inside, revision)) / inside
    if not (folder / "config.json").is_file():
        where = f" in {inside}" if inside else ""
        raise HubError(f"{repository} on the Hugging Face Hub has no config.json{where}")
    return Checkpoint(folder, str(name))


def file_patterns(inside: str) -> tuple[list[str], list[str]]:
    """What is fetched of the folder `inside` of a repository, and what of that is not.

    In the hub's patterns a star stands for slashes, too; the second keeps deeper folders out.
    """
    prefix = f"{inside}/" if inside else ""
    return [prefix + pattern for pattern in FETCHED], [f"{prefix}*/*"]


def _fetch(repository: str, inside: str, revision: str | None) -> str:
    """The snapshot's folder in the cache, with the files of the folder `inside` it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted, unwanted = file_patterns(inside)
    # with the bases of all errors of the HTTP library that this huggingface_hub is built on
    other_errors = cast(
        "tuple[type[Exception], ...]", (HFValidationError, OSError, *HfHubHTTPError.__bases__)
    )
    shown = repository + (f" at revision {revision}" if revision else "")
    try:
        return snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except GatedRepoError:
        reason = "it is gated: accept its terms on the hub, and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "there is neither such a folder here nor such a public model there"
    except RevisionNotFoundError:
        reason = "it has no such revision"
    except LocalEntryNotFoundError as error:
        reason = f"the hub cannot be reached and the cache does not hold it ({_first_line(error)})"
    except other_errors as error:
        reason = _first_line(error)
    raise HubError(f"cannot get {shown} from the Hugging Face Hub: {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
