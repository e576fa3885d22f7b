"""Stored documents in the journal: versions share beginnings, and nothing outlives its use."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from imprint.server import document_journal as documents
from imprint.server.document_records import DocumentRow, NewDocument, SourceText
from imprint.server.journal import DocumentGoneError, Journal
from imprint.server.journal_schema import MIGRATIONS
from imprint.server.records import NewAdaptation, StoredText


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def store(
    journal: Journal, id: str = "doc_1", text: str = "canary one", owner: str = "me"
) -> DocumentRow:
    new = NewDocument(id=id, owner=owner, source=SourceText(text=text), num_tokens=len(text))
    return documents.create_document(journal, new)


def adapt(journal: Journal, id: str, row: DocumentRow, owner: str = "me") -> None:
    text = StoredText(document_id=row.id, sha256=row.sha256, num_bytes=row.num_bytes)
    new = NewAdaptation(
        id=id,
        owner=owner,
        text=text,
        model="m",
        method={"type": "read"},
        seed=0,
        num_tokens=row.num_tokens,
        pinned=True,
        metadata={},
    )
    assert journal.create(new, max_active=9)[1]


def num_texts(journal: Journal) -> int:
    return int(journal.db.execute("SELECT count(*) FROM texts").fetchone()[0])


def test_a_document_comes_back_as_it_was(journal: Journal) -> None:
    row = store(journal, text="ü\n")
    assert documents.get_document(journal, "doc_1") == row
    assert (row.version, row.num_tokens, row.num_bytes) == (1, 2, 3)
    assert documents.document_content(journal, row) == (["ü\n"], [])
    assert documents.get_document(journal, "doc_2") is None


def test_a_version_is_its_parts_in_order(journal: Journal) -> None:
    first = store(journal)
    second = documents.append_text(journal, first, " two", 4)
    third = documents.append_text(journal, second, " three", 6)
    assert (third.version, third.num_tokens, third.num_bytes) == (3, 20, 20)
    assert documents.document_content(journal, third)[0] == ["canary one", " two", " three"]
    assert documents.document_content(journal, first)[0] == ["canary one"]
    assert len({first.sha256, second.sha256, third.sha256}) == 3
    whole = store(journal, "doc_2", "canary one two three")
    assert whole.sha256 != third.sha256, "the same characters, but other tokens"
    with pytest.raises(DocumentGoneError):
        documents.append_text(journal, first, "from an old version", 1)


def test_texts_go_with_their_last_user(journal: Journal, path: Path) -> None:
    first = store(journal)
    adapt(journal, "adp_1", first)
    second = documents.append_text(journal, first, " two", 4)
    adapt(journal, "adp_2", second)
    assert documents.adaptations_of(journal, second) == ["adp_1", "adp_2"]
    documents.delete_document(journal, second)
    assert num_texts(journal) == 2, "jobs still need them"
    journal.delete("adp_1")
    assert num_texts(journal) == 2, "the appended text stands on it"
    assert journal.parts("adp_2") == ["canary one", " two"]
    journal.delete("adp_2")
    assert num_texts(journal) == 0
    on_disk = b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
    assert b"canary" not in on_disk


def test_an_adaptation_that_two_documents_have_stays(journal: Journal) -> None:
    first, twin = store(journal), store(journal, "doc_2")
    foreign = store(journal, "doc_3", owner="you")
    adapt(journal, "adp_1", first)
    adapt(journal, "adp_2", foreign, owner="you")
    assert documents.adaptations_of(journal, first) == []
    documents.delete_document(journal, twin)
    assert documents.adaptations_of(journal, first) == ["adp_1"]
    row = journal.get("adp_1")
    assert row is not None
    assert row.document_id == "doc_1"


def test_no_job_for_a_document_that_goes(journal: Journal) -> None:
    row = store(journal)
    documents.mark_document_deleting(journal, row.id)
    with pytest.raises(DocumentGoneError):
        adapt(journal, "adp_1", row)
    assert documents.unfinished_deletions(journal) == ["doc_1"]


def test_a_journal_of_the_first_format_is_brought_up(path: Path) -> None:
    old = sqlite3.connect(path, isolation_level=None)
    for statement in MIGRATIONS[0].split(";\n"):
        old.execute(statement)
    old.execute("PRAGMA user_version=1")
    old.execute("INSERT INTO documents VALUES ('abc', CAST('old text' AS BLOB))")
    old.execute(
        "INSERT INTO adaptations (id, owner, sha256, model, method, seed, status, pinned,"
        " num_tokens, num_bytes, priority, created_at, metadata)"
        " VALUES ('adp_1', 'local', 'abc', 'm', '{}', 0, 'queued', 1, 2, 8, 0, 0, '{}')"
    )
    old.close()
    journal = Journal(path)
    assert [row.id for row in journal.unfinished()] == ["adp_1"]
    assert journal.parts("adp_1") == ["old text"]
    assert store(journal).version == 1
    journal.close()
