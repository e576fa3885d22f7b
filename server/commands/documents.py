"""`imprint documents`: store files on a running server, list, show and delete them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from imprint.server.client import Document, ImprintClient, Page
from imprint.server.commands.common import UsageError, printable, write_json
from imprint.server.commands.connection import Described, add_action, add_paging, add_server, ask

_EXAMPLES = """\
examples:
  imprint documents add report.pdf --title "Annual report"
  imprint documents list --json
  imprint documents show doc_5f0c1d2e3b4a59687716a5b4 --text
  imprint documents delete doc_5f0c1d2e3b4a59687716a5b4
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command and what it does with documents."""
    described = Described("documents", "stored documents of a running server", _EXAMPLES)
    actions = described.add_to(commands)
    add = add_action(actions, "add", "store a file: txt, md, html, pdf or docx", run_add)
    add.add_argument("file", metavar="FILE")
    add.add_argument("--title")
    add_server(add)
    listed = add_action(actions, "list", "list documents, newest first", run_list)
    add_paging(listed)
    add_server(listed)
    show = add_action(actions, "show", "show a document", run_show)
    show.add_argument("id", metavar="ID")
    show.add_argument("--text", action="store_true", help="print its text")
    add_server(show)
    delete = add_action(actions, "delete", "delete a document and its adaptations", run_delete)
    delete.add_argument("id", metavar="ID")
    add_server(delete)


def run_add(arguments: argparse.Namespace) -> int:
    """Store the file and print its id."""
    try:
        data = Path(arguments.file).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot read {arguments.file}: {reason}") from None
    name = Path(arguments.file).name

    def call(client: ImprintClient) -> Document:
        return client.upload_document(name, data, title=arguments.title)

    _write(ask(arguments, call), arguments.json)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Print a page."""

    def call(client: ImprintClient) -> Page[Document]:
        return client.documents_page(limit=arguments.limit, after=arguments.after)

    page = ask(arguments, call)
    if arguments.json:
        write_json({"data": [item.body for item in page.items], "has_more": page.has_more})
        return 0
    for document in page.items:
        _write(document, False)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Print a document, or its text."""
    if arguments.text:
        text = ask(arguments, lambda client: client.document_text(arguments.id))
        if arguments.json:
            write_json({"id": arguments.id, "text": text})
        else:
            sys.stdout.write(printable(text) + "\n")
    else:
        _write(ask(arguments, lambda client: client.document(arguments.id)), arguments.json)
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    """Delete it."""
    ask(arguments, lambda client: client.delete_document(arguments.id))
    if arguments.json:
        write_json({"id": arguments.id, "deleted": True})
    return 0


def _write(document: Document, as_json: bool) -> None:
    if as_json:
        write_json(document.body)
        return
    title = document.body.get("title") or ""
    sys.stdout.write(printable(f"{document.id}  {document.num_tokens} tokens  {title}".rstrip()))
    sys.stdout.write("\n")
