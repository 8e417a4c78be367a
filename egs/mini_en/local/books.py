"""Public-domain English prose out of public repositories, as sentences.

A reader gives the text of one book: paragraphs of plain text with blank lines between them.
"""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

from common import Repository
from words import expand_titles, plain

LATEST = 1930  # year of publication; later books may be protected in some country
COMMON = frozenset(["the", "of", "and", "to", "a", "in", "that", "he", "was", "it", "his", "i", "with", "as"])
# The numbers of chapters and kings; I, a word, is none of them.
ROMAN = re.compile(r"\b(?=[IVXLC]{2,}\b)[IVXLC]+\b")
SHOUT = re.compile(r"\b[A-Z]{2,}\b[\s,.'-]+\b[A-Z]{2,}\b")
END = re.compile(r"""[.!?]+["')]*(?=\s+["'(]*[A-Z0-9])""")
ABBREVIATION = re.compile(
    r"(?:\b[A-Z]|\b(?:Esq|Hon|Jun|Jr|Sr|Mme|Mlle|No|Vol|vol|viz|cf|etc|i\.e|e\.g|A\.M|P\.M))$"
)


@dataclass(frozen=True)
class Books:
    """A repository of books: which files, how they are read, and what may be done with them."""

    repository: str
    folder: str
    read: Callable[[str, str], str | None]  # (path, content) -> text, None to leave the book out
    licence: str


def markdown(path: str, content: str) -> str | None:
    """A book of classic-books-markdown: a header with the year of publication, `-----`, the text."""
    head, rule, body = content.partition("\n-------")
    year = re.search(r"^## Year: *(\d{4})", head, re.M)
    if not path.endswith(".md") or not rule or (year and int(year[1]) > LATEST):
        return None
    lines = [line for line in body.splitlines() if not line.startswith(("#", "|", "!", "---"))]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(line.lstrip("> ") for line in lines))
    return text.replace("*", "").replace("_", "").replace("\\", "")


def dated_text(path: str, content: str) -> str | None:
    """A plain text whose file name ends with its year; wrapped lines, some books without blank lines."""
    year = re.search(r"_(\d{4})\.txt$", path)
    return content if year and int(year[1]) <= LATEST else None


def any_text(path: str, content: str) -> str | None:
    """A plain text of a collection that holds old books only."""
    return content if path.endswith(".txt") else None


def markup(path: str, content: str) -> str | None:
    """The paragraphs of a TEI or HTML file, its notes left out."""
    if not path.endswith((".xml", ".html")):
        return None
    body = re.sub(r"<(note|teiHeader|head)\b.*?</\1>", " ", content, flags=re.S)
    paragraphs = re.findall(r"<p\b[^>]*>(.*?)</p>", body, flags=re.S)
    return html.unescape("\n\n".join(re.sub(r"<[^>]+>", " ", paragraph) for paragraph in paragraphs))


def speech(path: str, content: str) -> str | None:
    """An address to Congress; Kennedy's stay out, because his inaugural one is evaluated."""
    return content if path.endswith(".txt") and "kennedy" not in path else None


# Texts in the public domain, most readable copies first: a sentence is kept the first time it comes.
SOURCES = {
    "classic_books": Books("mlschmitt/classic-books-markdown", "", markdown, "public domain"),
    "eltec": Books("COST-ELTeC/ELTeC-eng", "level1", markup, "public domain; markup CC-BY-4.0"),
    "common_library": Books("ge1789/common-library", "texts", markup, "public domain"),
    "sample_novels": Books(
        "dhmit/gender_analysis",
        "gender_analysis/testing/test_data/sample_novels/texts",
        any_text,
        "public domain",
    ),
    "english_novels": Books(
        "computationalstylistics/100_english_novels", "corpus", dated_text, "public domain"
    ),
    "addresses": Books("stdlib-js/datasets-sotu", "data", speech, "public domain (United States government)"),
}


def book_paths(source: str, repo: Repository) -> list[str]:
    """The files of a source that may be books."""
    return [
        path for path in repo.names(SOURCES[source].folder) if path.endswith((".md", ".txt", ".xml", ".html"))
    ]


def read_book(source: str, path: str, repo: Repository) -> str | None:
    """The text of one book; None where it isn't English prose or too new."""
    text = SOURCES[source].read(path, repo.read(path).decode("utf-8", errors="replace"))
    words = text.lower().split() if text else []
    if len(words) > 500 and sum(word in COMMON for word in words) > 0.2 * len(words):
        return text
    return None


def sentences(text: str) -> list[str]:
    """The sentences of a book, plain ASCII with case and punctuation; headings and tables fall out."""
    out = []
    text = plain(re.sub(r"--+|\u2014", ", ", text.replace("\r", "")))
    text = expand_titles(re.sub(r"\[[^\]]*\]|\{[^}]*\}", " ", text))
    for block in re.split(r"\n\s*\n", text):
        block = " ".join(block.split())
        start = 0
        for match in [*END.finditer(block), None]:
            stop = match.end() if match else len(block)
            if match and ABBREVIATION.search(block[: match.start()][-8:]) and match[0][0] == ".":
                continue
            sentence = block[start:stop].strip()
            start = stop
            if re.search(r"[a-z]", sentence) and not SHOUT.search(sentence) and not ROMAN.search(sentence):
                out.append(re.sub(r"(?: ?, )+([,;:.!?])", r"\1", sentence) if ", " in sentence else sentence)
    return out
