"""Plots of training runs: what they hold, of which runs, and what cannot be drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imprint.adapters.training.rounds import Numbers, Rounds
from imprint.adapters.training.run_plot import MAX_RUNS, picture_of, read_runs, running_means
from imprint.server.cli import main


def rounds_of(num: int, **values: float) -> list[Numbers]:
    """Rounds of 100 tokens, in which each value rises by one."""
    return [
        {"step": i, "num_tokens": 100 * (i + 1), **{name: v + i for name, v in values.items()}}
        for i in range(num)
    ]


def write_run(folder: Path, rounds: list[Numbers]) -> Path:
    folder.mkdir()
    for numbers in rounds:
        Rounds(folder).append(numbers)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs of different phases."""
    refine = {"ntp_loss": 4.0, "policy_loss": 0.0, "reward_mean": 0.1, "grad_norm": 1.0}
    mid = write_run(tmp_path / "mid", rounds_of(6, **refine))
    post = write_run(tmp_path / "post", rounds_of(3, response_loss=2.0, response_grad_norm=1.0))
    return [str(mid), str(post)]


def test_a_picture_has_a_panel_a_metric_and_a_line_a_run() -> None:
    figure = picture_of(
        {"a": rounds_of(4, ntp_loss=2.0, grad_norm=1.0), "b": rounds_of(2, ntp_loss=1.0)},
        mean_over=2,
    )
    loss, norm = figure.axes
    assert loss.get_title() == "next-token loss, nats"
    faint_a, mean_a, _, mean_b = loss.get_lines()
    assert list(faint_a.get_ydata()) == [2, 3, 4, 5]
    assert list(mean_a.get_xdata()) == [100, 200, 300, 400]
    assert list(mean_a.get_ydata()) == [2, 2.5, 3.5, 4.5]
    assert list(mean_b.get_ydata()) == [1, 1.5]
    assert mean_a.get_color() != mean_b.get_color()
    assert [len(line.get_xdata()) for line in norm.get_lines()] == [4, 4, 0, 0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_every_run_has_a_line_of_its_own() -> None:
    named = {str(i): rounds_of(2, ntp_loss=float(i)) for i in range(MAX_RUNS)}
    lines = picture_of(named).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == MAX_RUNS
    with pytest.raises(ValueError, match="at most 24 runs can be told apart, got 25"):
        picture_of({**named, "more": rounds_of(1, ntp_loss=1.0)})


def test_running_means_start_with_what_there_is() -> None:
    assert running_means([1, 3, 5, 7], 3) == [1, 2, 3, 5]
    assert running_means([1, 3], 1) == [1, 3]


def test_a_round_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds_of(2, ntp_loss=1.0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "num_tok')
    assert [numbers["step"] for numbers in Rounds(folder).read()] == [0, 1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "num_tokens": 400}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 3 is no round"):
        Rounds(folder).read()


def test_the_command_draws_and_says_where_runs_stand(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "runs.png"
    words = ["train", "plot", *runs, "--output", str(picture), "--mean-over", "2"]
    assert main([*words, "--json"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    mid, post = json.loads(capsys.readouterr().out)["runs"]
    assert (mid["rounds"], mid["num_tokens"], mid["last"]["ntp_loss"]) == (6, 600, 8.5)
    assert post["last"] == {"response_loss": 3.5, "response_grad_norm": 2.5}
    assert main(words) == 0
    assert f"{runs[0]}: 6 rounds, 600 tokens  ntp_loss 8.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{empty}"], 2, "has no round in metrics.jsonl"),
        (["{run}", "{run}"], 2, "is given twice"),
        (["{run}", "--mean-over", "0"], 2, "--mean-over must be at least 1"),
        (["{strange}"], 2, "the runs measured none of ntp_loss"),
        (["{run}", "--output", "{empty}/no/x.png"], 1, "No such file"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    words: list[str],
    code: int,
    message: str,
    runs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strange = write_run(tmp_path / "strange", rounds_of(1))
    (tmp_path / "empty").mkdir()
    places = {"run": runs[0], "empty": tmp_path / "empty", "strange": strange}
    picture = ["--output", str(tmp_path / "x.png")]
    given = [word.format(**places) for word in words]
    assert main(["train", "plot", *picture, *given]) == code
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""


def test_without_matplotlib_it_says_what_to_install(runs: list[str]) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from imprint.server.cli import main; code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", "plot", runs[0], "--output", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "a plot needs matplotlib, which is not installed" in done.stderr


def test_runs_are_named_as_they_are_given(runs: list[str]) -> None:
    assert list(read_runs([Path(run) for run in runs])) == runs
