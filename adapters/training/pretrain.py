"""Pre-trains a small model from nothing. Resumable; knows nothing of REFINE.

A run folder holds tokenizer.json, `checkpoint/` (see `checkpoints.py`) and, at the end, `final/`.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.adapters.evaluation.question_files import read_questions
from imprint.adapters.evaluation.wordings import RULER, TRAINING
from imprint.adapters.training.checkpoints import Checkpoints, RunFolderError
from imprint.adapters.training.config import PretrainConfig
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.growth import grow, is_deeper
from imprint.adapters.training.optimizers import Optimizers
from imprint.adapters.training.reading_tasks import Excerpts, Passages
from imprint.adapters.training.samples import Sample
from imprint.adapters.training.tasks import Tasks
from imprint.adapters.training.tokenizer import train_tokenizer
from imprint.models.checkpoint import load_model, save_model, weights_hash
from imprint.models.deltanet import DeltaNet, DeltaNetMixer
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

Batch = tuple[Tensor, Tensor, list[str]]
Said = Callable[[dict[str, Any]], None]
"""Hears every few seconds, and at the end, how a run goes: `step`, `num_tokens`, `loss`, `right`
(share of right answers, by kind of task), `tokens_per_s`, `left_s`."""


def log_line(numbers: dict[str, Any]) -> None:
    """Say it as a line of the log."""
    right = " ".join(f"{kind} {share:.2f}" for kind, share in numbers["right"].items())
    log.info(
        "step %d  tokens %.2fM  loss %.3f  right %s  %.0f tok/s  %.0f min left",
        numbers["step"], numbers["num_tokens"] / 1e6, numbers["loss"],
        right, numbers["tokens_per_s"], numbers["left_s"] / 60,
    )  # fmt: skip


@torch.no_grad()
def prime_induction(model: DeltaNet) -> None:
    """Start the first head of every layer as an associative memory of "what came after this token".

    Its queries and keys share their projection; the query's convolution looks at the current
    token, the key's at the one before. Without it there was no recall after two million tokens.
    """
    for layer_mixer in model.mixers:
        mixer = cast(DeltaNetMixer, layer_mixer)
        width = model.config.head_k_dim
        mixer.q_proj.weight[:width] = mixer.k_proj.weight[:width]
        for conv, tap in ((mixer.q_conv1d, -1), (mixer.k_conv1d, -2), (mixer.v_conv1d, -1)):
            conv.weight[: conv.weight.shape[0] // model.config.num_heads] = 0.0
            conv.weight[: conv.weight.shape[0] // model.config.num_heads, 0, tap] = 1.0


def tokenizer_texts(prose: Prose, seed: int) -> Iterator[str]:
    """Prose, and the wordings with words of the corpus for keys, so that they are few tokens."""
    yield from (" ".join(document) for document in prose.documents[:200])
    rng = random.Random(seed)
    for _ in range(300):
        for wording in (RULER, *TRAINING):
            key, value = f"{rng.choice(prose.words)} {rng.choice(prose.words)}", "0"
            yield wording.needle.format(key=key, value=value)
            question = wording.question.format(query=key)
            yield DEFAULT_QUESTION_TEMPLATE.format(question=question)
            yield wording.prefix.format(query=key)


def draw_batch(config: PretrainConfig, tasks: Tasks, step: int, num_tokens: int) -> Batch:
    """Tokens [B, T], loss weights [B, T] and the kind of each row; the step decides everything."""
    rng = random.Random(f"{config.seed}:{step}")
    stage = config.stage_at(num_tokens)
    length = rng.choices(list(stage.lengths), list(stage.lengths.values()))[0]
    rows: list[Sample] = []
    kinds: list[str] = []
    for _ in range(max(stage.batch_tokens // length, 1)):
        kinds.append(rng.choices(list(stage.kinds), list(stage.kinds.values()))[0])
        rows.append(tasks.draw(kinds[-1], rng, length))
    return (
        torch.tensor([row.tokens for row in rows]),
        torch.tensor([row.weights for row in rows]),
        kinds,
    )


def weighted_loss(model: DeltaNet, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies, and which predictions were right [B, T - 1]."""
    hidden_BTD, _ = model(tokens_BT)
    keep_BT = weights_BT[:, 1:] > 0
    logits_NV = model.lm_head(hidden_BTD[:, :-1][keep_BT]).float()
    targets_N = tokens_BT[:, 1:][keep_BT]
    weights_N = weights_BT[:, 1:][keep_BT]
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    right_BT = torch.zeros_like(keep_BT)
    right_BT[keep_BT] = logits_NV.argmax(-1) == targets_N
    return (losses_N * weights_N).sum(), right_BT


@torch.no_grad()
def mean_of(start: DeltaNet, end: DeltaNet, *, share: float) -> DeltaNet:
    """`start`, overwritten with `share` of itself and the rest of `end`, both as they would ship:
    in bfloat16."""
    for weight, other in zip(start.parameters(), end.parameters(), strict=True):
        first, second = (w.bfloat16().double() for w in (weight, other))
        weight.copy_(share * first + (1 - share) * second)
    return start


def _load(folder: Path) -> DeltaNet:
    model = load_model(folder)
    if not isinstance(model, DeltaNet):
        raise ValueError(f"{folder} holds a {model.config.model_type}; only delta_net is trained")
    return model.train().requires_grad_(True)


class Pretraining:
    """One run in one folder, from nothing or from the weights of the checkpoint `init`."""

    def __init__(
        self,
        config: PretrainConfig,
        corpus: list[Path],
        out: Path,
        *,
        init: Path | None = None,
        questions: Path | None = None,
        threads: int = 1,
    ) -> None:
        if config.start_share > 0 and init is None:
            raise ValueError("start_share is a share of the weights of --init: give it")
        self.config, self.out, self.init, self.threads = config, out, init, threads
        self.pool = ThreadPoolExecutor(threads)
        prose = Prose(corpus, max_chars=config.max_corpus_chars, seed=config.seed)
        if (out / "progress.json").exists():
            raise RunFolderError(f"{out} holds a run of an earlier version; give another folder")
        out.mkdir(parents=True, exist_ok=True)
        if init is not None:
            for name in _TOKENIZER_FILES:
                shutil.copyfile(init / name, out / name)
        if not (out / "tokenizer.json").exists():
            log.info("training a tokenizer of %d tokens", config.model.vocab_size)
            train_tokenizer(tokenizer_texts(prose, config.seed), config.model.vocab_size, out)
        asked = read_questions(questions) if questions is not None else []
        passages = Passages(asked) if asked else None
        self.tasks = Tasks(prose, load_tokenizer(out), passages, Excerpts(asked))
        self.step = self.num_tokens = 0
        self.seconds = 0.0
        self.checkpoints = Checkpoints(out)
        self.model = self._restore()
        self.right: dict[str, list[float]] = {}

    def _restore(self) -> DeltaNet:
        self.checkpoints.recover()
        saved = self.checkpoints.progress()
        self.start_hash: str | None = None
        if saved is not None:
            self._refuse_another_run(saved)
            self._refuse_another_start(saved)
            model = _load(self.checkpoints.folder)
            self.step, self.num_tokens = saved["step"], saved["num_tokens"]
            self.seconds = saved["seconds"]
            log.info("going on at step %d, %d tokens", self.step, self.num_tokens)
        elif self.init is not None:
            model = self._start(self.init)
            self.start_hash = weights_hash(model)
        else:
            model = DeltaNet(self.config.model)
            model.reset_parameters(self.config.seed)
            prime_induction(model)
        self.optimizers = Optimizers(model, self.config)
        if saved is not None:
            self.optimizers.restore(self.checkpoints.optimizer_state())
        return model

    def _start(self, init: Path) -> DeltaNet:
        """The weights that a run from `init` begins with."""
        model = _load(init)
        if is_deeper(self.config.model, than=model.config):
            model = grow(model, self.config.model.num_hidden_layers)
        if model.config != self.config.model:
            raise ValueError(f"{init} is of another shape than [model] of the run's file")
        return model

    def _refuse_another_run(self, saved: dict[str, Any]) -> None:
        """Samples, rates and stages follow from the configuration: with another one the run would
        end neither where it was to end nor where one from the beginning does."""
        mine = self.config.to_dict()
        # earlier versions did not write it down, or knew nothing of start_share
        theirs = {"start_share": 0.0, **saved.get("config", mine)}
        for name in mine:
            if mine[name] != theirs.get(name):
                raise RunFolderError(
                    f"{self.out} was begun with another {name!r}; give the file that it was begun "
                    f"with, or another folder and --init {self.checkpoints.folder}"
                )

    def _refuse_another_start(self, saved: dict[str, Any]) -> None:
        """What it leaves has a share of the weights that it was begun with, and of no others."""
        self.start_hash = saved.get("start_hash")  # earlier versions did not write it down
        if self.config.start_share == 0 or self.init is None or self.start_hash is None:
            return
        if weights_hash(self._start(self.init)) != self.start_hash:
            raise RunFolderError(
                f"{self.out} was begun from other weights than those of {self.init}; give the "
                "--init that it was begun with"
            )

    def save(self) -> None:
        """Replace the checkpoint."""
        progress = {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "start_hash": self.start_hash,
        }
        self.checkpoints.save(
            self.model.config,
            self.model.state_dict(),
            self.optimizers.state(),
            progress,
            init=self.out,
        )

    def run(
        self, *, save_every_s: float = 180, said: Said = log_line, say_every_s: float = 10
    ) -> None:
        """Train to the last stage's end."""
        saved_at = said_at = time.monotonic()
        said_tokens, losses = self.num_tokens, []
        while self.num_tokens < self.config.total_tokens:
            started = time.monotonic()
            losses.append(self.take_step())
            now = time.monotonic()
            self.seconds += now - started
            if now - said_at > say_every_s:
                said(self._numbers(losses, self.num_tokens - said_tokens, now - said_at))
                said_at, said_tokens, losses = now, self.num_tokens, []
            if now - saved_at > save_every_s:
                self.save()
                saved_at = now
        if losses:
            seconds = time.monotonic() - said_at
            said(self._numbers(losses, self.num_tokens - said_tokens, seconds))
        self.save()
        self.export()

    def _numbers(self, losses: list[float], num_tokens: int, seconds: float) -> dict[str, Any]:
        speed = num_tokens / seconds
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "loss": sum(losses) / len(losses),
            "right": {kind: sum(v) / len(v) for kind, v in sorted(self.right.items())},
            "tokens_per_s": speed,
            "left_s": max(0, self.config.total_tokens - self.num_tokens) / speed,
        }

    def export(self) -> None:
        """Write `<out>/final`: the checkpoint as it ships, bfloat16 weights and the tokenizer."""
        final = self.out / "final"
        model = self.model
        if self.config.start_share > 0 and self.init is not None:
            model = mean_of(self._start(self.init), model, share=self.config.start_share)
        save_model(model, final, dtype=torch.bfloat16)
        for name in _TOKENIZER_FILES:
            shutil.copyfile(self.out / name, final / name)

    def take_step(self) -> float:
        """Draw one batch and learn from it; returns the loss."""
        tokens_BT, weights_BT, kinds = draw_batch(
            self.config, self.tasks, self.step, self.num_tokens
        )
        total_weight = weights_BT[:, 1:].sum()

        def learn(part: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast):
                loss, right_BT = weighted_loss(self.model, *part)
            loss = loss / total_weight
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item(), right_BT

        # rows of a batch in parallel: small operations gain nothing from threads of their own
        parts = zip(tokens_BT.chunk(self.threads), weights_BT.chunk(self.threads), strict=True)
        results = list(self.pool.map(learn, parts))
        loss = sum(part_loss for part_loss, _ in results)
        right_BT = torch.cat([right_BT for _, right_BT in results])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizers.step(self.config.rate_at(self.step, self.num_tokens))
        answer_BT = weights_BT[:, 1:] >= 1.0
        for row, kind in enumerate(kinds):
            if count := int(answer_BT[row].sum()):
                share = float((right_BT[row] & answer_BT[row]).sum()) / count
                self.right[kind] = [*self.right.get(kind, []), share][-200:]
        self.step += 1
        self.num_tokens += tokens_BT.numel()
        return loss


def pretrain(
    config_path: Path,
    corpus: Path,
    out: Path,
    *,
    init: Path | None = None,
    questions: Path | None = None,
    threads: int = 2,
    said: Said = log_line,
) -> None:
    """Train as `config_path` says on every train-*.jsonl.zst of `corpus`, into the folder `out`.

    A run that has been interrupted goes on; a new one starts from nothing, or from the weights and
    the tokenizer of the checkpoint `init`. The kind `questions` practises on those of a file.
    """
    files = sorted(corpus.glob("train-*.jsonl.zst"))
    if not files:
        raise ValueError(f"{corpus} holds no train-*.jsonl.zst files")
    torch.set_num_threads(1)
    config = PretrainConfig.load(config_path)
    run = Pretraining(config, files, out, init=init, questions=questions, threads=threads)
    run.run(said=said)
