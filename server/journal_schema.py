"""The journal's tables, as the steps that made them. Opens no file.

`MIGRATIONS[n]` brings a file of format n to format n + 1; a new file takes all of them. A step that
was released is never changed: what is new is a new step.
"""

from typing import Final

_FORMAT_1: Final = """
CREATE TABLE documents (
    sha256 TEXT PRIMARY KEY,
    text BLOB NOT NULL
) STRICT;
CREATE TABLE adaptations (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    model TEXT NOT NULL,
    method TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,
    pinned INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    deleting INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    restarts INTEGER NOT NULL DEFAULT 0,
    num_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    nbytes INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL,
    timeout_s REAL,
    expires_after_s REAL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    expires_at REAL,
    metadata TEXT NOT NULL,
    progress TEXT NOT NULL DEFAULT '{}',
    error TEXT,
    result TEXT,
    usage TEXT NOT NULL DEFAULT '{}'
) STRICT;
CREATE UNIQUE INDEX one_of_a_kind ON adaptations(owner, sha256, model, method, seed)
    WHERE status IN ('queued', 'running', 'succeeded', 'rejected')
        AND deleting = 0 AND cancel_requested = 0;
CREATE INDEX by_status ON adaptations(status);
CREATE INDEX by_document ON adaptations(sha256);
CREATE TABLE events (
    adaptation INTEGER NOT NULL REFERENCES adaptations(number) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    created_at REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (adaptation, sequence)
) STRICT, WITHOUT ROWID;
"""

# Texts get a table of their own: a document that is appended to shares its beginning with its older
# versions. A text's sha256 is that of its bytes; where there is a parent, it is made of both.
_FORMAT_2: Final = """
ALTER TABLE documents RENAME TO texts;
ALTER TABLE texts ADD COLUMN parent TEXT;
CREATE INDEX by_parent ON texts(parent) WHERE parent IS NOT NULL;
CREATE TABLE documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    title TEXT,
    media_type TEXT NOT NULL,
    source_references TEXT NOT NULL DEFAULT '[]',
    metadata TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    deleting INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE document_versions (
    document INTEGER NOT NULL REFERENCES documents(number) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (document, version)
) STRICT, WITHOUT ROWID;
CREATE INDEX by_text ON document_versions(sha256);
"""

# What is shown of studies. Entropies: float16 a token; ends: uint32 a token, once asked for.
_FORMAT_3: Final = """
CREATE TABLE studies (
    adaptation INTEGER PRIMARY KEY REFERENCES adaptations(number) ON DELETE CASCADE,
    entropies BLOB NOT NULL,
    ends BLOB
) STRICT;
CREATE TABLE study_steps (
    adaptation INTEGER NOT NULL REFERENCES studies(adaptation) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (adaptation, step)
) STRICT, WITHOUT ROWID;
"""

# When an adapter was asked last, and after how long without a question it is freed.
_FORMAT_4: Final = """
ALTER TABLE adaptations ADD COLUMN used_at REAL;
ALTER TABLE adaptations ADD COLUMN idle_expires_after_s REAL;
"""

# Replies kept for requests that are sent again with their Idempotency-Key.
_FORMAT_5: Final = """
CREATE TABLE replies (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    request_sha256 TEXT NOT NULL,
    status INTEGER NOT NULL,
    location TEXT,
    body BLOB NOT NULL,
    created_at REAL NOT NULL,
    UNIQUE (owner, key)
) STRICT;
"""

MIGRATIONS: Final = (_FORMAT_1, _FORMAT_2, _FORMAT_3, _FORMAT_4, _FORMAT_5)
