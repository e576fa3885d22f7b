"""What a running study leaves on disk after each step, so that another process can go on from it.

Two verified files a study, each replaced atomically. `begun` is written once, when the document has
been read: entropies, the state at its end, the base model's probe. `steps` is written after each
step: what is trained, optimizer, the best so far, numbers for early stopping, the steps' events.
Random streams are functions of (seed, step), so the step is their position.
Limits: the states before the document's segments are not kept; a study that branches off them reads
again. Files are not flushed to the device: a power cut may cost the checkpoint, no kill can.
"""

# T = tokens of the document, P = places of the probe, D = model width

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from imprint import __version__
from imprint.adapters import faults
from imprint.adapters.errors import CorruptAdapterError
from imprint.adapters.files import FileFolder, ProgressFolder
from imprint.adapters.gate import ProbeResult
from imprint.adapters.held_out import HeldOut
from imprint.adapters.optimizer import AdamW
from imprint.adapters.rollout import BranchStart
from imprint.adapters.scopes import Trained
from imprint.adapters.trials import Trial
from imprint.adapters.verified import read_verified, to_blob
from imprint.models.state import RecurrentState

log = logging.getLogger(__name__)

FORMAT: Final = "imprint-progress-3"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was trained as it was after `step` steps, and the document-end state to ask then."""

    step: int
    trained: Trained
    end_state: RecurrentState
    probe: ProbeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a study has before its first step."""

    segment_tokens: int
    """As the document was read; less than was asked for where memory had run out."""
    entropy_T: Tensor
    """Under the base weights, float32."""
    write_T: Tensor | None
    """Writing strengths of the base weights, where positions are chosen by them."""
    end: BranchStart
    """Under the base weights."""
    base: ProbeResult
    usage: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """What a study has after `step` steps; with 0 steps, nothing."""

    step: int = 0
    trained: Trained | None = None
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """State of the optimizer by parameter, in the parameters' order."""
    best: Candidate | None = None
    since_best: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    """The event of every step so far."""
    branches: list[dict[str, Any]] = field(default_factory=list)
    """What the steps so far tried, as far as it is kept."""
    trials: list[Trial] = field(default_factory=list)
    """The learning rates that were tried before the first step."""
    held_out: HeldOut | None = None
    """What the first steps were worth to what they had left out, once that is known."""


class Progress:
    """The checkpoint of one study. Whose it is, is part of it; anybody else's is refused.

    A checkpoint that cannot be written or used never ends a study: it is logged by name and
    counted. `count` is told what became of each: written, unwritten, resumed or refused.
    """

    def __init__(
        self, folder: ProgressFolder, id: str, model_hash: str, count: Callable[[str], None]
    ) -> None:
        self._folder, self._id, self._count = folder, id, count
        self._model_hash = model_hash

    def load(
        self, identity: Mapping[str, Any], *, segment_tokens: int, like: Trained
    ) -> tuple[Begun, Completed] | None:
        """Where this study stood; None where there is no checkpoint, or none that can be used.

        `identity` is all that decides what the study computes, save for the length of a segment,
        which the checkpoint decides as long as it is at most `segment_tokens`. `like` has the form
        of what is trained.
        """
        if self._id not in self._folder.ids():
            return None
        try:
            begun = _read_begun(*self._read(self._folder.begun, identity))
            if begun.segment_tokens > segment_tokens:
                path = self._folder.begun.path(self._id)
                raise CorruptAdapterError(
                    f"{path} was read in segments of {begun.segment_tokens} tokens, more than "
                    f"the {segment_tokens} of now"
                )
            completed = Completed()
            if self._folder.steps.path(self._id).exists():
                tensors, manifest = self._read(self._folder.steps, identity)
                completed = _read_completed(tensors, manifest, begun.end.state, like)
        except (CorruptAdapterError, OSError) as error:
            log.warning("a checkpoint is refused, and its study starts over: %s", error)
            self._count("refused")
            self._folder.delete(self._id)
            return None
        self._count("resumed")
        return begun, completed

    def _read(
        self, folder: FileFolder, identity: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = folder.path(self._id)
        tensors, manifest = read_verified(path, FORMAT)
        wanted = self._identity(identity)
        found = manifest["identity"]
        others = [name for name, value in wanted.items() if found.get(name) != value]
        if others:
            raise CorruptAdapterError(f"{path} is of a study with another {', '.join(others)}")
        # memory of their own, aligned as torch aligns: a product may round as its operands lie
        return {name: tensor.clone() for name, tensor in tensors.items()}, manifest

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return {"version": __version__, "model": self._model_hash, **identity}

    def begin(self, begun: Begun, identity: Mapping[str, Any]) -> None:
        """Keep what there is before the first step."""
        tensors = {
            "entropy": begun.entropy_T,
            "hidden": begun.end.hidden_ND,
            "probe": begun.base.nll_P,
            **({} if begun.write_T is None else {"write": begun.write_T}),
            **begun.end.state.to_tensors(),
        }
        manifest = {"segment_tokens": begun.segment_tokens, "usage": begun.usage}
        self._write(self._folder.begun, tensors, manifest, identity)

    def step(self, completed: Completed, identity: Mapping[str, Any], *, own_state: bool) -> None:
        """Keep what there is after a step. `own_state`: the best has an end state of its own, and
        does not share that of `begin`."""
        assert completed.trained is not None
        faults.at("step")
        tensors = {**completed.trained.to_tensors("trained.")}
        for index, state in completed.optimizer.items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        best = completed.best
        if best is not None:
            tensors |= {**best.trained.to_tensors("best.trained."), "best.probe": best.probe.nll_P}
            if own_state:
                tensors |= best.end_state.to_tensors("best.state.")
        manifest = {
            "step": completed.step,
            "best_step": None if best is None else best.step,
            "since_best": completed.since_best,
            "usage": completed.usage,
            "events": completed.events,
            "branches": completed.branches,
            "trials": [asdict(trial) for trial in completed.trials],
            "held_out": None if completed.held_out is None else asdict(completed.held_out),
        }
        self._write(self._folder.steps, tensors, manifest, identity)

    def _write(
        self,
        folder: FileFolder,
        tensors: dict[str, Tensor],
        manifest: dict[str, Any],
        identity: Mapping[str, Any],
    ) -> None:
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        blob = to_blob(host, {**manifest, "identity": self._identity(identity)}, FORMAT)
        try:
            folder.write(self._id, blob, durable=False)
        except OSError as error:
            log.warning("%s is not written: %s", folder.path(self._id), error)
            self._count("unwritten")
        else:
            self._count("written")


def _read_begun(tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Begun:
    return Begun(
        segment_tokens=manifest["segment_tokens"],
        entropy_T=tensors["entropy"],
        write_T=tensors.get("write"),
        end=BranchStart(tensors["hidden"], RecurrentState.from_tensors(tensors)),
        base=ProbeResult(tensors["probe"]),
        usage=manifest["usage"],
    )


def _read_completed(
    tensors: dict[str, Tensor], manifest: dict[str, Any], base_end: RecurrentState, like: Trained
) -> Completed:
    best = None
    if manifest["best_step"] is not None:
        own = RecurrentState.from_tensors(tensors, "best.state.")
        best = Candidate(
            manifest["best_step"],
            like.from_tensors(tensors, "best.trained."),
            own if own.layers else base_end,
            ProbeResult(tensors["best.probe"]),
        )
    optimizer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            optimizer.setdefault(int(index), {})[name] = tensor
    return Completed(
        step=manifest["step"],
        trained=like.from_tensors(tensors, "trained."),
        optimizer=optimizer,
        best=best,
        since_best=manifest["since_best"],
        usage=manifest["usage"],
        events=manifest["events"],
        branches=manifest["branches"],
        trials=[Trial(**trial) for trial in manifest["trials"]],
        held_out=None if manifest["held_out"] is None else HeldOut(**manifest["held_out"]),
    )


def restore(completed: Completed, trained: Trained, optimizer: AdamW) -> Candidate | None:
    """Make what is fresh, and its optimizer, what they were; the best candidate on their device."""
    assert completed.trained is not None
    parameters = trained.parameters()
    with torch.no_grad():
        for mine, theirs in zip(parameters, completed.trained.parameters(), strict=True):
            mine.copy_(theirs)
    optimizer.restore(completed.optimizer)
    best = completed.best
    if best is None:
        return None
    device = parameters[0].device
    probe = ProbeResult(best.probe.nll_P.to(device))
    return Candidate(best.step, best.trained, best.end_state.to(device), probe)
