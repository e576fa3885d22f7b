"""Commands that ask a running server, the file of settings, and completion."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imprint.server.cli import main
from imprint.server.commands.common import UsageError, file_settings, load_settings
from imprint.server.commands.local_server import local_server
from imprint.server.config import Settings, unknown_variables


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = Settings(model=tiny_checkpoint, data_dir=tmp_path_factory.mktemp("data"))
    with local_server(settings) as url:
        yield url


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_documents_and_their_adaptations(url, tmp_path, capsys) -> None:
    at = ("--url", url)
    note, exported = tmp_path / "note.md", tmp_path / "adapter.safetensors"
    note.write_text("The harbour office opens at nine. " * 4)
    stored = json.loads(said(capsys, "documents", "add", str(note), "--title", "N", *at, "--json"))
    assert f"{stored['id']}  " in said(capsys, "documents", "list", *at)
    assert "harbour office" in said(capsys, "documents", "show", stored["id"], "--text", *at)
    job = json.loads(
        said(capsys, "adapt", str(note), "--set", "steps=1", "--set", "group_size=2", *at, "--json")
    )
    assert job["id"] in said(capsys, "adaptations", "list", *at)
    assert job["status"] in said(capsys, "adaptations", "follow", job["id"], *at)
    said(capsys, "adaptations", "export", job["id"], str(exported), *at)
    size = exported.stat().st_size
    assert size > 1000
    assert main(["adaptations", "export", job["id"], str(exported), *at]) == 2
    assert exported.stat().st_size == size
    capsys.readouterr()
    listed = json.loads(said(capsys, "adaptations", "list", *at, "--json"))
    assert [item["id"] for item in listed["data"]] == [job["id"]]
    cards = json.loads(said(capsys, "models", "list", *at, "--json"))["data"]
    assert [card["parent"] for card in cards] == [None, cards[0]["id"]]
    assert said(capsys, "models", "list", *at).splitlines()[0] == f"{cards[0]['id']}  base"
    assert main(["models", "list", "--limit", "1", *at]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{cards[0]['id']}  base"]
    assert told.err == f"imprint: there are more: --after {cards[0]['id']}\n"
    more = said(capsys, "models", "list", "--after", cards[0]["id"], *at)
    assert more.startswith(f"{cards[1]['id']}  ")
    deleted = json.loads(said(capsys, "adaptations", "delete", job["id"], *at, "--json"))
    assert deleted == {"id": job["id"], "deleted": True}
    taken = json.loads(said(capsys, "adaptations", "import", str(exported), *at, "--json"))
    assert taken["method"] == {"type": "import"}
    assert taken["status"] in ("succeeded", "rejected")
    longer = said(capsys, "documents", "append", stored["id"], str(note), "--version", "1", *at)
    assert longer.startswith(f"{stored['id']}  ")
    assert "harbour" in said(capsys, "documents", "show", stored["id"], "--text", *at)
    assert main(["documents", "append", stored["id"], str(note), "--version", "1", *at]) == 1
    assert "version" in capsys.readouterr().err
    shown = json.loads(said(capsys, "documents", "show", stored["id"], *at, "--json"))
    assert shown["version"] == 2
    said(capsys, "adaptations", "delete", taken["id"], *at)
    said(capsys, "documents", "delete", stored["id"], *at)
    assert main(["documents", "show", stored["id"], *at]) == 1
    assert "no document" in capsys.readouterr().err


def test_a_key_is_read_from_a_file(url, tmp_path, capsys) -> None:
    missing = ["documents", "list", "--url", url, "--api-key-file", str(tmp_path / "missing")]
    assert main(missing) == 2
    assert "cannot be read" in capsys.readouterr().err
    key = tmp_path / "key"
    key.write_text("sk-a-key-0123456789\n")
    assert main(["documents", "list", "--url", url, "--api-key-file", str(key)]) == 0


def test_the_clients_variable_is_no_misspelling() -> None:
    assert unknown_variables({"IMPRINT_API_KEY": "x", "IMPRINT_API_KEYZ": "x"}) == [
        "IMPRINT_API_KEYZ"
    ]


def settings_in(folder: Path, environ: dict[str, str], *flags: str) -> tuple[int, int]:
    """`port` and `num_slots` as a process in this folder, with these variables, sees them."""
    code = (
        "import sys; from imprint.server.cli import build_parser\n"
        "from imprint.server.commands.common import load_settings\n"
        "found = load_settings(build_parser().parse_args(['serve', *sys.argv[1:]]))\n"
        "sys.stdout.write(f'{found.port} {found.num_slots}')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    port, num_slots = result.stdout.split()
    return int(port), int(num_slots)


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    assert settings_in(tmp_path, {}) == (8765, 64)
    (tmp_path / "imprint.toml").write_text("port = 9001\nnum_slots = 3\n")
    assert settings_in(tmp_path, {}) == (9001, 3)
    assert settings_in(tmp_path, {"IMPRINT_PORT": "9002"}) == (9002, 3)
    assert settings_in(tmp_path, {"IMPRINT_PORT": "9002"}, "--port", "9003") == (9003, 3)
    other = tmp_path / "other.toml"
    other.write_text("port = 9004\n")
    assert settings_in(tmp_path, {}, "--config", str(other)) == (9004, 64)


@pytest.mark.parametrize("text", ["prot = 1", "port = ", "[port]\nx = 1"])
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.toml|--port"):
        load_settings(argparse.Namespace(config=path))
    with pytest.raises(UsageError, match="there is no"):
        file_settings(tmp_path / "missing.toml", needed=True)


def completions(script: str, *words: str) -> set[str]:
    line = " ".join(f"'{word}'" for word in words)
    code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _imprint\n"
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True, timeout=20
    )
    return set(result.stdout.split())


def test_bash_completes_commands_and_flags(capsys) -> None:
    script = said(capsys, "completion", "bash")
    assert {"serve", "documents", "completion"} <= completions(script, "imprint", "")
    assert completions(script, "imprint", "doc") == {"documents"}
    assert completions(script, "imprint", "documents", "sh") == {"show"}
    assert "--text" in completions(script, "imprint", "documents", "show", "--")
    assert "--port" in completions(script, "imprint", "serve", "--po")
    assert completions(script, "imprint", "completion", "f") == {"fish"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_read_their_script(capsys, tmp_path: Path, shell: str) -> None:
    script = said(capsys, "completion", shell)
    assert "documents" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script is printed, not read")
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run([shell, "-n", str(path)], check=True, timeout=20)
