"""From a name to a folder: paths, hub ids, revisions; offline from the hub's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imprint.models.errors import CheckpointError
from imprint.models.hub import file_patterns, find_checkpoint

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A cache as huggingface_hub leaves it: two revisions of one model, the newer one is main."""
    repository = tmp_path / "hub" / "models--someone--tiny.model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    for revision in (OLD, NEW):
        shutil.copytree(tiny_checkpoint, repository / "snapshots" / revision)
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / NEW / "sizes" / "small")
    return tmp_path / "hub"


def find(cache: Path, name: str, revision: str = "") -> subprocess.CompletedProcess[str]:
    """`find_checkpoint` in a process of its own, where the hub is out of reach."""
    code = (
        "import sys\n"
        "from imprint.models.errors import CheckpointError\n"
        "from imprint.models.hub import find_checkpoint\n"
        "try: found = find_checkpoint(sys.argv[1], revision=sys.argv[2] or None)\n"
        "except CheckpointError as error: sys.exit(str(error))\n"
        "assert 'torch' not in sys.modules\n"
        "print(found.folder, found.name)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, name, revision],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_folder_is_taken_as_it_is(tiny_checkpoint: Path) -> None:
    found = find_checkpoint(tiny_checkpoint)
    assert (found.folder, found.name) == (tiny_checkpoint, tiny_checkpoint.name)
    with pytest.raises(CheckpointError, match=r"revision 'v1' was given, but .* is a folder"):
        find_checkpoint(tiny_checkpoint, revision="v1")


@pytest.mark.parametrize(
    "name", ["/nowhere", "nowhere", "../a/b", "a//b", "a/b/../c", "https://x.y/a", ".a/b", "a/b c"]
)
def test_what_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint folder, and not an id"):
        find_checkpoint(name)


@pytest.mark.parametrize(
    ("name", "revision", "folder"),
    [
        ("someone/tiny.model", "", NEW),
        ("someone/tiny.model", "v1", OLD),
        ("someone/tiny.model", OLD, OLD),
        ("someone/tiny.model/sizes/small", "", f"{NEW}/sizes/small"),
    ],
)
def test_hub_id_is_found_in_the_cache(cache: Path, name: str, revision: str, folder: str) -> None:
    done = find(cache, name, revision)
    assert done.returncode == 0, done.stderr
    path, shown = done.stdout.split()
    snapshots = cache / "models--someone--tiny.model" / "snapshots"
    assert Path(path).resolve() == (snapshots / folder).resolve()
    assert shown == name


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/else", "", "cannot get someone/else from the Hugging Face Hub: the hub cannot"),
        ("someone/tiny.model", "v2", "cannot get someone/tiny.model at revision v2"),
        ("someone/tiny.model/sizes/large", "", "has no config.json in sizes/large"),
        ("some..one/--x", "", "cannot get some..one/--x"),
    ],
)
def test_what_the_cache_does_not_hold(cache: Path, name: str, revision: str, message: str) -> None:
    done = find(cache, name, revision)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("inside", "prefix"), [("", ""), ("sizes/small", "sizes/small/")])
def test_only_data_of_one_folder_is_ever_fetched(inside: str, prefix: str) -> None:
    from huggingface_hub.utils import filter_repo_objects

    good = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "question_template.jinja",
        "neutral.txt",
        "README.md",
    ]
    bad = ["pytorch_model.bin", "model.pt", "modeling_x.py", "training_args.bin", "a.pkl", "x.sh"]
    names = [prefix + name for name in good + bad]
    elsewhere = ["other/model.safetensors", f"{prefix}deeper/model.safetensors", "x/config.json"]
    wanted, unwanted = file_patterns(inside)
    kept = filter_repo_objects(names + elsewhere, allow_patterns=wanted, ignore_patterns=unwanted)
    assert list(kept) == [prefix + name for name in good]
