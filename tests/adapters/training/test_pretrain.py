"""Pre-training runs: they learn, stop and go on, and refuse what they do not understand."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.training.checkpoints import RunFolderError
from imprint.adapters.training.config import PretrainConfig
from imprint.adapters.training.growth import is_deeper
from imprint.adapters.training.pretrain import (
    Pretraining,
    draw_batch,
    pretrain,
    prime_induction,
    weighted_loss,
)
from imprint.models import DeltaNet, DeltaNetConfig, load_model, load_tokenizer
from imprint.server.cli import main

ROOT = Path(__file__).parents[3]
CONFIG = """
seed = 3
warmup_steps = 2
[model]
vocab_size = 320
hidden_size = 32
num_hidden_layers = 1
num_heads = 2
intermediate_size = 64
[[stages]]
until_tokens = {first}
batch_tokens = 256
lengths = {{ 64 = 1.0 }}
kinds = {{ repeat = 1.0 }}
[[stages]]
until_tokens = {second}
batch_tokens = 256
lengths = {{ 64 = 0.5, 128 = 0.5 }}
kinds = {{ needles = 0.5, prose = 0.5 }}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(first=1024, second=2048))
    return path


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.zst"))
    config = PretrainConfig.load(config_file)
    whole = Pretraining(config, files, tmp_path / "whole")
    said: list[dict[str, Any]] = []
    whole.run(said=said.append, say_every_s=0)
    assert [numbers["step"] for numbers in said] == list(range(1, whole.step + 1))
    assert (said[-1]["num_tokens"], said[-1]["left_s"]) == (whole.num_tokens, 0)
    assert set(said[-1]["right"]) == {"repeat", "needles"}
    halves = Pretraining(config, files, tmp_path / "halves")
    for _ in range(3):
        halves.take_step()
    halves.save()
    Pretraining(config, files, tmp_path / "halves").run()
    first, second = (
        load_model(tmp_path / name / "checkpoint").state_dict() for name in ("whole", "halves")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    shipped = load_model(tmp_path / "whole" / "final").state_dict()
    assert all(torch.allclose(shipped[name], first[name], rtol=1e-2) for name in first)
    assert load_tokenizer(tmp_path / "whole" / "final").vocab_size == config.model.vocab_size


def test_a_run_goes_on_with_its_own_file_only(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.zst"))
    config = PretrainConfig.load(config_file)
    run = Pretraining(config, files, tmp_path / "run")
    run.take_step()
    run.save()
    stages = (*config.stages, dataclasses.replace(config.stages[1], until_tokens=4096))
    for name, changed in {"stages": stages, "learning_rate": 1e-3, "seed": 4}.items():
        other = dataclasses.replace(config, **{name: changed})
        with pytest.raises(RunFolderError, match=f"another '{name}'.*--init"):
            Pretraining(other, files, tmp_path / "run")
    assert Pretraining(config, files, tmp_path / "run").step == 1
    # what an earlier version has written goes on
    file = tmp_path / "run" / "checkpoint" / "progress.json"
    saved = json.loads(file.read_text())
    del saved["progress"]["config"]["start_share"]
    file.write_text(json.dumps(saved))
    assert Pretraining(config, files, tmp_path / "run").step == 1
    del saved["progress"]["config"]
    file.write_text(json.dumps(saved))
    assert Pretraining(config, files, tmp_path / "run").step == 1


def test_two_threads_share_a_batch_and_take_the_same_step(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.zst"))
    config = PretrainConfig.load(config_file)
    runs = [Pretraining(config, files, tmp_path / f"{n}", threads=n) for n in (1, 2)]
    losses = [run.take_step() for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for one, two in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.allclose(one, two, atol=1e-3)
    again = Pretraining(config, files, tmp_path / "again", threads=2)
    again.take_step()
    for two, other in zip(runs[1].model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(two, other)


def test_a_run_can_start_from_a_checkpoint(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    files = sorted(corpus.glob("*.zst"))
    config = PretrainConfig.load(config_file)
    Pretraining(config, files, tmp_path / "first").run()
    final = tmp_path / "first" / "final"
    second = Pretraining(config, files, tmp_path / "second", init=final)
    assert second.num_tokens == 0
    weights = load_model(final).state_dict()
    started = second.model.state_dict()
    assert all(torch.equal(started[name], weights[name]) for name in weights)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_heads=4))
    with pytest.raises(ValueError, match="another shape"):
        Pretraining(other, files, tmp_path / "third", init=final)


def test_a_run_can_start_from_a_shallower_checkpoint(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.zst"))
    config = PretrainConfig.load(config_file)
    first = Pretraining(config, files, tmp_path / "first")
    first.export()
    deeper = dataclasses.replace(config.model, num_hidden_layers=2)
    config = dataclasses.replace(config, model=deeper)
    second = Pretraining(config, files, tmp_path / "second", init=tmp_path / "first" / "final")
    tokens = torch.arange(40)[None]
    hidden, _ = second.model(tokens)
    expected, _ = load_model(tmp_path / "first" / "final")(tokens)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    second.take_step()
    second.save()
    again = Pretraining(config, files, tmp_path / "second", init=tmp_path / "first" / "final")
    assert again.step == 1
    torch.testing.assert_close(again.model.state_dict(), second.model.state_dict())


def test_what_a_run_leaves_can_be_the_mean_of_its_two_ends(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.zst"))
    plain = PretrainConfig.load(config_file)
    Pretraining(plain, files, tmp_path / "first").run()
    start = tmp_path / "first" / "final"
    config = dataclasses.replace(plain, start_share=0.25, seed=4)
    run = Pretraining(config, files, tmp_path / "run", init=start)
    run.run()
    pairs = (load_model(start).state_dict(), load_model(tmp_path / "run" / "checkpoint"))
    before, after = pairs[0], pairs[1].state_dict()
    left = load_model(tmp_path / "run" / "final").state_dict()
    for name, weight in left.items():
        end = after[name].bfloat16().double()
        mean = 0.25 * before[name].double() + 0.75 * end
        assert torch.equal(weight, mean.bfloat16().float()), name
    assert any(not torch.equal(left[name], after[name].bfloat16().float()) for name in left)
    again = Pretraining(config, files, tmp_path / "run", init=start)
    again.export()  # of a run that had ended before
    assert all(
        torch.equal(weight, left[name])
        for name, weight in load_model(tmp_path / "run" / "final").state_dict().items()
    )
    with pytest.raises(ValueError, match="--init"):
        Pretraining(config, files, tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"other weights.*--init that it was begun with"):
        Pretraining(config, files, tmp_path / "run", init=tmp_path / "run" / "final")
    with pytest.raises(ValueError, match="start_share must lie"):
        dataclasses.replace(plain, start_share=1.0)


def test_the_bundled_models_parts_follow_from_each_other() -> None:
    makefile = (ROOT / "Makefile").read_text()
    parts = re.search(r"^PARTS := (.*)$", makefile, re.MULTILINE)
    assert parts
    folder = ROOT / "adapters" / "training"
    assert {path.stem for path in folder.glob("*.toml")} == set(parts[1].split())
    configs = [PretrainConfig.load(folder / f"{part}.toml") for part in parts[1].split()]
    for before, after in pairwise(config.model for config in configs):
        assert after == before or is_deeper(after, than=before)
    shipped = load_model(ROOT / "models" / "pretrained" / "imprint-tiny").config
    assert shipped == configs[-1].model


def test_training_lowers_the_loss(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "prose.toml"
    path.write_text(CONFIG.format(first=10**6, second=10**7).replace("repeat", "prose"))
    run = Pretraining(PretrainConfig.load(path), sorted(corpus.glob("*.zst")), tmp_path / "run")
    losses = [run.take_step() for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_command_says_how_it_goes_as_json(
    config_file: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--config", str(config_file), "--corpus", str(corpus), "--out", str(tmp_path / "run")]
    assert main(["train", "pretrain", *run, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["num_tokens"] >= 2048


def test_the_command_practises_questions_of_a_file(
    config_file: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_file.read_text().replace("repeat = 1.0", "questions = 1.0")
    config_file.write_text(text.replace("64 = 1.0", "256 = 1.0"))
    row = {"context": "Seven men carried lanterns.", "question": "Who?", "answers": ["Seven men"]}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(row) + "\n")
    run = ["--config", str(config_file), "--corpus", str(corpus), "--out", str(tmp_path / "run")]
    assert main(["train", "pretrain", *run]) == 2
    assert "'questions' needs a file" in capsys.readouterr().err
    assert main(["train", "pretrain", *run, "--questions", str(questions), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "questions" in last["right"]


def test_without_autocast_a_step_is_computed_in_float32(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.zst"))
    losses = {}
    for autocast in (True, False):
        config = dataclasses.replace(PretrainConfig.load(config_file), autocast=autocast)
        run = Pretraining(config, files, tmp_path / str(autocast))
        tokens_BT, weights_BT, _ = draw_batch(config, run.tasks, 0, 0)
        loss, _ = weighted_loss(run.model, tokens_BT, weights_BT)
        exact = (loss / weights_BT[:, 1:].sum()).item()
        losses[autocast] = (run.take_step(), exact)
    assert losses[False][0] == losses[False][1]
    assert losses[True][0] != losses[True][1]


def test_a_folder_without_a_corpus_is_refused(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no train-\*\.jsonl\.zst"):
        pretrain(config_file, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed = 3\nspeed = 9", "unknown field 'speed'"),
        ("", "needs at least one"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    text = CONFIG.format(first=1, second=2).replace("seed = 3", line)
    if not line:
        text = "stages = []\n[model]\nhidden_size = 32\nnum_heads = 2\n"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        PretrainConfig.load(path)


def test_a_stage_that_ends_before_the_one_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(CONFIG.format(first=10, second=5))
    with pytest.raises(ValueError, match="must rise"):
        PretrainConfig.load(path)


def test_the_rate_warms_up_holds_and_falls(config_file: Path) -> None:
    config = PretrainConfig.load(config_file)
    assert config.rate_at(0, 0) == pytest.approx(config.learning_rate / 2)
    assert config.rate_at(50, 1000) == config.learning_rate
    assert config.rate_at(50, config.total_tokens) == pytest.approx(config.learning_rate / 20)


def test_primed_heads_look_back_one_token() -> None:
    config = DeltaNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=2)
    model = DeltaNet(config)
    model.reset_parameters(0)
    prime_induction(model)
    mixer = model.model.layers[1].attn
    assert torch.equal(mixer.q_proj.weight[:16], mixer.k_proj.weight[:16])
    assert mixer.k_conv1d.weight[0, 0].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert mixer.q_conv1d.weight[0, 0].tolist() == [0.0, 0.0, 0.0, 1.0]
