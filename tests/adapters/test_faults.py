"""Faults on purpose: what a plan says, whom it concerns, and that without one nothing happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imprint.adapters import faults
from imprint.adapters.faults import Fault, FaultError, Faults
from imprint.adapters.files import FileFolder, ProgressFolder, StoreGoneError, partial_suffix

WRITE = """
import sys
from imprint.adapters.files import FileFolder, partial_suffix
FileFolder(sys.argv[1]).write("a", b"new" * 100_000, durable=True)
"""


def test_a_plan_is_read() -> None:
    plan = "worker-0.1/step@3=kill, api/journal_write@5-9=full,worker/message_send=hang"
    forever = float("inf")
    assert faults.parse(plan) == [
        Fault("worker-0.1", "step", 3, 3, "kill"),
        Fault("api", "journal_write", 5, 9, "full"),
        Fault("worker", "message_send", 1, forever, "hang"),
    ]
    assert faults.parse("api/step@2-=full")[0].last == forever
    assert faults.parse("") == []


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("step=kill", "is not PROCESS/POINT@HITS=KIND"),
        ("worker/stepp=kill", "no point 'stepp'; there is journal_write"),
        ("api/step=die", "no kind 'die'; there is kill, full, hang"),
        ("api/step@x=kill", "is not"),
    ],
)
def test_nonsense_is_refused(plan: str, reason: str) -> None:
    with pytest.raises(FaultError, match=reason):
        faults.parse(plan)


def test_a_fault_comes_at_its_hits_and_a_full_disk_empties() -> None:
    planned = Faults(faults.parse("api/journal_write@2-3=full"))
    outcomes = []
    for _ in range(5):
        planned.hit("step")
        try:
            planned.hit("journal_write")
        except OSError as error:
            outcomes.append(error.errno)
        else:
            outcomes.append(0)
    assert outcomes == [0, errno.ENOSPC, errno.ENOSPC, 0, 0]


def test_each_worker_gets_its_own_faults_and_no_others() -> None:
    plan = "worker-0.1/step@3=kill,worker-1/step=hang,worker/message_send@2-4=full,api/step=full"
    environ = {"HOME": "/", faults.VARIABLE: plan}
    said = faults.parse(faults.for_worker(environ, "worker-0.1"))
    assert [(f.point, f.first, f.last, f.kind) for f in said] == [
        ("step", 3, 3, "kill"),
        ("message_send", 2, 4, "full"),
    ]
    second = faults.parse(faults.for_worker(environ, "worker-0.2"))
    assert [fault.point for fault in second] == ["message_send"]
    only_api = {"HOME": "/", faults.VARIABLE: "api/step=kill"}
    assert faults.for_worker(only_api, "worker-0.1") == ""
    assert faults.for_worker({"HOME": "/"}, "worker-0.1") == ""


@pytest.mark.parametrize("point", ["artefact_write", "artefact_rename"])
def test_a_process_that_dies_while_it_writes_leaves_the_old_file(
    tmp_path: Path, point: str
) -> None:
    folder = FileFolder(tmp_path)
    folder.write("a", b"old", durable=True)
    environ = {**os.environ, faults.VARIABLE: f"api/{point}=kill"}
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    died = subprocess.run(command, env=environ, check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL
    (torn,) = tmp_path.glob("*.partial")
    assert torn.stat().st_size == (150_000 if point == "artefact_write" else 300_000)
    assert folder.path("a").read_bytes() == b"old"
    assert FileFolder(tmp_path).ids() == ["a"]
    assert not torn.exists()  # swept by the next process that opens the folder
    alive = {key: value for key, value in os.environ.items() if key != faults.VARIABLE}
    subprocess.run(command, env=alive, check=True, timeout=60)
    assert folder.path("a").read_bytes() == b"new" * 100_000


def test_a_full_disk_keeps_the_old_file_and_leaves_no_torn_one(tmp_path: Path) -> None:
    folder = FileFolder(tmp_path)
    folder.write("a", b"old", durable=True)
    environ = {**os.environ, faults.VARIABLE: "api/artefact_write=full"}
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    failed = subprocess.run(
        command, env=environ, check=False, timeout=60, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert folder.path("a").read_bytes() == b"old"


def test_a_folder_that_goes_away_is_not_made_anew(tmp_path: Path) -> None:
    root, away = tmp_path / "store", tmp_path / "away"
    folder = FileFolder(root)
    progress = ProgressFolder(root)
    folder.write("a", b"kept", durable=True)
    assert progress.free_bytes > 0
    root.rename(away)
    with pytest.raises(StoreGoneError, match="the store's folder is not there"):
        folder.write("b", b"new", durable=True)
    with pytest.raises(StoreGoneError):
        folder.delete("a")
    with pytest.raises(StoreGoneError):
        progress.delete("a")
    assert progress.free_bytes == 0
    assert not root.exists()
    away.rename(root)
    assert folder.path("a").read_bytes() == b"kept"
    assert folder.delete("a")
    assert not folder.delete("a")


def test_deleting_takes_along_what_a_dead_process_left(tmp_path: Path) -> None:
    folder = FileFolder(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"a{partial_suffix(process=dead.pid)}").write_bytes(b"half of it")
    assert not folder.delete("a")
    assert list(tmp_path.iterdir()) == []
