"""A caption from the web, brought to the plain form on which DeepFloyd IF was trained.

The training set's captions went through the rules below, twice. A prompt that goes through them too looks like what the
model has read; a prompt that does not may spend its 77 tokens on markup. The order of the rules matters.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import unquote_plus

logger = logging.getLogger(__name__)

HOST = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
ORNAMENTS = r"#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*"
WORD_JOINERS = re.compile("[-_]")


@dataclass(frozen=True)
class Swap:
    """Every match of `pattern` becomes `replacement`."""

    name: str
    pattern: re.Pattern[str]
    replacement: str

    def __call__(self, text: str) -> str:
        return self.pattern.sub(self.replacement, text)


@dataclass(frozen=True)
class Rewrite:
    """What a pattern cannot say."""

    name: str
    rewrite: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return self.rewrite(text)


def _swap(name: str, pattern: str, replacement: str = "") -> Swap:
    return Swap(name, re.compile(pattern), replacement)


def _without_markup(text: str) -> str:
    """The text between the tags, with character references resolved.

    The empty element in front tells the parser that this is meant to be HTML; without it, a prompt such as
    "/cat.htm" or "<?xml …" draws a warning about the wrong kind of input.
    """
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup

    try:
        return BeautifulSoup("<b></b>" + text, features="html.parser").text
    except ParserRejectedMarkup:  # "<![like this": nothing that a browser would show differently
        return text


def _words_apart(text: str) -> str:
    """this-is-my_cute-cat: more than three joiners are a file's name or a slug, and become spaces."""
    return WORD_JOINERS.sub(" ", text) if len(WORD_JOINERS.findall(text)) > 3 else text


def _mended(text: str) -> str:
    """Undo wrong decodings (mojibake) and compatibility forms, such as full-width letters."""
    import ftfy

    return ftfy.fix_text(text)


RULES: tuple[Swap | Rewrite, ...] = (
    Rewrite("undo URL quoting", unquote_plus),
    Rewrite("lower case", lambda text: text.strip().lower()),
    _swap("person placeholder", "<person>", "person"),
    _swap("address with https", rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{HOST})"),
    _swap("address with www", rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{HOST})"),
    Rewrite("HTML", _without_markup),
    _swap("@nickname", r"@\w+\b"),
    _swap("CJK strokes to unified ideographs", "[\u31c0-\u9fff]+"),
    _swap("every dash", f"[{DASHES}]+", "-"),
    _swap("double quotes", "[`´«»“”¨]", '"'),
    _swap("single quotes", "[‘’]", "'"),
    _swap("escaped quote", "&quot;?"),
    _swap("escaped ampersand", "&amp"),
    _swap("IP address", r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    _swap("article number at the end", r"\d:\d\d\s+$"),
    _swap("escaped line break", r"\\n", " "),
    _swap("#123 and #12345", r"#(?:\d{1,3}|\d{5,})\b"),
    _swap("123456", r"\b\d{6,}\b"),
    # Anchored at the start of its word: a long word without an ending is read once, not once per letter.
    _swap("file name", rf"(?<!\S)\S+\.(?:{FILE_ENDINGS})"),
    _swap("run of quotes", "[\"']{2,}", '"'),
    _swap("run of dots", r"\.{2,}", " "),
    _swap("ornaments", f"[{ORNAMENTS}]+", " "),
    _swap("lonely dot", r"\s+\.\s+", " "),
    Rewrite("joined words", _words_apart),
    Rewrite("broken characters", _mended),
    Rewrite("character references", lambda text: html.unescape(html.unescape(text))),
    _swap("jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    _swap("jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    _swap("6640vc231", r"\b\d+[a-zA-Z]+\d+\b"),
    _swap("shipping", r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _swap("download", r"(?:free\s)?download(?:\sfree)?"),
    _swap("click for", r"\bclick\b\s(?:for|on)\s\w+"),
    _swap("kind of file", rf"\b(?:{FILE_ENDINGS})(?:\simages?)?"),
    _swap("page number", r"\bpage\s+\d+\b"),
    _swap("j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    _swap("640x480", r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b"),  # Latin x, Cyrillic х, multiplication sign
    _swap("space before a colon", r"\b\s+:\s+", ": "),
    _swap("no space after a comma", r"(?<=\D)([,./])\b", r"\1 "),
    _swap("runs of space", r"\s+", " "),
    _swap("enclosing quotes", "^[\"'](.+)[\"']$", r"\1"),
    _swap("leading punctuation", "^['_,:;-]"),
    _swap("trailing punctuation", "['_,:+-]$"),
    _swap("lonely .word", r"^\.\S+$"),
    Rewrite("outer space", str.strip),
)


def clean_caption(text: str) -> str:
    """`text` after one pass of RULES. Training applied them twice: see `preprocess`."""
    for rule in RULES:
        text = rule(text)
    return text


def preprocess(text: str | Sequence[str], *, clean_caption: bool) -> list[str]:
    """The texts as the tokenizer should see them: cleaned twice, or in lower case without outer space."""
    texts = [text] if isinstance(text, str) else list(text)
    if clean_caption and _cleaning_is_possible():
        return [_cleaned_twice(each) for each in texts]
    return [each.lower().strip() for each in texts]


def _cleaned_twice(text: str) -> str:
    return clean_caption(clean_caption(text))


def _cleaning_is_possible() -> bool:
    packages = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        logger.warning(
            "clean_caption=True needs %s; captions are only lower-cased and stripped. Install with: pip install %s",
            " and ".join(missing),
            " ".join(missing),
        )
    return not missing
