"""From a file's bytes to its text, and where its pages or sections lie in that text.

Runs as a process of its own, `python -m imprint.server.extractors KIND MAX_CHARS`, under limits
that it sets itself before it parses anything: a file that is built to blow up ends this process
and nothing else. Bytes come in on stdin, one JSON object leaves on stdout. Imports no torch.
"""

import io
import json
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_MEMORY_BYTES: Final = 2**30
MAX_UNPACKED_BYTES: Final = 2**27
"""Of all files in a docx together."""
_HEADING: Final = re.compile(r"^(#{1,6})[ \t]+\S", re.MULTILINE)
_FENCE: Final = re.compile(r"^(```|~~~).*?(^\1|\Z)", re.MULTILINE | re.DOTALL)
_HTML_BLOCKS: Final = frozenset(
    (
        *("address", "article", "aside", "blockquote", "body", "caption", "dd", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"),
        *("header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table", "tr", "ul"),
    )
)
_HTML_UNSEEN: Final = frozenset(("script", "style", "noscript", "template", "head", "svg", "title"))


class ExtractionError(Exception):
    """A file that gives no text; the message is meant for the one who sent it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        """document_encrypted, document_damaged, document_empty, document_too_large."""


@dataclass(slots=True)
class Extracted:
    """Text as it grows."""

    max_chars: int
    pieces: list[str] = field(default_factory=list)
    num_chars: int = 0
    references: list[dict[str, Any]] = field(default_factory=list)
    title: str | None = None

    def add(self, text: str) -> None:
        """Append; raises ExtractionError when the text is too long."""
        self.num_chars += len(text)
        if self.num_chars > self.max_chars:
            raise ExtractionError(
                "document_too_large", f"the file holds more than {self.max_chars} characters"
            )
        self.pieces.append(text)

    def refer(self, kind: str, **more: Any) -> None:
        """A page or section begins here."""
        number = 1 + len(self.references)
        start = self.num_chars
        self.references.append({"kind": kind, "number": number, "start": start, **more})

    def result(self) -> dict[str, Any]:
        """Text and references, each with its end."""
        ends = [reference["start"] for reference in self.references[1:]] + [self.num_chars]
        for reference, end in zip(self.references, ends, strict=False):
            reference["end"] = end
        return {
            "text": "".join(self.pieces),
            "references": self.references,
            "title": self.title,
        }


def extract_pdf(data: bytes, out: Extracted) -> None:
    """Page by page, with a reference for each page."""
    from pypdf import PdfReader
    from pypdf.errors import LimitReachedError

    if b"%PDF-" not in data[:1024]:
        raise ExtractionError("document_damaged", "the file is no PDF: it does not begin like one")
    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ExtractionError("document_encrypted", "the PDF needs a password; remove it first")
    if reader.metadata is not None and reader.metadata.title:
        out.title = str(reader.metadata.title)
    try:
        for page in reader.pages:
            out.refer("page")
            out.add(_clean(page.extract_text()).strip() + "\n\n")
    except LimitReachedError as error:
        raise ExtractionError(
            "document_too_large", f"the PDF unpacks to too much: {error}"
        ) from None


def extract_docx(data: bytes, out: Extracted) -> None:
    """Paragraphs and tables in their order, with a reference for each heading."""
    import docx
    from docx.table import Table

    if data.startswith(b"\xd0\xcf\x11\xe0"):  # how Office wraps what has a password
        raise ExtractionError(
            "document_encrypted", "the file needs a password, or is an old .doc; save it as .docx"
        )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_UNPACKED_BYTES:
            raise ExtractionError("document_too_large", "the file unpacks to too many bytes")
    document = docx.Document(io.BytesIO(data))
    out.title = document.core_properties.title or None
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            for row in block.rows:
                out.add(_clean("\t".join(cell.text for cell in row.cells)) + "\n")
            continue
        style = block.style.name if block.style is not None else None
        if style is not None and style.startswith("Heading ") and block.text.strip():
            out.refer("section", level=_level(style.removeprefix("Heading ")))
        out.add(_clean(block.text) + "\n")


def extract_html(data: bytes, out: Extracted) -> None:
    """What a browser would show as text, with a reference for each heading."""
    from bs4 import BeautifulSoup
    from bs4.element import NavigableString, PreformattedString, Tag

    soup = BeautifulSoup(data, "html.parser")
    if soup.title is not None:
        out.title = " ".join(soup.title.get_text().split()) or None
    text = _HtmlText(out)
    # an explicit stack: the nesting of a document is its author's to choose
    stack: list[Iterator[Any]] = [iter(soup.contents)]
    open_tags: list[Tag] = []
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            if open_tags:
                text.close(open_tags.pop().name)
        elif isinstance(node, Tag):
            if node.name not in _HTML_UNSEEN:
                text.open(node.name)
                open_tags.append(node)
                stack.append(iter(node.contents))
        elif isinstance(node, NavigableString) and not isinstance(node, PreformattedString):
            text.add(_clean(str(node)))


class _HtmlText:
    """Puts lines where blocks are, and makes of other whitespace one space."""

    def __init__(self, out: Extracted) -> None:
        self._out = out
        self._num_pre = 0
        self._at_line_start = True
        self._space = False

    def open(self, name: str) -> None:
        if name in _HTML_BLOCKS or name == "br":
            self._line(force=name == "br")
        if name in ("td", "th") and not self._at_line_start:
            self._put("\t")
        if name == "li":
            self._put("- ")
        self._num_pre += name == "pre"
        if len(name) == 2 and name[0] == "h" and name[1].isdigit():
            self._out.refer("section", level=int(name[1]))

    def close(self, name: str) -> None:
        self._num_pre -= name == "pre"
        if name in _HTML_BLOCKS:
            self._line()

    def add(self, text: str) -> None:
        if self._num_pre:
            self._put(text)
            self._at_line_start = text.endswith("\n")
            return
        words = text.split()
        if not words:
            self._space = self._space or bool(text)
            return
        begins_apart = self._space or text[0].isspace()
        gap = " " if begins_apart and not self._at_line_start else ""
        self._put(gap + " ".join(words))
        self._space = text[-1].isspace()

    def _put(self, text: str) -> None:
        self._out.add(text)
        self._at_line_start, self._space = False, False

    def _line(self, *, force: bool = False) -> None:
        if force or not self._at_line_start:
            self._out.add("\n")
        self._at_line_start, self._space = True, False


def extract_markdown(data: bytes, out: Extracted) -> None:
    """The text as it is, with a reference for each heading outside of code."""
    text = decode_text(data)
    code = [match.span() for match in _FENCE.finditer(text)]
    place = 0
    for match in _HEADING.finditer(text):
        if any(start <= match.start() < end for start, end in code):
            continue
        out.add(text[place : match.start()])
        place = match.start()
        out.refer("section", level=len(match[1]))
    out.add(text[place:])


def extract_plain(data: bytes, out: Extracted) -> None:
    """The text as it is."""
    out.add(decode_text(data))


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark; raises ExtractionError for anything else."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ExtractionError(
            "document_not_text", f"the file is not text in UTF-8 (byte {error.start}); convert it"
        ) from None
    if "\0" in text:
        raise ExtractionError("document_not_text", "the file is not text: it holds zero bytes")
    return text


EXTRACTORS: Final[Mapping[str, Callable[[bytes, Extracted], None]]] = {
    "text/plain": extract_plain,
    "text/markdown": extract_markdown,
    "text/html": extract_html,
    "application/pdf": extract_pdf,
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": extract_docx,
}


def extract(kind: str, data: bytes, max_chars: int) -> dict[str, Any]:
    """`{"text", "references", "title"}` of a file; raises ExtractionError."""
    out = Extracted(max_chars)
    EXTRACTORS[kind](data, out)
    result = out.result()
    if not result["text"].strip():
        raise ExtractionError(
            "document_empty", "the file holds no text; scanned pages need text recognition first"
        )
    return result


def _clean(text: str) -> str:
    """Without zero bytes, and with U+FFFD where surrogates stand alone."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "")


def _level(number: str) -> int:
    return int(number) if number.isdigit() else 1


def _limit(cpu_s: int) -> None:
    for name, most in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (most, most))


def main(arguments: list[str]) -> int:
    """Entry of the process."""
    kind, max_chars, cpu_s = arguments
    _limit(int(cpu_s))
    data = sys.stdin.buffer.read()
    try:
        reply = extract(kind, data, int(max_chars))
    except ExtractionError as error:
        reply = {"code": error.code, "message": str(error)}
    except MemoryError:
        reply = {"code": "document_too_large", "message": "the file takes too much memory to read"}
    except Exception as error:  # the process' outermost loop: what parsers raise is not listed
        message = f"the file cannot be read, it may be damaged ({type(error).__name__})"
        reply = {"code": "document_damaged", "message": message}
    sys.stdout.write(json.dumps(reply))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
