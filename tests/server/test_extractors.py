"""Files to text: pages and sections where they are, and a clear refusal of everything else."""

import io
import zipfile
import zlib
from collections.abc import Callable

import docx
import pypdf
import pytest

from imprint.server.extractors import EXTRACTORS, ExtractionError, extract

PDF, HTML, MARKDOWN, PLAIN = (
    *("application/pdf", "text/html", "text/markdown"),
    "text/plain",
)
DOCX = next(kind for kind in EXTRACTORS if "wordprocessing" in kind)
MAX = 10_000


def pdf(*pages: str, stream: bytes | None = None) -> bytes:
    """A small PDF with a line of text on each page; `stream` is one page's packed content."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b""]
    objects.append(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>")
    kids = []
    for text in pages:
        content = zlib.compress(f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode())
        content = content if stream is None else stream
        head = f"<</Length {len(content)}/Filter/FlateDecode>>stream\n".encode()
        objects.append(head + content + b"\nendstream")
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
            + f"/Contents {len(objects)} 0 R>>".encode()
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(kids)}]>>".encode()
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    tail = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer<</Size {size}/Root 1 0 R>>\n"
    return out + f"{tail}startxref\n{len(out)}\n%%EOF".encode()


def encrypted_pdf() -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def word() -> bytes:
    document = docx.Document()
    document.core_properties.title = "A title"
    document.add_heading("One", 1)
    document.add_paragraph("First\ttext ü.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    document.add_heading("Two", 2)
    document.add_paragraph("Last.")
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(3):
            archive.writestr(f"word/{number}.xml", b"0" * (45 * 2**20))
    return out.getvalue()


def test_pages_of_a_pdf() -> None:
    found = extract(PDF, pdf("Harbor one", "Bell two"), MAX)
    assert [found["text"][r["start"] : r["end"]].strip() for r in found["references"]] == [
        "Harbor one",
        "Bell two",
    ]
    assert [(r["kind"], r["number"]) for r in found["references"]] == [("page", 1), ("page", 2)]


def test_sections_of_a_word_file() -> None:
    found = extract(DOCX, word(), MAX)
    assert found["text"] == "One\nFirst\ttext ü.\nleft\tright\nTwo\nLast.\n"
    assert [(r["level"], found["text"][r["start"] : r["end"]]) for r in found["references"]] == [
        (1, "One\nFirst\ttext ü.\nleft\tright\n"),
        (2, "Two\nLast.\n"),
    ]
    assert found["title"] == "A title"


def test_what_a_browser_shows() -> None:
    page = """<!doctype html><meta charset=utf-8><title> A
    page </title><style>p{}</style><h1>One</h1><p>some <b>bold</b>,
      <i>and</i>more<br>text</p><script>alert(1)</script><ul><li>a<li>b</ul><!-- no -->
      <table><tr><td>1<td>2</tr></table><pre>x
  y</pre><h2>Two</h2>&lt;ü&gt;"""
    found = extract(HTML, page.encode(), MAX)
    assert found["text"] == ("One\nsome bold, andmore\ntext\n- a\n- b\n1\t2\nx\n  y\nTwo\n<ü>")
    assert found["title"] == "A page"
    assert [found["text"][r["start"] :][:3] for r in found["references"]] == ["One", "Two"]


def test_markdown_stays_as_it_is() -> None:
    text = "intro\n# One\n```\n# no heading\n```\n## Two\n#hashtag\n"
    found = extract(MARKDOWN, text.encode(), MAX)
    assert found["text"] == text
    assert [(r["level"], text[r["start"] :].split("\n")[0]) for r in found["references"]] == [
        (1, "# One"),
        (2, "## Two"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_plain_text(encoding: str) -> None:
    assert extract(PLAIN, "ü\r\nx".encode(encoding), MAX)["text"] == "ü\r\nx"


@pytest.mark.parametrize(
    ("kind", "make", "code"),
    [
        (PLAIN, lambda: b"\xff\x00\xfe", "document_not_text"),
        (PLAIN, lambda: b"a\0b", "document_not_text"),
        (PLAIN, lambda: b" \n", "document_empty"),
        (PLAIN, lambda: b"x" * (MAX + 1), "document_too_large"),
        (PDF, lambda: b"hello", "document_damaged"),
        (PDF, encrypted_pdf, "document_encrypted"),
        (PDF, lambda: pdf(""), "document_empty"),
        (PDF, lambda: pdf("x" * 300, "y" * MAX), "document_too_large"),
        (DOCX, lambda: b"\xd0\xcf\x11\xe0" + b"\0" * 600, "document_encrypted"),
        (DOCX, zip_bomb, "document_too_large"),
        (HTML, lambda: b"<script>x</script>", "document_empty"),
    ],
)
def test_what_gives_no_text_is_named(kind: str, make: Callable[[], bytes], code: str) -> None:
    with pytest.raises(ExtractionError) as caught:
        extract(kind, make(), MAX)
    assert caught.value.code == code


def test_nesting_is_its_authors_to_choose() -> None:
    found = extract(HTML, b"<div><i>" * 5_000 + b"deep" + b"</i></div>" * 5_000, MAX)
    assert found["text"].strip() == "deep"
