"""English text in every Python: the help topics of `pydoc` and the docstrings of the standard library.

A calibration text has to be available without a network, be the same on every run, and be long enough for the
default 128 windows of 2048 tokens. The language reference that `help("if")` prints is about 350 kB of
prose and code; the docstrings of the standard library's modules add about 1.2 MB. Modules that some
distributions leave out (tkinter, idlelib, distutils, the tests) are left out everywhere, so two machines
with the same Python release read the same text. Other releases have other texts; the label names the release.

One document in ten is held out for evaluation, chosen by a hash of its name. Topics quote each other
("specialnames" contains "customization"), so a paragraph that appears in a held-out document, or earlier in
the same part, is dropped: no paragraph is used for both calibration and evaluation.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import decode_source
from pathlib import Path

from gptq_cli.calibration.docstrings import docstrings
from gptq_cli.devices.out_of_memory import is_out_of_memory

_EXAMPLES = {"__hello__", "__phello__", "pydoc_data", "test", "tests", "turtledemo"}
_OPTIONAL = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle"}
LEFT_OUT = _EXAMPLES | _OPTIONAL
HELD_OUT_EVERY = 10
MIN_DOCSTRING = 40
"""Characters; shorter ones ("Return True.") say too little to be useful."""

_UNDERLINE = re.compile(r"^\s*([=*~^\"'#+.-])\1{2,}\s*$")
_UNDERLINES = tuple("=*~^\"'#+.-")
_MARKUP = (
    (".. ", re.compile(r"^(\s*)\.\. [\w:-]+::[ \t]*", re.MULTILINE), r"\1"),  # .. note::
    (":`", re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`<]+?)(?:\s*<[^>`]*>)?`"), r"\1"),  # :class:`int`
    ("``", re.compile(r"``([^`\n]+)``"), r"\1"),  # ``literal``
    ("**", re.compile(r"(?<![\w*\\])\*\*([A-Za-z][^*\n]*[\w.)])\*\*(?![\w*])"), r"\1"),  # **bold**
    ("::", re.compile(r"::[ \t]*$", re.MULTILINE), ":"),  # the mark of a code block
)
"""What every place of a pattern holds (a text without it needs no search), the pattern, what stays of it."""
_WRAPPED_AT = 50
"""A line at least this long, followed by another with the same indentation, was wrapped at a text width."""


def held_out(name: str) -> bool:
    """True if the document `name` belongs to the evaluation part; the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % HELD_OUT_EVERY == 0


def clean(text: str) -> str:
    """Plain prose: no ReST markup, paragraphs on one line, code unchanged."""
    lines = (line.rstrip() for line in text.expandtabs().splitlines())
    kept = "\n".join(line for line in lines if not (line.endswith(_UNDERLINES) and _UNDERLINE.match(line)))
    for mark, pattern, replacement in _MARKUP:
        if mark in kept:
            kept = pattern.sub(replacement, kept)
    paragraphs = (_unwrap(_dedented(part).strip("\n")) for part in re.split(r"\n\s*\n", kept))
    return "\n\n".join(part for part in paragraphs if part)


def _dedented(part: str) -> str:
    """Without common indentation, of which there is none where the first line has none."""
    return textwrap.dedent(part) if part[:1].isspace() else part


def _unwrap(paragraph: str) -> str:
    """Join the lines of a paragraph of prose; leave code, lists and grammar as they are."""
    lines = paragraph.split("\n")
    if len(lines) == 1:
        return paragraph
    prose = all(line[:1].isalpha() or line[:1] in "\"'(`" for line in lines)
    wrapped = all(len(line) >= _WRAPPED_AT for line in lines[:-1])
    return " ".join(lines) if prose and wrapped and "::=" not in paragraph else paragraph


def _topics() -> Iterator[tuple[str, Callable[[], str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal distributions drop it; the docstrings remain
        return
    for name in sorted(topics):
        yield f"topic {name}", partial(clean, topics[name])


def _modules() -> Iterator[tuple[str, Callable[[], str]]]:
    library = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names):
        paths = [library / f"{top}.py", *(library / top).rglob("*.py")]
        for path in sorted(path for path in paths if path.is_file()):
            parts = path.relative_to(library).with_suffix("").parts
            if not LEFT_OUT.intersection(parts):
                yield f"module {'.'.join(parts)}", partial(_docstrings, path)


def _docstrings(path: Path) -> str:
    """The cleaned docstrings of a source file; "" where it cannot be read as text."""
    try:
        source = decode_source(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return ""
    return "\n\n".join(clean(text) for text in docstrings(source) if len(text) >= MIN_DOCSTRING)


def stdlib_documents(*, evaluation: bool) -> Iterator[str]:
    """The documents of one part, in a fixed order, without repeated paragraphs; each is read when its turn
    comes, so that a short run reads a part of the library."""
    sources = [*_topics(), *_modules()]
    evaluated = [text for name, read in sources if held_out(name) and (text := read())]
    if evaluation:
        return _without_repeats(evaluated, set())
    calibrated = (text for name, read in sources if not held_out(name) and (text := read()))
    return _without_repeats(calibrated, {key for text in evaluated for key in map(_key, text.split("\n\n"))})


def _without_repeats(documents: Iterable[str], seen: set[str]) -> Iterator[str]:
    """The documents without the paragraphs that were `seen`, here or before; `seen` grows."""
    for text in documents:
        fresh = []
        for paragraph in text.split("\n\n"):
            key = _key(paragraph)
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh)


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def label(name: str) -> str:
    """The name in reports of the source `name` ("pydoc" or "pydoc-heldout")."""
    return f"{name} (Python {platform.python_version()})"
