"""`imprint documents`: store files on a running server, list, show, extend and delete them."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from imprint.server.client import Document, ImprintClient
from imprint.server.commands.common import read_document
from imprint.server.commands.connection import add_server, ask
from imprint.server.commands.descriptions import Commands, add_command, add_group
from imprint.server.commands.listing import (
    add_paging,
    read_file,
    write_deleted,
    write_object,
    write_page,
)

_ID = "doc_5f0c1d2e3b4a59687716a5b4"


def add_parser(commands: Commands) -> None:
    """Describe the command and what it does with documents."""
    actions = add_group(
        commands,
        "documents",
        "stored documents of a running server",
        'imprint documents add report.pdf --title "Annual report"\nimprint documents list --json',
    )
    action = partial(add_command, actions)
    add = action(
        "add",
        "store a file: txt, md, html, pdf or docx",
        'imprint documents add report.pdf --title "Annual report"\n'
        "imprint documents add notes.md --json",
        run=run_add,
    )
    add.add_argument("file", metavar="FILE")
    add.add_argument("--title", help="a name for people")
    append = action(
        "append",
        "add a text to a document; only what is new is read",
        f"imprint documents append {_ID} more.txt\n"
        f"imprint documents append {_ID} more.txt --version 1 --preset fast",
        run=run_append,
    )
    append.add_argument("id", metavar="ID")
    append.add_argument("file", metavar="FILE", help="text file, UTF-8; - is standard input")
    append.add_argument(
        "--version", type=int, metavar="N", help="refuse if the document has another by now"
    )
    append.add_argument("--preset", help="study it, too: default, fast or paper")
    add_paging(
        action(
            "list",
            "list documents, newest first",
            f"imprint documents list\nimprint documents list --limit 100 --after {_ID} --json",
            run=run_list,
        )
    )
    show = action(
        "show",
        "show a document",
        f"imprint documents show {_ID}\nimprint documents show {_ID} --text",
        run=run_show,
    )
    show.add_argument("id", metavar="ID")
    show.add_argument("--text", action="store_true", help="print its text")
    delete = action(
        "delete",
        "delete a document and its adaptations",
        f"imprint documents delete {_ID}",
        run=run_delete,
    )
    delete.add_argument("id", metavar="ID")
    for parser in actions.choices.values():
        add_server(parser)


def run_add(arguments: argparse.Namespace) -> int:
    """Store the file and print its id."""
    data = read_file(arguments.file)
    name = Path(arguments.file).name

    def call(client: ImprintClient) -> Document:
        return client.upload_document(name, data, title=arguments.title)

    _write(ask(arguments, call), as_json=arguments.json)
    return 0


def run_append(arguments: argparse.Namespace) -> int:
    """Append the text and print the document, which has a next version."""
    text = read_document(arguments.file)
    method = None if arguments.preset is None else {"type": "refine", "preset": arguments.preset}

    def call(client: ImprintClient) -> Document:
        made = client.append_document(arguments.id, text, version=arguments.version, method=method)
        return made.document

    _write(ask(arguments, call), as_json=arguments.json)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Print a page."""
    limit, after = arguments.limit, arguments.after
    page = ask(arguments, lambda client: client.documents_page(limit=limit, after=after))
    write_page(page, lambda document: document.body, _line, as_json=arguments.json)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Print a document, or its text."""
    if not arguments.text:
        document = ask(arguments, lambda client: client.document(arguments.id))
        _write(document, as_json=arguments.json)
        return 0
    text = ask(arguments, lambda client: client.document_text(arguments.id))
    write_object({"id": arguments.id, "text": text}, text, as_json=arguments.json)
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    """Delete it."""
    ask(arguments, lambda client: client.delete_document(arguments.id))
    write_deleted(arguments.id, as_json=arguments.json)
    return 0


def _line(document: Document) -> str:
    title = document.body.get("title") or ""
    return f"{document.id}  {document.num_tokens} tokens  {title}"


def _write(document: Document, *, as_json: bool) -> None:
    write_object(document.body, _line(document), as_json=as_json)
