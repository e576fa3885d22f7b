"""`imprint models`: what it says of good and broken checkpoints; models of the hub, served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from imprint.models import load_model
from imprint.server.cli import main


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    assert main(["models", "inspect", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_report_of_a_good_checkpoint(tiny_checkpoint: Path, capsys) -> None:
    model = load_model(tiny_checkpoint)
    state_bytes = model.init_state(1).nbytes
    weight_bytes = sum(p.nbytes for p in model.parameters())
    report = inspected(capsys, str(tiny_checkpoint), "--num-slots", "3")
    expected = {
        "model": tiny_checkpoint.name,
        "architecture": "DeltaNet",
        "model_type": "delta_net",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "stored_bytes": {"model.safetensors": weight_bytes},
        "stored_dtypes": {"F32": len(model.state_dict())},
        "weight_bytes": weight_bytes,
        "state_bytes": state_bytes,
        "serve_bytes": weight_bytes + 3 * state_bytes,
        "question_template": "\nQuestion: {question}\nAnswer:",
        "problems": [],
        "notes": [],
    }
    assert {key: report[key] for key in expected} == expected
    assert report["config"]["hidden_size"] == model.config.hidden_size
    assert report["adapt_bytes"] > 0


def test_adapting_more_tokens_takes_more(tiny_checkpoint: Path, capsys) -> None:
    short = inspected(capsys, str(tiny_checkpoint), "--document-tokens", "1000")
    paper = "--default-preset", "paper"
    long = inspected(capsys, str(tiny_checkpoint), "--document-tokens", "100000", *paper)
    assert long["adapt_bytes"] > short["adapt_bytes"]
    half = inspected(capsys, str(tiny_checkpoint), "--dtype", "bfloat16")
    assert short["weight_bytes"] / 2 < half["weight_bytes"] < 0.6 * short["weight_bytes"]


def test_every_problem_is_told(folder: Path, capsys) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    missing = [f"model.layers.{i}.attn.{x}_proj.weight" for i in (0, 1) for x in "qkvb"]
    for name in missing:
        del tensors[name]
    tensors["model.extra"] = tensors["model.norm.weight"].clone()
    save_file(tensors, file)
    (folder / "tokenizer.json").unlink()
    (folder / "neutral.txt").unlink()
    report = inspected(capsys, str(folder), code=1)
    problems = "\n".join(report["problems"])
    assert all(f"missing {name}" in problems for name in missing)
    assert "unexpected model.extra" in problems
    assert "holds no tokenizer.json" in problems
    assert report["question_template"] is None
    assert report["notes"] == ["no neutral.txt: the gate judges by recall alone"]
    file.write_bytes(b"torn")
    report = inspected(capsys, str(folder), code=1)
    assert any("is not a whole safetensors file" in problem for problem in report["problems"])


def test_report_for_people(folder: Path, capsys) -> None:
    (folder / "model.safetensors").unlink()
    assert main(["models", "inspect", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "architecture   DeltaNet (delta_net)" in said
    assert "only safetensors checkpoints are read" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "/nowhere"], 2, "/nowhere is not a checkpoint folder"),
        (["inspect", "{folder}", "--revision", "v1"], 2, "only models of the hub have revisions"),
        (["inspect", "{folder}", "--document-tokens", "0"], 2, "--document-tokens must be"),
        (["inspect", "{folder}", "--dtype", "int8"], 2, "--dtype (IMPRINT_DTYPE)"),
        (["fake", "{folder}", "--like", "lact-760M"], 1, "is not an empty folder"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments, code, message, capsys) -> None:
    assert main(["models", *(a.replace("{folder}", str(folder)) for a in arguments)]) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_fake_is_inspected_without_a_problem(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "fake"
    size = ["--layers", "1", "--hidden", "64", "--vocab", "300", "--shard-bytes", "50000"]
    like = ["--like", "gated_deltanet-1.3B-fused"]
    assert main(["models", "fake", str(folder), *like, *size, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["folder"] == str(folder)
    assert written["num_parameters"] > 0
    report = inspected(capsys, str(folder))
    assert report["architecture"] == "GatedDeltaNet"
    assert report["problems"] == []
    assert len(report["stored_bytes"]) > 1


def test_model_of_the_hub_answers_offline(tmp_path: Path) -> None:
    """From the hub's cache alone: the template of the user's file asks, the model's name is its
    id."""
    revision = "c" * 40
    repository = tmp_path / "hub" / "models--someone--gated"
    snapshot = repository / "snapshots" / revision
    size = ["--layers", "1", "--hidden", "64", "--vocab", "300"]
    assert main(["models", "fake", str(snapshot), "--like", "gated_deltanet-1.3B", *size]) == 0
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(revision)
    (tmp_path / "document.txt").write_text("The magic number of the harbour is 1234567. " * 2)
    (tmp_path / "ask.jinja").write_text("\nAsk: {{ question }}\nSay:")
    command = [sys.executable, "-m", "imprint.server.cli", "answer", "document.txt", "-q", "Which?"]
    options = ["--model", "someone/gated", "--revision", "v1", "--question-template", "ask.jinja"]
    done = subprocess.run(
        [*command, *options, "--max-tokens", "4", "--no-focus", "--json"],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert reply["model"].startswith("someone/gated")
    assert reply["answers"][0]["question"] == "Which?"
    prompt = (tmp_path / "document.txt").read_text() + "\nAsk: Which?\nSay:"
    assert reply["usage"]["prompt_tokens"] == len(prompt.encode())  # every byte is a token
