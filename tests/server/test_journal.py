"""The journal: what is written is there after a crash, what is deleted is nowhere."""

import dataclasses
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imprint.adapters import faults
from imprint.server.journal import Journal, JournalFullError
from imprint.server.journal_file import JournalError
from imprint.server.records import NewAdaptation

NEW = NewAdaptation(
    id="adp_1",
    owner="me",
    text="the secret canary ü",
    model="tiny",
    method={"type": "read"},
    seed=0,
    num_tokens=4,
    pinned=True,
    metadata={"a": "b"},
)


def new(**changes: object) -> NewAdaptation:
    return dataclasses.replace(NEW, **changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def create(journal: Journal, **changes: object) -> tuple[str, bool]:
    row, is_new = journal.create(new(**changes), max_active=10)
    return row.id, is_new


def test_a_row_comes_back_as_it_was(journal: Journal) -> None:
    create(journal)
    row = journal.get("adp_1")
    assert row is not None
    assert (row.status, row.metadata, row.method) == ("queued", {"a": "b"}, {"type": "read"})
    assert row.num_bytes == len(NEW.text.encode())
    assert journal.parts("adp_1") == [NEW.text]
    assert journal.get("adp_2") is None


def test_the_same_work_is_one_job(journal: Journal) -> None:
    assert create(journal) == ("adp_1", True)
    assert create(journal, id="adp_2") == ("adp_1", False)
    for index, change in enumerate(
        [
            {"owner": "you"},
            {"text": "x"},
            {"model": "m"},
            {"method": {"type": "refine"}},
            {"seed": 1},
        ]
    ):
        assert create(journal, id=f"adp_x{index}", **change)[1]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_what_came_to_nothing_is_tried_anew(journal: Journal, status: str) -> None:
    create(journal)
    assert journal.finish("adp_1", status)
    assert create(journal, id="adp_2") == ("adp_2", True)


@pytest.mark.parametrize("status", ["succeeded", "rejected"])
def test_what_is_ready_is_found(journal: Journal, status: str) -> None:
    create(journal)
    journal.finish("adp_1", status)
    assert create(journal, id="adp_2") == ("adp_1", False)
    journal.mark_deleting("adp_1")
    assert create(journal, id="adp_3") == ("adp_3", True)


def test_a_job_that_is_being_cancelled_is_not_given_to_others(journal: Journal) -> None:
    create(journal)
    journal.request_cancel("adp_1")
    assert create(journal, id="adp_2") == ("adp_2", True)


def test_asking_by_name_keeps_a_job_that_was_made_for_an_answer(journal: Journal) -> None:
    create(journal, pinned=False)
    create(journal, id="adp_2", pinned=False)
    row = journal.get("adp_1")
    assert row is not None
    assert not row.pinned
    create(journal, id="adp_3", pinned=True)
    row = journal.get("adp_1")
    assert row is not None
    assert row.pinned


def test_asking_by_name_sets_the_time_it_is_kept(journal: Journal) -> None:
    create(journal, pinned=False, expires_after_s=5.0)
    journal.finish("adp_1", "succeeded")
    assert journal.due(time.time() + 6) == [("adp_1", "adaptation_expired")]
    create(journal, id="adp_2", pinned=True)
    assert journal.due(time.time() + 6) == []


def test_old_failures_are_forgotten(journal: Journal) -> None:
    for seed, status in enumerate(["failed", "cancelled", "succeeded"]):
        create(journal, id=f"adp_{seed}", seed=seed)
        journal.finish(f"adp_{seed}", status)
    create(journal, id="adp_9", seed=9)
    journal.forget(time.time() - 60)
    assert len(journal.page("me", after=None, limit=9)) == 4
    journal.forget(time.time() + 60)
    rows = journal.page("me", after=None, limit=9)
    assert [row.id for row in rows] == ["adp_9", "adp_2"]


def test_the_queue_is_bounded_but_an_existing_job_is_found(journal: Journal) -> None:
    journal.create(new(), max_active=1)
    with pytest.raises(JournalFullError):
        journal.create(new(id="adp_2", seed=1), max_active=1)
    assert journal.get("adp_2") is None
    assert journal.create(new(id="adp_3"), max_active=1)[0].id == "adp_1"
    journal.finish("adp_1", "succeeded")
    assert journal.create(new(id="adp_2", seed=1), max_active=1)[1]


def test_events_are_numbered_without_gaps(journal: Journal) -> None:
    create(journal)
    create(journal, id="adp_2", seed=1)
    journal.start("adp_1", attempt=1)
    journal.add_event("adp_1", "step", {"step": 1})
    journal.requeue("adp_1", reason="worker_died", attempt=2)
    journal.start("adp_1", attempt=2)
    journal.finish("adp_1", "succeeded", result={"accepted": True})
    journal.add_event("adp_9", "step", {})
    kinds = ["queued", "running", "step", "requeued", "running", "succeeded"]
    events = journal.events("adp_1", after=0, limit=10)
    assert [event.kind for event in events] == kinds
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert [e.kind for e in journal.events("adp_1", after=4, limit=1)] == ["running"]
    assert [e.kind for e in journal.events("adp_2", after=0, limit=9)] == ["queued"]


def test_the_last_step_is_known(journal: Journal) -> None:
    create(journal)
    create(journal, id="adp_2", seed=1)
    assert journal.last_step("adp_1") == journal.last_step("adp_9") == 0
    for number in (1, 2, 10):
        journal.add_event("adp_1", "step", {"step": number})
    journal.add_event("adp_1", "resumed", {"step": 12})
    journal.add_event("adp_2", "step", {"step": 3})
    assert (journal.last_step("adp_1"), journal.last_step("adp_2")) == (10, 3)


def test_an_outcome_is_final(journal: Journal) -> None:
    create(journal)
    assert journal.finish("adp_1", "succeeded", nbytes=5)
    assert not journal.finish("adp_1", "cancelled")
    row = journal.get("adp_1")
    assert row is not None
    assert (row.status, row.nbytes) == ("succeeded", 5)
    assert row.finished_at is not None
    journal.requeue("adp_1", reason="server_stopped")  # it ended while the server was stopping
    kinds = [event.kind for event in journal.events("adp_1", after=0, limit=9)]
    assert kinds == ["queued", "succeeded"]


def test_pages_go_back_in_time(journal: Journal) -> None:
    for seed in range(5):
        create(journal, id=f"adp_{seed}", seed=seed)
    journal.mark_deleting("adp_2")
    page = journal.page("me", after=None, limit=2)
    assert [row.id for row in page] == ["adp_4", "adp_3"]
    assert [row.id for row in journal.page("me", after="adp_3", limit=9)] == ["adp_1", "adp_0"]
    assert journal.page("you", after=None, limit=9) == []


def test_expiry(journal: Journal) -> None:
    create(journal, expires_after_s=10.0)
    journal.finish("adp_1", "succeeded")
    assert journal.due(time.time()) == []
    assert journal.due(time.time() + 11) == [("adp_1", "adaptation_expired")]
    assert journal.expire("adp_1", reason="adaptation_expired")
    assert not journal.expire("adp_1", reason="adaptation_expired")
    assert journal.due(time.time() + 11) == []
    row = journal.get("adp_1")
    assert row is not None
    assert row.status == "expired"


def bytes_on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_deleting_leaves_no_text_on_disk(journal: Journal, path: Path) -> None:
    create(journal)
    create(journal, id="adp_2", seed=1)
    assert b"secret canary" in bytes_on_disk(path)
    journal.delete("adp_1")
    assert b"secret canary" in bytes_on_disk(path)  # adp_2 is about the same document
    journal.delete("adp_2")
    assert b"secret canary" not in bytes_on_disk(path)
    assert journal.get("adp_1") is None
    assert journal.events("adp_1", after=0, limit=9) == []


def test_text_goes_when_nothing_can_need_it(journal: Journal) -> None:
    create(journal)
    journal.finish("adp_1", "failed", error={"code": "x", "message": "y", "param": None})
    assert journal.parts("adp_1") == []


def test_unfinished_work_is_found_after_a_kill(path: Path) -> None:
    code = f"""
import os, signal, dataclasses
from pathlib import Path
from imprint.server.journal import Journal
from imprint.server.records import NewAdaptation
journal = Journal(Path({str(path)!r}))
new = NewAdaptation(id="adp_0", owner="me", text="a", model="m", method={{}}, seed=0,
                    num_tokens=1, pinned=True, metadata={{}})
for seed in range(6):
    journal.create(dataclasses.replace(new, id=f"adp_{{seed}}", seed=seed), max_active=99)
journal.start("adp_1", attempt=1)
journal.finish("adp_2", "succeeded")
journal.request_cancel("adp_3")
journal.finish("adp_4", "succeeded")
journal.mark_deleting("adp_4")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert killed.returncode == -9
    journal = Journal(path)
    rows = {row.id: row for row in journal.unfinished()}
    assert sorted(rows) == ["adp_0", "adp_1", "adp_3", "adp_4", "adp_5"]
    assert rows["adp_1"].status == "running"
    assert rows["adp_3"].cancel_requested
    assert rows["adp_4"].deleting
    journal.close()


def test_one_server_per_journal(journal: Journal, path: Path) -> None:
    with pytest.raises(JournalError, match="another server"):
        Journal(path)


def test_a_journal_in_use_is_backed_up_as_the_guide_says(journal: Journal, path: Path) -> None:
    create(journal)
    guide = Path(__file__).parents[2] / "docs" / "how-to" / "backup.md"
    (code,) = re.findall(r"<<'END'\n(.*?)\nEND", guide.read_text("utf-8"), re.DOTALL)
    (path.parent / "adapters" / "progress").mkdir(parents=True)
    (path.parent / "adapters" / "adp_1.safetensors").write_bytes(b"learned")
    backup = path.parent.with_name("backup")
    command = [sys.executable, "-c", code, str(path.parent), str(backup)]
    subprocess.run(command, check=True, timeout=60)
    create(journal, id="adp_2", text="written since")  # nothing is held up by it
    assert (backup / "adapters" / "adp_1.safetensors").read_bytes() == b"learned"
    restored = Journal(backup / path.name)
    assert [row.id for row in restored.unfinished()] == ["adp_1"]
    assert restored.parts("adp_1") == ["the secret canary ü"]
    restored.close()


def test_another_format_is_refused(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(JournalError, match="format 99"):
        Journal(path)


def test_garbage_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database, " * 100)
    with pytest.raises(JournalError, match="cannot be used"):
        Journal(path)


def test_the_folder_is_private(journal: Journal, path: Path) -> None:
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_full_disk_loses_nothing_and_passes(journal: Journal) -> None:
    create(journal)
    pages = journal.db.execute("PRAGMA page_count").fetchone()[0]
    journal.db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        create(journal, id="adp_2", text="x" * 100_000)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        create(journal, id="adp_2", text="y" * 100_000)  # the first failure left nothing open
    assert journal.get("adp_2") is None
    assert journal.num_active() == 1
    journal.db.execute("PRAGMA max_page_count=1000000")
    assert create(journal, id="adp_2", text="x" * 100_000) == ("adp_2", True)


def test_nothing_is_written_to_a_file_that_has_gone_away(journal: Journal, path: Path) -> None:
    create(journal)
    away = path.parent.with_name("away")
    path.parent.rename(away)
    with pytest.raises(FileNotFoundError):
        create(journal, id="adp_2", text="another")
    path.parent.mkdir()
    path.touch()
    with pytest.raises(OSError, match="is not the file any more that was opened"):
        journal.request_cancel("adp_1")
    path.unlink()
    path.parent.rmdir()
    away.rename(path.parent)
    assert create(journal, id="adp_2", text="another") == ("adp_2", True)
    row = journal.get("adp_1")
    assert row is not None
    assert not row.cancel_requested


def test_a_process_that_dies_before_a_commit_has_promised_nothing(path: Path) -> None:
    script = f"""
import dataclasses
from pathlib import Path
from imprint.server.journal import Journal
from imprint.server.records import NewAdaptation
journal = Journal(Path({str(path)!r}))
new = {NEW!r}
journal.create(new, max_active=10)
print(journal.num_active(), flush=True)
journal.create(dataclasses.replace(new, id="adp_2", seed=1), max_active=10)
"""
    plan = "api/journal_write@3=kill"  # the first one makes the tables
    died = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, faults.VARIABLE: plan},
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, "1\n"), died.stderr
    journal = Journal(path)
    assert [row.id for row in journal.unfinished()] == ["adp_1"]
    journal.close()


def test_an_adapter_is_idle_from_its_last_use(journal: Journal) -> None:
    create(journal, idle_expires_after_s=10.0, expires_after_s=100.0)
    journal.finish("adp_1", "succeeded")
    now = time.time()
    assert journal.due(now + 9) == []
    assert journal.due(now + 11) == [("adp_1", "adapter_idle")]
    journal.touch({"adp_1": now + 9, "adp_unknown": now})
    assert journal.due(now + 18) == []
    assert journal.due(now + 20) == [("adp_1", "adapter_idle")]
    assert journal.due(now + 101) == [("adp_1", "adaptation_expired")]


def test_active_documents_are_bounded_by_their_bytes(journal: Journal) -> None:
    def add(id: str, num_bytes: int) -> None:
        text = id[-1] * num_bytes
        journal.create(new(id=id, text=text), max_active=10, max_active_bytes=100)

    add("adp_1", 500)  # alone, it may be as long as a body
    with pytest.raises(JournalFullError, match="documents of 500 bytes"):
        add("adp_2", 1)
    journal.finish("adp_1", "succeeded")
    add("adp_3", 60)
    add("adp_4", 40)
    with pytest.raises(JournalFullError):
        add("adp_5", 1)
    assert journal.active() == (2, 100)
