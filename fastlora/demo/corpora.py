"""Texts: for pre-training of the small model, and of four domains to fine-tune it on.

Everything comes with CPython: pydoc's topics, the standard library's sources, ``calendar``,
``unicodedata``, ``http``. The same seed and the same Python give the same text.
"""

from __future__ import annotations

import calendar
import http
import itertools
import json
import random
import re
import string
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

_LETTERS = string.ascii_lowercase + string.digits
_CODES = """
.- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..-
-.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----.
"""
_MORSE = dict(zip(_LETTERS, _CODES.split(), strict=True))


@dataclass(frozen=True)
class Text:
    """Text to learn from, and text of the same kind that training never sees."""

    train: str
    held_out: str


def make_pretraining_text(seed: int, chars: int) -> str:
    """Makes ``chars`` characters at most: prose about Python and Python, shuffled."""
    rng = random.Random(seed)
    sources = _list_sources()
    rng.shuffle(sources)
    texts = list(topics.values())
    while sources and sum(map(len, texts)) < chars:
        texts.append(sources.pop().read_text("utf-8", "ignore"))
    paragraphs = "\n\n".join(texts).split("\n\n")
    rng.shuffle(paragraphs)
    return "\n\n".join(paragraphs)[:chars]


def make_domain_text(name: str, seed: int, chars: int) -> Text:
    """Makes about ``chars`` characters of ``DOMAINS[name]``, an eighth of its entries held out."""
    entries: list[str] = []
    length = 0
    for entry in DOMAINS[name](random.Random(f"{name} {seed}")):
        entries.append(entry)
        length += len(entry)
        if length >= chars:
            break
    cut = len(entries) // 8
    return Text("".join(entries[cut:]), "".join(entries[:cut]))


def read_file_text(path: str | Path) -> Text:
    """Reads the user's text file, its last eighth held out.

    Raises FileNotFoundError when it is missing, ValueError when it is empty or not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data: expected a text file, found none at {path}")
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected UTF-8 text, {path} is not: {error.reason}") from None
    if not text.strip():
        raise ValueError(f"data: expected text, {path} is empty")
    cut = len(text) - len(text) // 8
    return Text(text[:cut], text[cut:])


def _write_calendar(rng: random.Random) -> Iterator[str]:
    """Writes months of 1800–2199, weeks from Monday or from Sunday; none comes twice."""
    styles = calendar.TextCalendar(calendar.MONDAY), calendar.TextCalendar(calendar.SUNDAY)
    pages = list(itertools.product(styles, range(1800, 2200), range(1, 13)))
    rng.shuffle(pages)
    for style, year, month in pages:
        yield style.formatmonth(year, month) + "\n"


def _write_unicode(rng: random.Random) -> Iterator[str]:
    """Writes characters and their names."""
    for code in rng.sample(range(0xA0, 0x3000), 0x3000 - 0xA0):
        name = unicodedata.name(chr(code), None)
        if name:
            yield f"U+{code:04X} {name}\n"


def _write_records(rng: random.Random) -> Iterator[str]:
    """Writes what a server of the standard library's sources might log, as JSON lines."""
    files = [path.name for path in _list_sources()]
    statuses = list(http.HTTPStatus)
    while True:
        status = rng.choice(statuses)
        record = {
            "time": f"{rng.randrange(24):02}:{rng.randrange(60):02}",
            "file": rng.choice(files),
            "status": status.value,
            "reason": status.phrase,
        }
        yield json.dumps(record) + "\n"


def _write_morse(rng: random.Random) -> Iterator[str]:
    """Writes paragraphs of pydoc's topics in Morse code, a slash between words."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    rng.shuffle(paragraphs)
    for paragraph in paragraphs:
        words = re.findall(r"[a-z0-9]+", paragraph.lower())
        if words:
            yield " / ".join(" ".join(_MORSE[c] for c in word) for word in words) + "\n"


DOMAINS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "calendar": _write_calendar,
    "unicode": _write_unicode,
    "records": _write_records,
    "morse": _write_morse,
}


def _list_sources() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
