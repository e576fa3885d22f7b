"""Mid- and post-training: gradients, resumption, several processes, and what can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.training.checkpoints import SHARD_BYTES, RunFolderError
from imprint.adapters.training.corpus import Prose
from imprint.adapters.training.examples import LongTexts, Pairs, find_files
from imprint.adapters.training.refine_config import Phase, RefineTrainingConfig
from imprint.adapters.training.run_folder import RunFolder
from imprint.adapters.training.start import TrainingPaths, train
from imprint.adapters.training.supervised import supervised_step
from imprint.adapters.training.tokenizer import train_tokenizer
from imprint.models.architecture import FastWeightModel
from imprint.models.checkpoint import load_model, save_model, weights_hash
from imprint.models.registry import build_model, parse_config
from imprint.models.tokenizer import load_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 16},
    "lact_swiglu": {"num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 16},
}
METHOD = {"positions": 3, "rollout_length": 3, "segment_tokens": 32, "margin_tokens": 2}
SMALL: dict[str, Any] = {
    "steps": 3,
    "documents": 3,
    "document_tokens": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "method": METHOD,
}


def small_model(model_type: str, vocab_size: int) -> FastWeightModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    raw = {"model_type": model_type, "vocab_size": vocab_size, **shape, **SIZES[model_type]}
    model = build_model(parse_config(raw))
    model.reset_parameters(0)
    return model


@pytest.fixture(scope="module", params=list(SIZES))
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of each architecture, with one tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    prose = Prose(sorted(corpus.glob("*.zst")), max_chars=10**6)
    train_tokenizer((" ".join(document) for document in prose.documents), 320, root)
    folders = {}
    for name in SIZES:
        folders[name] = root / name
        save_model(small_model(name, 320), folders[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(root / file, folders[name] / file)
    return folders


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with responses, in both forms."""
    words = ["the", "river", "ran", "past", "old", "mills", "seven", "men", "carried", "lanterns"]
    records: list[dict[str, Any]] = [
        {"prompt": " ".join(words[i:] + words[:i]), "response": f" {words[i]}\n"} for i in range(6)
    ]
    question = {"question": "Who carried lanterns?", "answers": ["seven men"]}
    records.append({"context": " ".join(words * 2), **question})
    records.append({"context": " ".join(words), **question, "us_only": True})
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def run(
    phase: Phase,
    init: Path,
    data: Path,
    out: Path,
    *,
    times: int = 1,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
    **fields: Any,
) -> list[dict[str, float]]:
    """Train in so many pieces; the rounds' numbers without their times."""
    config = RefineTrainingConfig.from_dict(phase, {**SMALL, **fields})
    for _ in range(times):
        seconds = 0.0 if times > 1 else None  # one round a piece
        paths = TrainingPaths(init=init, data=[data], out=out)
        train(config, paths, seconds=seconds, shard_bytes=shard_bytes, device=device)
    rounds = RunFolder(out).rounds.read()
    return [{k: v for k, v in numbers.items() if k != "seconds"} for numbers in rounds]


def test_mid_training_lowers_the_loss_and_leaves_a_checkpoint(
    model_type: str, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    rounds = run("mid", checkpoints[model_type], corpus, tmp_path / "run", steps=8)
    assert [numbers["step"] for numbers in rounds] == list(range(8))
    assert rounds[-1]["ntp_loss"] < rounds[0]["ntp_loss"] - 0.05
    assert all(numbers["reward_mean"] != 0 for numbers in rounds)
    assert rounds[-1]["num_tokens"] == 8 * 3 * 64
    folder = tmp_path / "run" / "checkpoint"
    trained, start = load_model(folder), load_model(checkpoints[model_type])
    assert weights_hash(trained) != weights_hash(start)
    assert load_tokenizer(folder).vocab_size == load_tokenizer(checkpoints[model_type]).vocab_size


def test_post_training_lowers_the_loss_of_responses(
    model_type: str, checkpoints: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    rounds = run("post", checkpoints[model_type], pairs, tmp_path / "run", steps=10)
    first, last = (sum(r["response_loss"] for r in part) for part in (rounds[:3], rounds[-3:]))
    assert last < first - 0.3
    assert {"ntp_loss", "reward_mean", "response_grad_norm"} <= set(rounds[0])


def test_without_prompt_steps_post_training_is_supervised(
    checkpoints: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    rounds = run("post", checkpoints["delta_net"], pairs, tmp_path / "run", prompt_steps=0)
    assert {"response_loss", "response_grad_norm"} < set(rounds[0])
    assert not {"ntp_loss", "policy_loss"} & set(rounds[0])


def test_next_token_training_alone_tells_no_reward(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    rounds = run(
        "mid",
        checkpoints["delta_net"],
        corpus,
        tmp_path / "run",
        steps=1,
        method={**METHOD, "lambda_rl": 0},
    )
    assert "ntp_loss" in rounds[0]
    assert not {"policy_loss", "reward_mean"} & set(rounds[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model_type", "phase"),
    [("delta_net", "mid"), ("gated_deltanet", "post"), ("lact_swiglu", "post")],
    indirect=["model_type"],
)
def test_a_gpu_trains_as_a_cpu_does(
    model_type: str,
    checkpoints: dict[str, Path],
    corpus: Path,
    pairs: Path,
    tmp_path: Path,
    phase: Phase,
) -> None:
    # resumed after each round; and from the document alone, since devices sample differently
    data = corpus if phase == "mid" else pairs
    init, method = checkpoints[model_type], {**METHOD, "lambda_rl": 0.0}
    there, here = (
        run(phase, init, data, tmp_path / device, times=3, device=device, steps=2, method=method)
        for device in ("cuda", "cpu")
    )
    assert [numbers.keys() for numbers in there] == [numbers.keys() for numbers in here]
    for name, value in here[-1].items():
        assert there[-1][name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("phase", ["mid", "post"])
def test_a_run_in_pieces_is_the_run_at_once(
    phase: Phase, checkpoints: dict[str, Path], corpus: Path, pairs: Path, tmp_path: Path
) -> None:
    init, data = checkpoints["delta_net"], corpus if phase == "mid" else pairs
    whole = run(phase, init, data, tmp_path / "whole", steps=4)
    # with a file or more for each tensor of weights and optimizer
    pieces = run(phase, init, data, tmp_path / "pieces", steps=4, times=4, shard_bytes=10_000)
    assert pieces == whole
    assert len(list((tmp_path / "pieces" / "checkpoint" / "optimizer").iterdir())) > 2
    ends = [load_model(tmp_path / name / "checkpoint") for name in ("whole", "pieces")]
    assert weights_hash(ends[0]) == weights_hash(ends[1])


@pytest.mark.parametrize("chunk", [20, 64])
def test_weights_that_had_no_gradient_yet_are_gone_on_with(
    checkpoints: dict[str, Path], pairs: Path, tmp_path: Path, chunk: int
) -> None:
    # texts that complete no chunk give LaCT's learning rates none: in the first round, or in all
    config = json.loads((checkpoints["lact_swiglu"] / "config.json").read_text())
    init = tmp_path / "init"
    shutil.copytree(checkpoints["lact_swiglu"], init)
    (init / "config.json").write_text(json.dumps({**config, "lact_chunk_size": chunk}))
    whole = run("post", init, pairs, tmp_path / "whole")
    assert run("post", init, pairs, tmp_path / "pieces", times=3) == whole


def test_metrics_of_rounds_that_were_not_saved_are_forgotten(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    whole = run("mid", checkpoints["delta_net"], corpus, tmp_path / "whole", steps=3)
    run("mid", checkpoints["delta_net"], corpus, out, steps=3, times=1)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "ntp_loss": 0.0}\n{"step": 4, "ntp')  # killed in mid-line
    assert run("mid", checkpoints["delta_net"], corpus, out, steps=3) == whole


def test_a_kill_between_two_renames_loses_nothing(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    whole = run("mid", checkpoints["delta_net"], corpus, tmp_path / "whole", steps=2)
    run("mid", checkpoints["delta_net"], corpus, out, steps=2, times=2)
    (out / "checkpoint").rename(out / "checkpoint.old")
    (out / "checkpoint.new").mkdir()  # not whole: no progress.json in it
    assert run("mid", checkpoints["delta_net"], corpus, out, steps=2) == whole
    assert not list(out.glob("checkpoint.*"))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    checkpoints: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    # post-training has updates of both kinds
    one = run("post", checkpoints["delta_net"], pairs, tmp_path / "one")
    config = tmp_path / "run.toml"
    fields = [f"{k} = {v}" for k, v in SMALL.items() if k != "method"]
    method = ["[method]", *(f"{k} = {v}" for k, v in METHOD.items())]
    config.write_text("\n".join([*fields, *method]), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "imprint.server.cli", "train", "post", "--config", str(config)]
    command += ["--model", str(checkpoints["delta_net"]), "--data", str(pairs)]
    command += ["--out", str(tmp_path / "two")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    two = RunFolder(tmp_path / "two").rounds.read()
    assert [numbers["step"] for numbers in two] == [numbers["step"] for numbers in one]
    for mine, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    # one process goes on with what two have written
    assert len(run("post", checkpoints["delta_net"], pairs, tmp_path / "two")) == 3


def test_the_supervised_gradient_is_that_of_the_whole_sequence(model_type: str) -> None:
    model = small_model(model_type, 50).double().requires_grad_(True)
    draw = torch.Generator().manual_seed(1)
    prompt_T = torch.randint(50, (53,), generator=draw)
    response_R = torch.randint(50, (5,), generator=draw)
    loss = supervised_step(model, prompt_T, response_R, segment_tokens=16)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden_BTD, _ = model(torch.cat((prompt_T, response_R))[:-1].unsqueeze(0))
    expected = -model.token_logprobs(hidden_BTD[0, 52:], response_R).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            error = (grads[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-9, name


def test_long_texts_have_their_length_and_their_places(
    checkpoints: dict[str, Path], corpus: Path
) -> None:
    import random

    texts = LongTexts(
        find_files([corpus]),
        load_tokenizer(checkpoints["delta_net"]),
        num_tokens=700,
        max_chars=9000,
    )
    drawn = [texts.draw(random.Random(i)) for i in range(5)]
    assert all(len(example.document) == 700 and not example.response for example in drawn)
    assert len({tuple(example.document) for example in drawn}) == 5
    assert texts.draw(random.Random(3)) == drawn[3]


def test_pairs_leave_out_what_is_too_long_or_not_free(
    checkpoints: dict[str, Path], pairs: Path
) -> None:
    tokenizer = load_tokenizer(checkpoints["delta_net"])
    assert len(Pairs([pairs], tokenizer, most_tokens=500)) == 7
    assert len(Pairs([pairs], tokenizer, most_tokens=30)) < 7
    with pytest.raises(ValueError, match="no prompt has 2 to 2 tokens"):
        Pairs([pairs], tokenizer, most_tokens=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, "unknown field 'stepz'"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"documents": 0}, "documents must be at least 1, got 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"method": {"branches": "recall"}}, "branches must be continue, got recall"),
        ({"method": {"scope": "lora"}}, "scope has no meaning in a training run"),
        ({"method": {"rewrd": "exact"}}, "has no field 'rewrd'"),
        ({"method": {"reward": "best"}}, "reward"),
        ({"method": {"reward": "semantic"}}, "reward semantic needs an encoder"),
        ({"method": {"probe_places": 9}}, "probe_places has no meaning in a training run"),
    ],
)
def test_a_bad_configuration_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefineTrainingConfig.from_dict("mid", fields)


def test_what_only_a_server_uses_does_not_tell_runs_apart() -> None:
    method = RefineTrainingConfig.from_dict("mid", {"method": METHOD}).to_dict()["method"]
    assert set(METHOD) < set(method)
    assert not {"held_steps", "probe_places", "scope"} & set(method)


def test_another_run_is_not_gone_on_with(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run("mid", checkpoints["delta_net"], corpus, out, steps=1)
    shard = next((out / "checkpoint" / "optimizer").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=f"{shard.name} has"):
        run("mid", checkpoints["delta_net"], corpus, out, steps=1)
    with pytest.raises(RunFolderError, match="other settings"):
        run("mid", checkpoints["delta_net"], corpus, out, steps=1, learning_rate=1.0)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not empty"):
        run("mid", checkpoints["delta_net"], corpus, strange)
